"""One run from a prepared unit to its report: engine, resume, loop, export, files of the run folder.

The same for every trainer. All checks that can fail stand before the first write; only the main rank writes,
except that every rank writes its part of a checkpoint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import DeepSpeedSettings, read_settings
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints, to_yaml
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.describe import describe
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.curriculum.scheduler import CurriculumScheduler
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.files import write_atomically
from aiprod_ds.metrics.jsonl import JsonlSink
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.metrics.sinks import MirrorSink, Sink
from aiprod_ds.metrics.stopwatch import Stopwatch
from aiprod_ds.metrics.wandb import open_wandb
from aiprod_ds.optim.adaptive_clip import AdaptiveClip
from aiprod_ds.optim.ema import Ema, evaluated_weights
from aiprod_ds.report.console import ConsoleSink, PhaseSpan, print_summary
from aiprod_ds.report.environment import describe_environment
from aiprod_ds.report.summary import RunStatus, RunSummary
from aiprod_ds.snapshot import Base
from aiprod_ds.train.engines import build_engine
from aiprod_ds.train.interrupts import Interrupts, SignalWatch
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.train.overflow import OverflowWatch
from aiprod_ds.train.phase_change import check_recompute, retrain
from aiprod_ds.train.planning.auto import ResolvedRun, Search, resolve
from aiprod_ds.train.reporting import RunFacts, report_completed, report_ended, report_interrupted
from aiprod_ds.train.resume.compatibility import change_in_words, check_compatible, run_layout
from aiprod_ds.train.resume.engine_files import read_engine
from aiprod_ds.train.resume.folder_lock import FolderLock
from aiprod_ds.train.resume.frozen_base import base_of_phase, start_in_words
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.resume.shared_folder import require_shared
from aiprod_ds.train.unit import Unit

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    facts: RunFacts
    source: str
    settings: DeepSpeedSettings
    console: Console

    @property
    def config(self) -> RunConfig:
        return self.facts.config

    @property
    def plan(self) -> RunPlan:
        return self.facts.plan

    @property
    def folder(self) -> Path:
        return self.facts.folder

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints")

    def saver(self, history: History) -> Saver:
        return Saver(
            store=self.store,
            config=self.config.checkpoint,
            phase_names=tuple(phase.name for phase in self.plan.phases),
            on_not_saved=history.note_not_saved,
            on_replaced=history.note_replacement,
        )


def run_training(
    config: RunConfig,
    unit: Unit,
    plan: RunPlan,
    *,
    resume: str,
    source: str,
    search_now: Search,
    console: Console | None = None,
) -> RunSummary:
    """Trains `unit` through `plan` and writes the run folder, or saves and returns earlier if asked to
    (`interrupts.py`).

    Args:
        config: The whole configuration; `output_dir` is the run folder.
        unit: What is trained.
        plan: The curriculum for this world size.
        resume: `auto`, `never` or the path of a checkpoint folder.
        source: How messages name the configuration.
        search_now: What `engine.parallel: auto` asks.
        console: Where progress is drawn (main rank); standard error by default.

    Raises:
        ConfigError: If the checkpoint belongs to another configuration or precision, or to other global
            batches.
        CheckpointError: If another run is in the folder, checkpoints exist and none is whole, the ranks share
            no folder, or a checkpoint cannot be written.
        NonFiniteError: If training diverged for good.
    """
    with FolderLock(Path(config.output_dir)) as lock:
        dist.from_main(lock.take_if_used)  # before the newest checkpoint is looked for
        checkpoint = _find_checkpoint(config, resume)
        resolved = _resolve(config, plan, checkpoint, search_now, source)
        run = _new_run(config, unit, resolved, source, console or Console(stderr=True))
        default = run.settings.activation_checkpointing
        check_recompute(unit.module, run.plan, default=default, source=source)
        _require_own(run, checkpoint)
        dist.from_main(lambda: _prepare_folder(run, checkpoint, lock, move_aside=resume == "never"))
        require_shared(run.folder)
        if not dist.is_main():
            lock.share()
        with SignalWatch() as watch:
            return _train(run, checkpoint, watch)


def evaluate_checkpoint(
    config: RunConfig, unit: Unit, plan: RunPlan, *, resume: str, source: str, search_now: Search
) -> dict[str, float]:
    """Returns the held-out measures of a checkpoint; writes nothing.

    Raises:
        CheckpointError: If there is none, or it belongs to another run.
    """
    checkpoint = _find_checkpoint(config, resume)
    resolved = _resolve(config, plan, checkpoint, search_now, source)
    run = _new_run(config, unit, resolved, source, Console(stderr=True))
    _require_own(run, checkpoint)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.folder}: must hold a checkpoint to evaluate, got none. Train first, or name another "
            "--output-dir."
        )
    engine = _build(run, run.plan.phases[checkpoint.state.clock.phase])
    try:
        ema = _new_ema(config, engine)
        read_engine(checkpoint.engine_folder, engine, ema, origin=start_in_words(config))
        engine.eval()
        with evaluated_weights(ema):
            return dict(unit.evaluate(engine).metrics)
    finally:
        engine.close()


def _resolve(
    config: RunConfig, plan: RunPlan, checkpoint: Checkpoint | None, search_now: Search, source: str
) -> ResolvedRun:
    saved = None if checkpoint is None else checkpoint.state.layout
    settings = read_settings(config, source=source)
    return resolve(config, plan, settings, saved=saved, search_now=search_now, source=source)


def _new_run(config: RunConfig, unit: Unit, resolved: ResolvedRun, source: str, console: Console) -> _Run:
    layout = run_layout(config, resolved, world_size=dist.world_size())
    parameters = sum(
        parameter.numel() for parameter in unit.module.parameters()
    )  # before an engine shards them
    facts = RunFacts(config=config, plan=resolved.plan, unit=unit, parameters=parameters, layout=layout)
    return _Run(facts=facts, source=source, settings=resolved.settings, console=console)


def _build(run: _Run, phase: PhasePlan) -> Engine:
    """Returns an engine that trains what `phase` trains."""
    run.facts.unit.prepare(phase)
    return build_engine(run.config, run.settings, run.facts.unit, run.plan)


def _train(run: _Run, checkpoint: Checkpoint | None, watch: SignalWatch) -> RunSummary:
    engine = _build(run, run.plan.phases[0 if checkpoint is None else checkpoint.state.clock.phase])
    loop: TrainingLoop | None = None
    try:
        loop = _new_loop(run, engine, checkpoint, watch)
        return _run(run, loop)
    finally:
        if loop is not None:
            loop.saver.close()
        (engine if loop is None else loop.engine).close()


def _new_loop(run: _Run, engine: Engine, checkpoint: Checkpoint | None, watch: SignalWatch) -> TrainingLoop:
    scheduler, clock, history = CurriculumScheduler(run.plan), Clock(), History()
    ema, clip = _new_ema(run.config, engine), _new_clip(run.config)
    base: Base | None = None
    if checkpoint is not None:
        base = read_engine(checkpoint.engine_folder, engine, ema, origin=start_in_words(run.config)).base
        if clip is not None:
            clip.restore(checkpoint.state.adaptive_clip)
        clock, history = checkpoint.state.clock, History.from_dict(checkpoint.state.history)
        scheduler.load_state_dict(checkpoint.state.scheduler)
        name, change = checkpoint.folder.name, change_in_words(checkpoint.state.layout, run.facts.layout)
        history.resumed_from.append(name)
        _LOG.info("resumed checkpoint=%s update=%d phase=%d", name, clock.updates, clock.phase)
        if change is not None:
            history.resharded.append(f"{name}: {change}")
            _LOG.info("resharded checkpoint=%s %s", name, change)
    if base is None or run.config.checkpoint.self_contained:
        origin, is_stored = (
            start_in_words(run.config),
            checkpoint is not None,
        )  # what was restored may have been trained before
        base = base_of_phase(
            engine, run.plan.phases[clock.phase], run.config, origin=origin, is_stored=is_stored
        )
    # A stop at the edge of a phase saves before the phase is evaluated.
    evaluates_again = (
        clock.phase_updates > 0 and run.plan.phases[clock.phase].name not in history.phase_metrics
    )
    is_resumed = checkpoint is not None
    sinks = (
        _open_sinks(run, clock, is_resumed=is_resumed, evaluates_again=evaluates_again)
        if dist.is_main()
        else ()
    )
    recorder = MetricsRecorder(device=engine.device, world_size=engine.world_size, sinks=sinks)
    stopwatch, saver = Stopwatch(), run.saver(history)

    def save(now: Clock) -> None:
        state = RunState(
            clock=now,
            scheduler=scheduler.state_dict(),
            fingerprint=config_fingerprint(run.config),
            phase_fingerprints=phase_fingerprints(run.config),
            layout=run.facts.layout,
            history=history.to_dict(),
            adaptive_clip={} if loop.clip is None else loop.clip.to_dict(),
        )
        saver.save(loop.engine, loop.ema, state, base=loop.base)

    loop = TrainingLoop(
        config=run.config,
        plan=run.plan,
        unit=run.facts.unit,
        engine=engine,
        scheduler=scheduler,
        recorder=recorder,
        stopwatch=stopwatch,
        folder=run.folder,
        save=save,
        saver=saver,
        retrain=partial(_retrain, run),
        interrupts=Interrupts(watch, run.folder, finished=lambda: saver.finished),
        overflows=OverflowWatch(lowest_scale=_lowest_scale(run.settings)),
        recompute_default=run.settings.activation_checkpointing,
        clock=clock,
        history=history,
        ema=ema,
        clip=clip,
        base=base,
    )
    return loop


def _run(run: _Run, loop: TrainingLoop) -> RunSummary:
    try:
        status = loop.run()
    except BaseException as error:
        loop.recorder.close()
        _report_ended(run, loop, error)
        raise
    loop.recorder.close()
    if status is RunStatus.COMPLETED:
        summary = report_completed(run.facts, loop.engine, loop)
    else:
        summary = report_interrupted(run.facts, loop)
    if dist.is_main():
        print_summary(run.console, summary, report=run.folder / "report.md")
    return summary


def _retrain(run: _Run, loop: TrainingLoop, before: PhasePlan, after: PhasePlan) -> None:
    loop.ema = loop.clip = None  # they follow parameters that are about to go
    loop.engine, done = retrain(
        loop.engine,
        run.facts.unit,
        before,
        after,
        build=lambda: build_engine(run.config, run.settings, run.facts.unit, run.plan),
    )
    loop.ema, loop.clip = _new_ema(run.config, loop.engine), _new_clip(run.config)
    origin = f"{start_in_words(run.config)}, trained until phase {after.name}"
    loop.base = base_of_phase(loop.engine, after, run.config, origin=origin, is_stored=True)
    loop.history.retrained.append(done.to_dict())


def _lowest_scale(settings: DeepSpeedSettings) -> float | None:
    scale = settings.loss_scale
    return None if scale is None or scale.loss_scale else float(scale.min_loss_scale)


def _new_ema(config: RunConfig, engine: Engine) -> Ema | None:
    return None if config.ema is None else Ema(engine, config.ema)


def _new_clip(config: RunConfig) -> AdaptiveClip | None:
    adaptive = config.optimizer.adaptive_clip
    return None if adaptive is None else AdaptiveClip(adaptive, fixed=config.optimizer.gradient_clip_norm)


def _report_ended(run: _Run, loop: TrainingLoop, error: BaseException) -> None:
    try:
        report_ended(run.facts, loop, error)
    except Exception:  # noqa: BLE001  the report must not hide what ended the run
        _LOG.exception("report_failed folder=%s", run.folder)


def _find_checkpoint(config: RunConfig, resume: str) -> Checkpoint | None:
    """Returns the verified checkpoint to go on from, the same on all ranks."""
    store = CheckpointStore(Path(config.output_dir) / "checkpoints")
    return dist.from_main(lambda: _find(store, resume))


def _require_own(run: _Run, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        where = f"{run.source}: --resume {checkpoint.folder}"
        check_compatible(checkpoint.state, run.config, run.facts.layout, where=where)


def _find(store: CheckpointStore, resume: str) -> Checkpoint | None:
    if resume == "never":
        return None
    if resume == "auto":
        return store.newest()
    if not Path(resume).is_dir():
        raise ConfigError(
            f"--resume: must be auto, never or a checkpoint folder, got {resume!r}, which is no folder."
        )
    return store.read(Path(resume))


def _prepare_folder(run: _Run, checkpoint: Checkpoint | None, lock: FolderLock, *, move_aside: bool) -> None:
    if move_aside and run.folder.exists() and any(run.folder.iterdir()):
        old = next(
            path
            for n in range(1, 10_000)
            if not (path := run.folder.with_name(f"{run.folder.name}.{n}")).exists()
        )
        run.folder.rename(old)
        _LOG.warning("previous_run_moved from=%s to=%s", run.folder, old)
    run.folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    for report in (
        "report.json",
        "report.md",
    ):  # of an earlier start: its status would be taken for this one's
        (run.folder / report).unlink(missing_ok=True)
    write_atomically(run.folder / "config.yaml", to_yaml(run.config))
    write_atomically(run.folder / "plan.json", json.dumps(describe(run.plan), indent=1) + "\n")
    name = (
        "environment.json"
        if checkpoint is None
        else f"environment_from_{checkpoint.state.clock.updates:06d}.json"
    )
    write_atomically(run.folder / name, json.dumps(describe_environment(), indent=1) + "\n")


def _open_sinks(run: _Run, clock: Clock, *, is_resumed: bool, evaluates_again: bool) -> tuple[Sink, ...]:
    from_update = clock.updates if is_resumed else None
    spans = [
        PhaseSpan(
            name=phase.name,
            updates=phase.length.maximum or phase.length.minimum,
            description=", ".join(bucket.shape_text for bucket in phase.buckets),
            relative_cost=phase.buckets[0].pixels_per_update,
        )
        for phase in run.plan.phases
    ]
    sinks: list[Sink] = [
        JsonlSink(
            run.folder / "metrics.jsonl", resume_from_update=from_update, evaluates_again=evaluates_again
        ),
        ConsoleSink(run.console, phases=spans, first_update=clock.updates),
    ]
    if run.config.report.tensorboard:
        from aiprod_ds.metrics.tensorboard import TensorBoardSink  # an extra; not everybody has it

        sinks.append(
            MirrorSink(
                TensorBoardSink(run.folder / "tensorboard", resume_from_update=from_update),
                name="tensorboard",
            )
        )
    wandb = open_wandb(
        run.config.report.wandb, folder=run.folder, run_config=run.config.model_dump(mode="json")
    )
    return (*sinks, wandb) if wandb is not None else tuple(sinks)
