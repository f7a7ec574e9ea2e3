"""Evaluations of a run: when one is due, how it is made so that training does not notice, and what is written
of it.

Owns the intervals and the record; what is measured is the unit's. Everything depends on the clock and the
history, which a checkpoint holds, so a resumed run evaluates where an uninterrupted one does. Called by the
loop.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aiprod_ds.appended_file import AppendedFile
from aiprod_ds.bad_disk import DiskWatch
from aiprod_ds.clock import Clock
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import FILE, EvaluationRecord, Medium, Reason, line_of
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.optim.ema import evaluated_weights
from aiprod_ds.train.interrupts import Interrupts
from aiprod_ds.train.kept_media import thin_media
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.state import TrainState
from aiprod_ds.train.unit import Evaluation, EvaluationRequest, EvaluationStoppedError, Part, Unit

_LOG = logging.getLogger(__name__)
SAMPLES, UNFINISHED = "samples", ".unfinished"


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates one run.

    Attributes:
        history: Remembers what was evaluated; saved with every checkpoint.
        disk: Survives records and media that the disk does not take.
    """

    config: RunConfig
    plan: RunPlan
    unit: Unit
    folder: Path
    recorder: MetricsRecorder
    stopwatch: Stopwatch
    interrupts: Interrupts
    history: History
    disk: DiskWatch
    _records: AppendedFile | None = None
    _best_before: tuple[int, str, list[float]] | None = None

    @property
    def every_part(self) -> Part:
        """What an evaluation of this run can consist of."""
        return Part.ALL if self.config.has_previews() else Part.MEASURES

    def due(self, clock: Clock) -> Part:
        """Returns what the intervals want at `clock` and has not been made there yet.

        An interval of updates is met at its multiples; one of samples by the first update that reaches a
        multiple, or passes it, since held-out clips were last measured.
        """
        evaluation, wanted = self.config.evaluation, Part.NONE
        if _is_multiple(clock.updates, evaluation.every_updates):
            wanted |= Part.MEASURES
        if (every := evaluation.every_samples) is not None:
            before = self.history.evaluated.get(Part.MEASURES.name or "", {}).get("samples", 0)
            if clock.samples // every > before // every:
                wanted |= Part.MEASURES
        if _is_multiple(clock.updates, self.config.preview_updates()):
            wanted |= Part.PREVIEWS
        return wanted & self.missing(clock)

    def missing(self, clock: Clock) -> Part:
        """Returns what has not been made at `clock`: the same weights need no second evaluation."""
        made = Part.NONE
        for part in Part.MEASURES, Part.PREVIEWS:
            if self.history.evaluated.get(part.name or "", {}).get("updates") == clock.updates:
                made |= part
        return self.every_part & ~made

    def make(self, parts: Part, reason: Reason, *, state: TrainState, clock: Clock) -> Evaluation | None:
        """Evaluates, writes what was found and notes it in the history. Collective.

        Neither weights nor moments, buffers nor random streams are changed, nor does the time count as
        training's.

        Returns:
            None if the run was asked to stop meanwhile: then nothing is written, and the evaluation is made
            again after a resume.
        """
        self.recorder.flush(dist.reduce_mean)
        began = time.perf_counter()
        with self.stopwatch.during(Activity.EVALUATION):
            found = self._found(parts, state)
            if found is None:
                _LOG.warning("evaluation_stopped update=%d", clock.updates)
                return None
            self._note(parts, found, clock)
            if dist.is_main():
                record = self._record(found, reason, state=state, clock=clock, began=began)
                self._append(record)
                self._thin()
                self.recorder.log_evaluation(record, self.folder)
        _LOG.info(
            "evaluated update=%d reason=%s seconds=%.1f", clock.updates, reason, time.perf_counter() - began
        )
        return found

    def is_best(self) -> bool:
        """Returns whether the last measures are among those that `checkpoint.keep_best` keeps; asked once
        after each evaluation inside a phase or at its end."""
        rule = self.config.checkpoint.keep_best
        value = None if rule is None else self.history.measured.get("metrics", {}).get(rule.metric)
        if rule is None or value is None or not math.isfinite(value):
            return False
        sign, name = (1.0 if rule.mode == "min" else -1.0), f"{rule.mode} {rule.metric}"
        known = self.history.best.get(name, [])
        best = sorted([*known, value], key=lambda each: sign * each)[: rule.count]
        self.history.best[name] = best
        if best != known:
            self._best_before = (self.history.measured["updates"], name, known)
        return best != known

    def note_not_saved(self, update: int, reason: str) -> None:
        """Remembers a save that failed; measures that were the best then do not count as such any more."""
        self.history.note_not_saved(update, reason)
        if self._best_before is not None and self._best_before[0] == update:
            _, name, known = self._best_before
            self.history.best[name] = known
            self._best_before = None

    def close(self) -> None:
        """Writes the records that the disk has not taken, if it does now, and lets go of their file."""
        records = self._records
        if records is None:
            return
        if records.num_waiting:
            self.disk.attempt(FILE, records.flush)
        if lost := records.num_lost + records.num_waiting:
            self.disk.give_up(FILE, lost, "records")
        records.close()

    def _append(self, record: EvaluationRecord) -> None:
        self._records = self._records or AppendedFile(self.folder / FILE)
        self._records.add(line_of(record))
        self.disk.attempt(FILE, self._records.flush)

    def _found(self, parts: Part, state: TrainState) -> Evaluation | None:
        request = EvaluationRequest(parts=parts, go_on=self._go_on)
        with _random_streams_kept(state.engine.device):
            state.engine.eval()
            # Stopping inside the block would leave its weights, and the other ranks, behind.
            with evaluated_weights(state.ema):
                try:
                    found: Evaluation | None = self.unit.evaluate(state.engine, request)
                except EvaluationStoppedError:
                    found = None
            state.engine.train()
        return found

    def _go_on(self) -> None:
        if self.interrupts.is_stop_agreed():
            raise EvaluationStoppedError

    def _note(self, parts: Part, found: Evaluation, clock: Clock) -> None:
        self.history.evaluations += 1
        for part in Part.MEASURES, Part.PREVIEWS:
            if part in parts:
                self.history.evaluated[part.name or ""] = {"updates": clock.updates, "samples": clock.samples}
        if Part.MEASURES in parts:
            self.history.measured = {"updates": clock.updates, "metrics": dict(found.metrics)}

    def _record(
        self, found: Evaluation, reason: Reason, *, state: TrainState, clock: Clock, began: float
    ) -> EvaluationRecord:
        phase = self.plan.phases[clock.phase]
        name, moment = _names(reason, clock, phase.index, phase.name)
        return EvaluationRecord(
            update=clock.updates,
            samples=clock.samples,
            phase=phase.name,
            phase_index=phase.index,
            reason=reason,
            seconds=time.perf_counter() - began,
            metrics=found.metrics,
            headline=found.headline,
            is_average=state.ema is not None,
            clips=found.clips,
            not_judged=found.not_judged,
            media=self._media(found, name, moment),
        )

    def _media(self, found: Evaluation, name: str, moment: str) -> tuple[Medium, ...]:
        """Writes what shows the evaluation; of media that the disk does not take none are named."""
        examples, title = found.examples, f"{moment}: {found.headline}"
        if examples is None:
            return ()
        samples, unfinished = self.folder / SAMPLES, self.folder / UNFINISHED / SAMPLES

        def write() -> tuple[Medium, ...]:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
                unfinished.mkdir(parents=True)
                media = examples.save(unfinished, name, title=title, moment=moment)
                samples.mkdir(exist_ok=True)
                # Whole ones only: originals are those of earlier evaluations too.
                for path in unfinished.iterdir():
                    path.replace(samples / path.name)
                return media
            finally:
                shutil.rmtree(unfinished.parent, ignore_errors=True)

        return self.disk.attempt(SAMPLES, write) or ()

    def _thin(self) -> None:
        try:
            thin_media(self.folder, keep=self.config.evaluation.keep_media)
        except (OSError, DataError) as error:  # pictures that are too many harm nobody
            _LOG.warning("media_not_thinned error=%s", error)


def _names(reason: Reason, clock: Clock, phase_index: int, phase: str) -> tuple[str, str]:
    """Returns how files are named and what stands over them."""
    if reason == "before":
        return "before", "before training"
    if reason == "phase_end":
        return f"phase_{phase_index + 1}_{phase}", f"after phase {phase}"
    return f"update_{clock.updates:06d}", f"update {clock.updates}"


def _is_multiple(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


@contextmanager
def _random_streams_kept(device: torch.device) -> Iterator[None]:
    """Gives torch's, numpy's and Python's streams back as they were, whatever is drawn in the block."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
