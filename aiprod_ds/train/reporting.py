"""What a run leaves for its reader: the summary in report.json, report.md and report.html, from the loop and
what it remembers.

Owns the way from `TrainingLoop` to `RunSummary`. A run that ends by an error is reported too, without any
collective, because the other ranks may never answer.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from aiprod_ds.bad_disk import DiskWatch
from aiprod_ds.checkpoint.state import tensors_sha256
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.data.clip_list import ClipList
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import EvaluationRecord, read_evaluations
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.optim.ema import evaluated_weights
from aiprod_ds.report.environment import describe_environment, peak_rss_bytes
from aiprod_ds.report.page.run_page import PAGE, write_page
from aiprod_ds.report.plots import save_plots
from aiprod_ds.report.run_report import write_report, write_start
from aiprod_ds.report.summary import PhaseSummary, Picture, RunStatus, RunSummary
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.train.phase_change import RunParts
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.spikes.going_back import in_words
from aiprod_ds.train.spikes.rollbacks import Rollback, Rollbacks
from aiprod_ds.train.unit import Unit

_LOG = logging.getLogger(__name__)
_CLIP_SUFFIXES = (".wav", ".mp4")
_EXPORT, _REPORT = "export", "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known of a run before its first update.

    Attributes:
        parts: Configuration, resolved plan and unit.
        parameters: Of the model, trained or not.
        layout: From `compatibility.run_layout`.
        clips: Returns the list of the run's clips; for the main rank.
        unread_clips: Returns which of some training clips, by name, cannot be read to their end.
        data_change: How the data differs from that of the checkpoint, in words; None if it does not.
        disk: Survives what the disk does not take.
    """

    parts: RunParts
    parameters: int
    layout: dict[str, Any]
    clips: Callable[[], ClipList]
    unread_clips: Callable[[Collection[str]], frozenset[str]]
    data_change: str | None = None
    disk: DiskWatch

    @property
    def config(self) -> RunConfig:
        """The whole configuration."""
        return self.parts.config

    @property
    def plan(self) -> RunPlan:
        """The phases as they run."""
        return self.parts.resolved.plan

    @property
    def unit(self) -> Unit:
        """What is trained."""
        return self.parts.unit

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)


def report_started(facts: RunFacts, rollbacks: Rollbacks, history: History) -> None:
    """Writes what is known before the next update, on the main rank: a run that is killed leaves no more."""
    if not dist.is_main():
        return
    known = {
        "trainer": facts.config.trainer,
        "model": facts.config.model.source,
        "parameters": facts.parameters,
        **{key: facts.layout[key] for key in ("world_size", "engine", "zero_stage", "precision")},
        "performance": list(facts.parts.performance.reasons),
        "replacements": [*facts.unit.replacements(), *_chosen(facts.layout)],
        "rollbacks": [_rollback(entry, facts.plan) for entry in rollbacks.decided],
        "rate_factors": list(history.rate_factors),
    }
    facts.disk.attempt("start.json", lambda: write_start(facts.folder, known, facts.unit.data_summary()))


def report_completed(facts: RunFacts, loop: TrainingLoop) -> RunSummary:
    """Exports the model, writes the report of a finished run and returns its summary. Collective; the main
    rank writes.

    Raises:
        DiskError: If the disk does not take export or report, whatever the rule: the run's result is missing.
    """
    engine = loop.state.engine
    digest = final_state_sha256(engine)
    engine.eval()
    # Looks for the folder inside only: before, ranks that see it would wait for one that does not.
    with evaluated_weights(loop.state.ema):
        facts.disk.attempt(
            _EXPORT, lambda: facts.unit.export(engine, facts.folder / _EXPORT), looks_for_folder=False
        )
    status, error = RunStatus.COMPLETED, None
    if facts.disk.is_out(_EXPORT):
        shutil.rmtree(facts.folder / _EXPORT, ignore_errors=True)
        status, error = RunStatus.FAILED, f"the disk does not take {_EXPORT}"
    summary = _summarize(facts, loop, status, digest=digest, error=error)
    if dist.is_main():
        _write(facts, summary)
    dist.from_main(lambda: _require_result(facts.disk))
    return summary


