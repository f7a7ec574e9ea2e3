"""One run from a prepared unit to its report: engine, resume, loop, export, files of the run folder.

The same for every trainer. All checks that can fail stand before the first write; only the main rank writes, except that every
rank writes its part of a checkpoint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from aiprod_ds.checkpoint.state import RunState, tensors_sha256
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints, to_yaml
from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import describe
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.scheduler import CurriculumScheduler
from aiprod_ds.curriculum.steering import check_steering
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.files import write_atomically
from aiprod_ds.report.console import ConsoleSink, PhaseSpan, print_summary
from aiprod_ds.report.environment import describe_environment, peak_rss_bytes
from aiprod_ds.report.jsonl import JsonlSink, read_metrics
from aiprod_ds.report.plots import save_plots
from aiprod_ds.report.recorder import MetricsRecorder
from aiprod_ds.report.run_report import write_report
from aiprod_ds.report.sinks import MirrorSink, Sink
from aiprod_ds.report.stopwatch import Stopwatch
from aiprod_ds.report.summary import PhaseSummary, Picture, RunStatus, RunSummary
from aiprod_ds.report.wandb import open_wandb
from aiprod_ds.train.engines import build_engine, read_settings
from aiprod_ds.train.history import History
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.train.unit import Unit

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    config: VAETrainerConfig
    plan: RunPlan
    unit: Unit
    source: str
    settings: DeepSpeedSettings
    console: Console

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints")

    @property
    def layout(self) -> dict[str, Any]:
        kind = self.config.engine.kind
        stage = self.settings.zero_stage if kind == "deepspeed" else 0
        return {"engine": kind, "world_size": dist.world_size(), "zero_stage": stage, "precision": self.settings.precision}


def run_training(
    config: VAETrainerConfig, unit: Unit, plan: RunPlan, *, resume: str, source: str, console: Console | None = None
) -> RunSummary:
    """Trains `unit` through `plan` and writes the run folder.

    Args:
        config: The whole configuration; `output_dir` is the run folder.
        unit: What is trained.
        plan: The curriculum for this world size.
        resume: `auto`, `never` or the path of a checkpoint folder.
        source: How messages name the configuration.
        console: Where progress is drawn (main rank); standard error by default.

    Raises:
        ConfigError: If the checkpoint belongs to another configuration or another layout of ranks.
        CheckpointError: If checkpoints exist and none is whole.
        NonFiniteError: If training diverged for good.
    """
    run = _new_run(config, unit, plan, source, console or Console(stderr=True))
    _refuse_unsupported(run)
    checkpoint = _find_own(run, resume)
    if dist.is_main():
        _prepare_folder(run, checkpoint, move_aside=resume == "never")
    dist.barrier()
    engine = build_engine(config, run.settings, unit, plan)
    try:
        return _train(run, engine, checkpoint)
    finally:
        engine.close()


def evaluate_checkpoint(config: VAETrainerConfig, unit: Unit, plan: RunPlan, *, resume: str, source: str) -> dict[str, float]:
    """Returns the held-out measures of a checkpoint; writes nothing.

    Raises:
        CheckpointError: If there is none, or it belongs to another run.
    """
    run = _new_run(config, unit, plan, source, Console(stderr=True))
    checkpoint = _find_own(run, resume)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.folder}: must hold a checkpoint to evaluate, got none. Train first, or name another --output-dir."
        )
    engine = build_engine(config, run.settings, unit, plan)
    try:
        engine.load(checkpoint.engine_folder)
        engine.eval()
        return dict(unit.evaluate(engine).metrics)
    finally:
        engine.close()


def _new_run(config: VAETrainerConfig, unit: Unit, plan: RunPlan, source: str, console: Console) -> _Run:
    settings = read_settings(config, source=source)
    return _Run(config=config, plan=plan, unit=unit, source=source, settings=settings, console=console)


def _train(run: _Run, engine: Engine, checkpoint: Checkpoint | None) -> RunSummary:
    scheduler, clock, history = CurriculumScheduler(run.plan), Clock(), History()
    if checkpoint is not None:
        engine.load(checkpoint.engine_folder)
        clock, history = checkpoint.state.clock, History.from_dict(checkpoint.state.history)
        scheduler.load_state_dict(checkpoint.state.scheduler)
        history.resumed_from.append(checkpoint.folder.name)
        _LOG.info("resumed checkpoint=%s update=%d phase=%d", checkpoint.folder.name, clock.updates, clock.phase)
    sinks = _open_sinks(run, clock, is_resumed=checkpoint is not None) if dist.is_main() else ()
    recorder = MetricsRecorder(device=engine.device, world_size=engine.world_size, sinks=sinks)
    stopwatch = Stopwatch()

    def save(now: Clock) -> None:
        state = RunState(
            clock=now,
            scheduler=scheduler.state_dict(),
            fingerprint=config_fingerprint(run.config),
            phase_fingerprints=phase_fingerprints(run.config),
            layout=run.layout,
            history=history.to_dict(),
        )
        _save(engine, run.store, state)

    loop = TrainingLoop(
        config=run.config,
        plan=run.plan,
        unit=run.unit,
        engine=engine,
        scheduler=scheduler,
        recorder=recorder,
        stopwatch=stopwatch,
        folder=run.folder,
        save=save,
        clock=clock,
        history=history,
    )
    try:
        loop.run()
    finally:
        recorder.close()
    return _report(run, engine, loop, stopwatch)


def _find_own(run: _Run, resume: str) -> Checkpoint | None:
    """Returns the verified checkpoint to go on from, the same on all ranks; it belongs to this run."""
    checkpoint = dist.from_main(lambda: _find(run.store, resume))
    if checkpoint is not None:
        _check_belongs(run, checkpoint)
    return checkpoint


def _find(store: CheckpointStore, resume: str) -> Checkpoint | None:
    if resume == "never":
        return None
    if resume == "auto":
        return store.newest()
    if not Path(resume).is_dir():
        raise ConfigError(f"--resume: must be auto, never or a checkpoint folder, got {resume!r}, which is no folder.")
    return store.read(Path(resume))


def _check_belongs(run: _Run, checkpoint: Checkpoint) -> None:
    state, where = checkpoint.state, f"{run.source}: --resume {checkpoint.folder}"
    if state.fingerprint != config_fingerprint(run.config):
        raise ConfigError(
            f"{where}: must be of the same configuration, got a checkpoint of another one. "
            "Restore the configuration (config.yaml in the run folder is what ran), choose another --output-dir or start anew."
        )
    if dict(state.layout) != run.layout:
        raise ConfigError(
            f"{where}: must have this run's layout {run.layout}, got {dict(state.layout)}. "
            "Start as many ranks with the same engine settings as the saved run."
        )
    for change in check_steering(state.phase_fingerprints, run.config, state.clock):
        _LOG.warning("curriculum_steered %s", change)


def _refuse_unsupported(run: _Run) -> None:
    problems = []
    for phase in run.plan.phases:
        where = f"{run.source}: curriculum.phases[{phase.index}]"
        if phase.moment_scale != 1.0:
            problems.append(f"{where}.moments: must be keep in this version, got {phase.moments}. Remove it.")
        if phase.weight_decay != run.config.optimizer.weight_decay:
            problems.append(
                f"{where}.weight_decay: must be that of the optimizer in this version, got {phase.weight_decay}. Remove it."
            )
        if phase.activation_checkpointing not in (None, run.settings.activation_checkpointing):
            problems.append(f"{where}.activation_checkpointing: cannot change between phases in this version. Remove it.")
        if any(bucket.share is not None for bucket in phase.buckets):
            problems.append(f"{where}.buckets: shares are not drawn in this version. Remove share.")
    if problems:
        raise ConfigError(problems)


def _prepare_folder(run: _Run, checkpoint: Checkpoint | None, *, move_aside: bool) -> None:
    if move_aside and run.folder.exists() and any(run.folder.iterdir()):
        old = next(path for n in range(1, 10_000) if not (path := run.folder.with_name(f"{run.folder.name}.{n}")).exists())
        run.folder.rename(old)
        _LOG.warning("previous_run_moved from=%s to=%s", run.folder, old)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / "config.yaml", to_yaml(run.config))
    write_atomically(run.folder / "plan.json", json.dumps(describe(run.plan), indent=1) + "\n")
    name = "environment.json" if checkpoint is None else f"environment_from_{checkpoint.state.clock.updates:06d}.json"
    write_atomically(run.folder / name, json.dumps(describe_environment(), indent=1) + "\n")


def _open_sinks(run: _Run, clock: Clock, *, is_resumed: bool) -> tuple[Sink, ...]:
    from_update = clock.updates if is_resumed else None
    spans = [
        PhaseSpan(
            name=phase.name,
            updates=phase.length.maximum or phase.length.minimum,
            description=_shape_text(run.plan, phase.index),
            relative_cost=phase.buckets[0].pixels_per_update,
        )
        for phase in run.plan.phases
    ]
    sinks: list[Sink] = [
        JsonlSink(run.folder / "metrics.jsonl", resume_from_update=from_update),
        ConsoleSink(run.console, phases=spans, first_update=clock.updates),
    ]
    if run.config.report.tensorboard:
        from aiprod_ds.report.tensorboard import TensorBoardSink  # an extra; not everybody has it

        sinks.append(MirrorSink(TensorBoardSink(run.folder / "tensorboard", resume_from_update=from_update), name="tensorboard"))
    wandb = open_wandb(run.config.report.wandb, folder=run.folder, run_config=run.config.model_dump(mode="json"))
    return (*sinks, wandb) if wandb is not None else tuple(sinks)


def _shape_text(plan: RunPlan, index: int) -> str:
    bucket = plan.phases[index].buckets[0]
    return f"{bucket.frames} frames {bucket.height}x{bucket.width}, batch {bucket.global_batch_size}"


def _save(engine: Engine, store: CheckpointStore, state: RunState) -> None:
    updates = state.clock.updates
    if dist.is_main():
        store.open_pending(updates)
    dist.barrier()
    engine.save(store.pending_folder(updates) / "engine")
    dist.barrier()
    if dist.is_main():
        store.commit(updates, state)
    dist.barrier()


def _report(run: _Run, engine: Engine, loop: TrainingLoop, stopwatch: Stopwatch) -> RunSummary:
    digest = _final_sha256(engine)
    state = engine.module_state()
    summary = RunSummary(
        name=run.folder.name,
        trainer=run.config.trainer,
        model=run.config.model.source,
        parameters=sum(parameter.numel() for parameter in state.values()),
        status=RunStatus.COMPLETED,
        updates=loop.clock.updates,
        planned_updates=run.plan.total_updates or loop.clock.updates,
        skipped_updates=loop.clock.skipped_updates,
        phases=tuple(_phase_summary(run.plan, loop.history, index) for index in range(len(run.plan.phases))),
        metrics={
            **{f"{name}_before": value for name, value in loop.history.before.items()},
            **{f"{name}_after": value for name, value in loop.history.phase_metrics.get(run.plan.phases[-1].name, {}).items()},
        },
        final_state_sha256=digest,
        world_size=engine.world_size,
        engine=run.layout["engine"],
        zero_stage=run.layout["zero_stage"],
        precision=run.layout["precision"],
        time_seconds=stopwatch.breakdown(),
        peak_rss_bytes=peak_rss_bytes(),
        environment=describe_environment(),
        data=run.unit.data_summary(),
        replacements=run.unit.replacements(),
        resumed_from=tuple(loop.history.resumed_from),
        pictures=_pictures(run),
        plots=_plots(run) if dist.is_main() else (),
    )
    if dist.is_main():
        run.unit.export(state, run.folder / "export")
        _, page = write_report(run.folder, summary)
        print_summary(run.console, summary, report=page)
    return summary


def _final_sha256(engine: Engine) -> str:
    parts = (
        [
            (f"{state.name}/value", state.value),
            *((f"{state.name}/{key}", tensor) for key, tensor in sorted(state.optimizer.items())),
        ]
        for state in engine.parameter_states()
    )
    return dist.broadcast_object(tensors_sha256(chain.from_iterable(parts)))


def _phase_summary(plan: RunPlan, history: History, index: int) -> PhaseSummary:
    phase = plan.phases[index]
    bucket = phase.buckets[0]
    return PhaseSummary(
        name=phase.name,
        updates=history.phase_updates.get(phase.name, 0),
        resolution=f"{bucket.height}x{bucket.width}",
        frames=bucket.frames,
        batch=bucket.global_batch_size,
        lr_max=phase.learning_rate.peak,
        seconds=history.phase_seconds.get(phase.name, 0.0),
        metrics=history.phase_metrics.get(phase.name, {}),
    )


def _pictures(run: _Run) -> tuple[Picture, ...]:
    names = [("before", "before training")]
    names += [(f"phase_{phase.index + 1}_{phase.name}", f"after phase {phase.name}") for phase in run.plan.phases]
    found = [(Path("samples") / f"{name}.png", caption) for name, caption in names]
    return tuple(Picture(path=str(path), caption=caption) for path, caption in found if (run.folder / path).is_file())


def _plots(run: _Run) -> tuple[Picture, ...]:
    rows = read_metrics(run.folder / "metrics.jsonl")
    return save_plots(rows, run.folder / "plots", phase_names=[phase.name for phase in run.plan.phases])