def _require_result(disk: DiskWatch) -> None:
    for what in (_EXPORT, _REPORT):
        disk.require_written(what)
    disk.require_no_fault()


def report_interrupted(facts: RunFacts, loop: TrainingLoop) -> RunSummary:
    """Writes the report of a run that was asked to stop and has saved, on the main rank, and returns its
    summary."""
    summary = _summarize(facts, loop, RunStatus.INTERRUPTED)
    if dist.is_main():
        _write(facts, summary)
    return summary


def report_ended(facts: RunFacts, loop: TrainingLoop, error: BaseException) -> None:
    """Writes the report of a run that `error` ended, on the main rank."""
    if not dist.is_main():
        return
    error = dist.caused_by_peer(error) or error
    status = RunStatus.FAILED if isinstance(error, Exception) else RunStatus.INTERRUPTED
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    _write(facts, _summarize(facts, loop, status, error=reason))


def _write(facts: RunFacts, summary: RunSummary) -> None:
    """Writes the report for programs, as text and as a page; what cannot be made of it ends nothing here."""
    folder = facts.folder
    facts.disk.attempt(_REPORT, lambda: write_report(folder, summary))
    try:
        facts.disk.attempt(PAGE, lambda: write_page(folder))
    except Exception as error:  # noqa: BLE001  whatever a file in the folder does to the page
        _LOG.warning("page_failed folder=%s error=%r", folder, error)
        is_missing = True
    else:
        is_missing = facts.disk.is_out(PAGE)
    if is_missing:
        with suppress(OSError):
            (folder / PAGE).unlink(missing_ok=True)  # it says that the run goes on


def page_of(folder: Path) -> Path:
    """Returns what a person is to open: the page, or the text where there is no page."""
    return folder / (PAGE if (folder / PAGE).is_file() else "report.md")


def final_state_sha256(engine: Engine) -> str:
    """Returns one hash over all trained parameters and their optimizer state, the same on every rank.
    Collective."""
    parts = (
        [
            (f"{state.name}/value", state.value),
            *((f"{state.name}/{key}", tensor) for key, tensor in sorted(state.optimizer.items())),
        ]
        for state in engine.parameter_states()
    )
    return dist.broadcast_object(tensors_sha256(chain.from_iterable(parts)))


def _summarize(
    facts: RunFacts,
    loop: TrainingLoop,
    status: RunStatus,
    *,
    digest: str | None = None,
    error: str | None = None,
) -> RunSummary:
    history, plan = loop.history, facts.plan
    record = _last_measured(facts.folder) if dist.is_main() else None
    return RunSummary(
        name=facts.folder.name,
        trainer=facts.config.trainer,
        model=facts.config.model.source,
        parameters=facts.parameters,
        status=status,
        updates=loop.clock.updates,
        planned_updates=plan.total_updates or max(loop.clock.updates, plan.total.minimum),
        skipped_updates=loop.clock.skipped_updates,
        phases=tuple(_phase_summary(phase, history) for phase in plan.phases),
        metrics=_measures(plan, history),
        measured_clips=0 if record is None else len(record.clips),
        judged_clips={} if record is None else {name: record.num_judged(name) for name in record.metrics},
        final_state_sha256=digest,
        world_size=facts.layout["world_size"],
        engine=facts.layout["engine"],
        zero_stage=facts.layout["zero_stage"],
        precision=facts.layout["precision"],
        time_seconds=loop.stopwatch.breakdown(),
        peak_rss_bytes=peak_rss_bytes(),
        environment=describe_environment() if dist.is_main() else {},
        performance=facts.parts.performance.reasons,
        data=replace(facts.unit.data_summary(), replaced=tuple(sorted(loop.faults.known.items()))),
        worker_restarts=history.worker_restarts,
        replacements=(*facts.unit.replacements(), *_chosen(facts.layout), *history.replacements),
        retrained=tuple(history.retrained),
        resumed_from=tuple(history.resumed_from),
        resharded=tuple(history.resharded),
        accepted_data=tuple(history.accepted_data),
        not_saved=tuple(history.not_saved),
        not_written=facts.disk.notes(),
        rollbacks=tuple(_rollback(entry, plan) for entry in loop.rollbacks.decided),
        rate_factors=tuple(history.rate_factors),
        pictures=_pictures(facts) if dist.is_main() else (),
        plots=_plots(facts) if dist.is_main() else (),
        error=error,
    )


def _last_measured(folder: Path) -> EvaluationRecord | None:
    """Returns the last evaluation that measured something; None without one or if its file is damaged."""
    try:
        records = read_evaluations(folder)
    except (DataError, OSError) as error:
        _LOG.warning("evaluations_unread reason=%s", error)
        return None
    return next((record for record in reversed(records) if record.metrics), None)


def _measures(plan: RunPlan, history: History) -> dict[str, float]:
    """Held-out measures before training and after the last phase that was measured."""
    measured = [phase.name for phase in plan.phases if phase.name in history.phase_metrics]
    after = history.phase_metrics[measured[-1]] if measured else {}
    return {f"{name}_before": value for name, value in history.before.items()} | {
        f"{name}_after": value for name, value in after.items()
    }


def _phase_summary(phase: PhasePlan, history: History) -> PhaseSummary:
    first = phase.buckets[0]
    return PhaseSummary(
        name=phase.name,
        updates=history.phase_updates.get(phase.name, 0),
        ended_by=history.phase_ends.get(phase.name),
        resolution="" if first.is_sound else f"{first.height}x{first.width}",
        frames=first.frames,
        batch=first.global_batch_size,
        shapes=tuple(bucket.shape_text for bucket in phase.buckets),
        lr_max=phase.learning_rate.peak * history.highest_rate_factor(phase.name, phase.learning_rate.factor),
        seconds=history.phase_seconds.get(phase.name, 0.0),
        metrics=history.phase_metrics.get(phase.name, {}),
    )


def _rollback(entry: Rollback, plan: RunPlan) -> dict[str, Any]:
    spike = entry.spike
    return {
        "phase": plan.phases[spike.phase].name,
        "first_position": spike.first,
        "last_position": spike.last,
        "update": spike.update,
        "reason": in_words(spike),
        "checkpoint": entry.checkpoint,
        "learning_rate": spike.learning_rate,
        "clips": list(entry.clips),
    }


def _pictures(facts: RunFacts) -> tuple[Picture, ...]:
    return facts.disk.attempt("samples", lambda: _found_pictures(facts)) or ()


def _found_pictures(facts: RunFacts) -> tuple[Picture, ...]:
    names = [("before", "before training")]
    names += [
        (f"phase_{phase.index + 1}_{phase.name}", f"after phase {phase.name}") for phase in facts.plan.phases
    ]
    found = [Picture(path=f"samples/{name}.png", caption=caption) for name, caption in names]
    found += chain.from_iterable(_clips(facts.folder, *name) for name in (("original", "original"), *names))
    return tuple(picture for picture in found if (facts.folder / picture.path).is_file())


def _clips(folder: Path, name: str, caption: str) -> list[Picture]:
    """Returns the sounds and films that were written as `<name>_clip_<number>`, in the order of their
    numbers."""
    found = (path for path in (folder / "samples").glob(f"{name}_clip_*") if path.suffix in _CLIP_SUFFIXES)
    files = sorted(found, key=lambda path: (len(path.stem), path.stem))
    return [
        Picture(path=f"samples/{path.name}", caption=f"clip {path.stem.rpartition('_')[2]}, {caption}")
        for path in files
    ]


def _plots(facts: RunFacts) -> tuple[Picture, ...]:
    def save() -> tuple[Picture, ...]:
        rows, names = (
            read_metrics(facts.folder / "metrics.jsonl"),
            [phase.name for phase in facts.plan.phases],
        )
        return save_plots(rows, facts.folder / "plots", phase_names=names)

    return facts.disk.attempt("plots", save) or ()


def _chosen(layout: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what `engine.parallel: auto` chose, and why."""
    choice = layout.get("parallel")
    return () if choice is None else tuple(choice["reason"])
