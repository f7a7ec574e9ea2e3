"""One run from a prepared trainer to its report: resume, unit, engine, loop, export.

The same for every trainer. The order is: lock the folder, find the checkpoint, resolve what the run really
runs with, build the unit for that, and only then write. All checks that can fail stand before the first
write; only the main rank writes, except that every rank writes its part of a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from aiprod_ds.bad_disk import DiskWatch, disk_required
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import DeepSpeedSettings, read_settings
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.curriculum.scheduler import CurriculumScheduler
from aiprod_ds.data.clip_list import ClipList
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.metrics.sinks import Sink
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.optim.ema import evaluated_weights
from aiprod_ds.report.console import print_summary
from aiprod_ds.report.output import open_console
from aiprod_ds.report.summary import RunStatus, RunSummary
from aiprod_ds.train.evaluating import Evaluator
from aiprod_ds.train.interrupts import Interrupts, SignalWatch
from aiprod_ds.train.kept_media import drop_later_evaluations
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.train.overflow import OverflowWatch
from aiprod_ds.train.performance import choose_performance
from aiprod_ds.train.phase_change import RunParts, check_recompute
from aiprod_ds.train.planning.auto import ChooseRecompute, Search, resolve, this_machine
from aiprod_ds.train.planning.capacity import RequireCapacity
from aiprod_ds.train.replicas.check import ReplicaCheck
from aiprod_ds.train.reporting import (
    RunFacts,
    page_of,
    report_completed,
    report_ended,
    report_interrupted,
    report_started,
)
from aiprod_ds.train.resume.compatibility import (
    change_in_words,
    check_clock,
    check_compatible,
    require_all,
    run_layout,
)
from aiprod_ds.train.resume.data_change import CLIPS, compare, require_same_data, with_selection
from aiprod_ds.train.resume.data_faults import DataFaults
from aiprod_ds.train.resume.engine_files import read_engine
from aiprod_ds.train.resume.folder_lock import LOCK, FolderLock
from aiprod_ds.train.resume.frozen_base import base_of_phase, start_in_words
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.resume.shared_folder import require_shared
from aiprod_ds.train.run_folder import open_sinks, prepare_folder
from aiprod_ds.train.spikes.detector import SpikeWatch
from aiprod_ds.train.spikes.going_back import Rules, WayBack, adopt, decide, find_way
from aiprod_ds.train.spikes.rollbacks import Rollbacks
from aiprod_ds.train.state import TrainState, new_clip, new_ema
from aiprod_ds.train.throughput import peak_flops
from aiprod_ds.train.unit import Companion, Evaluation, EvaluationRequest, Part, Unit, UnitWithCompanion
from aiprod_ds.train.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a trainer brings to a run; no engine and no weights yet.

    Attributes:
        config: The whole configuration; `output_dir` is the run folder.
        plan: The curriculum for this world size, with the lengths that its epochs have on the data.
        build_unit: Builds the model and all that the loop trains, for the plan as it will run.
        search_now: What `engine.parallel: auto` asks.
        choose_recompute: What `performance.recompute` asks.
        require_capacity: Refuses what does not fit the GPUs.
        source: How messages name the configuration.
        clips: Returns the list of the clips that it trains on and holds out; the main rank asks, as often as
            it likes.
        unread_clips: Returns which of some training clips, by name, cannot be read to their end.
        can_begin_anew: Whether `build_unit` gives the same each time, whatever was trained before.
    """

    config: RunConfig
    plan: RunPlan
    build_unit: Callable[[RunPlan], Unit]
    search_now: Search
    choose_recompute: ChooseRecompute
    require_capacity: RequireCapacity
    source: str
    clips: Callable[[], ClipList]
    unread_clips: Callable[[Collection[str]], frozenset[str]]
    can_begin_anew: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """Where a run goes on: at its beginning, or where its checkpoint stands."""

    clock: Clock
    scheduler: CurriculumScheduler
    history: History
    faults: DataFaults
    spikes: SpikeWatch
    is_resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """What stays the same wherever a run of this process goes back to.

    Attributes:
        started_from: The checkpoint that the process went on from; None if it began the run.
        can_begin_anew: As `Prepared` has it.
    """

    started_from: Checkpoint | None
    can_begin_anew: bool
    watch: SignalWatch
    watchdog: Watchdog
    stopwatch: Stopwatch
    console: Console


def run_training(
    prepared: Prepared, *, resume: str, accept_changed_data: bool = False, console: Console | None = None
) -> RunSummary:
    """Trains a unit through its plan and writes the run folder, or saves and returns earlier if asked to
    (`interrupts.py`).

    Args:
        prepared: By a trainer.
        resume: `auto`, `never` or the path of a checkpoint folder.
        accept_changed_data: Whether the run may go on with other data than it had.
        console: Where progress is drawn (main rank); standard error by default.

    Raises:
        ConfigError: If the checkpoint belongs to another configuration or precision, to other global
            batches, or to other data.
        CheckpointError: If another run is in the folder, checkpoints exist and none is whole, the ranks share
            no folder, or a checkpoint cannot be written.
        NonFiniteError: If training diverged for good.
        SpikeError: If it went wrong more often than it may go back.
        DiskError: If the disk takes no run folder; or, with `report.on_full_disk: stop`, anything later; or
            no export and no report at the end.
        HangError: If the data of the only rank did not come; it has saved.
        DivergenceError: If a rank holds other bits than the rest; what was saved before stays.
    """
    config, source = prepared.config, prepared.source
    with FolderLock(Path(config.output_dir)) as lock:
        dist.from_main(lambda: _take(lock, config))  # before the newest checkpoint is looked for
        way = _find_way(config, resume)
        checkpoint = way.checkpoint
        facts = _resolved(prepared, checkpoint, accept_changed_data=accept_changed_data, trains=True)
        settings = facts.parts.resolved.settings
        default = settings.activation_checkpointing
        check_recompute(facts.unit.module, facts.plan, default=default, source=source)
        is_anew, is_resumed_at = resume == "never", None if checkpoint is None else checkpoint.state.clock
        dist.from_main(
            lambda: prepare_folder(config, facts.plan, lock, resumed_at=is_resumed_at, move_aside=is_anew)
        )
        require_shared(facts.folder)
        if not dist.is_main():
            lock.share()
        sampled = facts.unit.num_sampled_shapes()
        active = facts.parts.performance.active(facts.plan, num_sampled_shapes=sampled)
        with SignalWatch() as watch, _new_watchdog(facts, watch) as watchdog, active:
            dist.when_a_rank_is_lost(watchdog.note_lost_rank)
            around = _Surroundings(
                started_from=checkpoint,
                can_begin_anew=prepared.can_begin_anew,
                watch=watch,
                watchdog=watchdog,
                stopwatch=Stopwatch(on_switch=watchdog.enter),
                console=console or open_console(stderr=True),
            )
            try:
                dist.from_main(lambda: adopt(facts.folder, way))
                outcome = _train(facts, way, around, goes_back=False)
                while isinstance(outcome, WayBack):
                    # As a new process does: what is trained there is built differently, or anew.
                    del facts
                    facts = _resolved(prepared, outcome.checkpoint, accept_changed_data=True, trains=True)
                    outcome = _train(facts, outcome, around, goes_back=True)
                return outcome
            finally:
                dist.when_a_rank_is_lost(None)


def evaluate_checkpoint(prepared: Prepared, *, resume: str) -> Evaluation:
    """Returns the held-out measures of a checkpoint, and of which clips; writes nothing.

    Raises:
        CheckpointError: If there is none, or it belongs to another run.
    """
    checkpoint = _find_way(prepared.config, resume).checkpoint
    facts = _resolved(prepared, checkpoint, accept_changed_data=True, trains=False)
    if facts.data_change is not None:
        _LOG.warning("data_changed %s", facts.data_change)
    if checkpoint is None:
        raise CheckpointError(
            f"{facts.folder}: must hold a checkpoint to evaluate, got none. Train first, or name another "
            "--output-dir."
        )
    engine = _build_engine(facts, facts.plan.phases[checkpoint.state.clock.phase])
    try:
        ema = new_ema(engine, facts.config)
        read_engine(checkpoint.engine_folder, engine, ema, origin=start_in_words(facts.config))
        engine.eval()
        with evaluated_weights(ema), facts.parts.performance.active(facts.plan):
            request = EvaluationRequest(parts=Part.MEASURES)
            return facts.unit.evaluate(engine, request)
    finally:
        engine.close()


def _resolved(
    prepared: Prepared, checkpoint: Checkpoint | None, *, accept_changed_data: bool, trains: bool
) -> RunFacts:
    """Returns the run as it will run, after checking that the checkpoint is of it. Collective.

    The plan is resolved before the unit is built, so that unit, engine and loop have the same one; what a
    checkpoint was resolved to is kept.
    """
    config, source = prepared.config, prepared.source
    saved = None if checkpoint is None else checkpoint.state.layout
    settings = read_settings(config, source=source)
    resolved = resolve(
        config, prepared.plan, settings, saved=saved, search_now=prepared.search_now, source=source
    )
    resolved, recompute_reasons = prepared.choose_recompute(resolved) if trains else (resolved, ())
    layout = run_layout(config, resolved, world_size=dist.world_size())
    data = dist.from_main(lambda: compare(None if checkpoint is None else checkpoint.folder, prepared.clips))
    if checkpoint is not None:
        where = f"{source}: --resume {checkpoint.folder}"
        as_saved = with_selection(config, data.selection)
        # Shapes and batches may follow from the data, so both are told.
        require_all(
            lambda: require_same_data(data, accepted=accept_changed_data, where=where),
            lambda: check_compatible(checkpoint.state, as_saved, layout, where=where),
        )
        check_clock(checkpoint.state.clock, resolved.plan, where=where)
    if trains:
        prepared.require_capacity(resolved, None if checkpoint is None else checkpoint.state.clock)
    unit = prepared.build_unit(resolved.plan)
    # Counted here because an engine may shard them.
    parameters = sum(parameter.numel() for parameter in unit.module.parameters())
    machine = this_machine()
    performance = choose_performance(
        config.performance,
        unit.module,
        capability=None if machine is None else machine.compute_capability,
        settings=resolved.settings,
        is_flat=config.engine.flat_parameters != "off",
        can_capture=unit.can_capture,
        where=source,
    )
    performance = replace(performance, reasons=(*performance.reasons, *recompute_reasons))
    for reason in performance.reasons:
        _LOG.info("performance %s", reason)
    parts = RunParts(
        config=config,
        resolved=resolved,
        unit=unit,
        performance=performance,
        peak_flops=peak_flops(machine, resolved.settings.precision),
    )
    return RunFacts(
        parts=parts,
        parameters=parameters,
        layout=layout,
        clips=prepared.clips,
        unread_clips=prepared.unread_clips,
        data_change=data.change,
        disk=DiskWatch(Path(config.output_dir), rule=config.report.on_full_disk, marker=LOCK),
    )


def _build_engine(facts: RunFacts, phase: PhasePlan) -> Engine:
    """Returns an engine that trains what `phase` trains."""
    facts.unit.prepare(phase)
    return facts.parts.build_engine()


def _new_watchdog(facts: RunFacts, watch: SignalWatch) -> Watchdog:
    return Watchdog(
        facts.folder,
        least_seconds=facts.config.engine.hang_seconds,
        stops=watch,
        rank=dist.rank(),
        world_size=dist.world_size(),
        store=dist.connect_to_store,
    )


def _train(facts: RunFacts, way: WayBack, around: _Surroundings, *, goes_back: bool) -> RunSummary | WayBack:
    """Trains from a checkpoint on, and again from an earlier one after a spike.

    Args:
        facts: With the unit as it is before training.
        way: What to go on from, and what to leave out.
        around: Of this process.
        goes_back: Whether a spike leads here.

    Returns:
        The summary; or the way back where it leads to a phase that trains other parameters, or to the
        beginning.
    """
    config, first = facts.config, _phase_at(way.checkpoint)
    companion = _open_companion(facts)
    try:
        engine = _build_engine(facts, facts.plan.phases[first])
    except BaseException:
        _close(companion)
        raise
    state = TrainState(
        engine=engine, ema=new_ema(engine, config), clip=new_clip(config), base=None, companion=companion
    )
    saver: Saver | None = None
    try:
        while True:
            standing = _restore(facts, state, way, goes_back=goes_back)
            saver = _new_saver(facts, standing.history)
            around.watchdog.update = standing.clock.updates
            loop = _new_loop(facts, state, standing, saver, way.rollbacks, around)
            report_started(facts, way.rollbacks, standing.history)
            outcome = _run(facts, loop, around)
            if isinstance(outcome, RunSummary):
                return outcome
            way, goes_back = outcome, True
            around.stopwatch.switch(Activity.START)
            saver.close()
            saver = None
            if way.builds_anew:
                return way
    finally:
        try:
            if saver is not None:
                saver.close()
        finally:
            state.engine.close()  # not `engine`: a change of phase may have built another
            _close(companion)


def _open_companion(facts: RunFacts) -> Companion | None:
    unit, settings = facts.unit, facts.parts.resolved.settings
    return unit.open_companion(settings) if isinstance(unit, UnitWithCompanion) else None


def _close(companion: Companion | None) -> None:
    if companion is not None:
        companion.close()


def _phase_at(checkpoint: Checkpoint | None) -> int:
    return 0 if checkpoint is None else checkpoint.state.clock.phase


def _restore(facts: RunFacts, state: TrainState, way: WayBack, *, goes_back: bool) -> _Standing:
    """Puts `state` where the checkpoint stands, if there is one. Collective.

    Args:
        facts: Of the run.
        state: As it was made; or where it goes back, as training left it.
        way: With the checkpoint.
        goes_back: Whether this process was further already.
    """
    checkpoint, spikes = way.checkpoint, _new_spikes(facts.config)
    config, scheduler, history, clock = facts.config, CurriculumScheduler(facts.plan), History(), Clock()
    origin = start_in_words(config)
    if checkpoint is not None:
        saved = checkpoint.state
        state.base = read_engine(
            checkpoint.engine_folder, state.engine, state.ema, companion=state.companion, origin=origin
        ).base
        if state.clip is not None:
            state.clip.restore(saved.adaptive_clip)
            state.engine.set_clip_norm(config.optimizer.gradient_clip_norm)
        state.streams = saved.streams
        clock, history = saved.clock, History.from_dict(saved.history)
        scheduler.load_state_dict(saved.scheduler)
        spikes.restore(saved.spikes.get("watch", {}))
        if facts.data_change is not None:
            spikes.forget()
        if not goes_back:
            _note_resume(history, checkpoint, facts)
    if state.base is None or config.checkpoint.self_contained:
        # What was restored may have been trained before: starting the run anew does not give it.
        is_stored, phase = checkpoint is not None, facts.plan.phases[clock.phase]
        state.base = base_of_phase(state.engine, phase, config, origin=origin, is_stored=is_stored)
    return _Standing(
        clock=clock,
        scheduler=scheduler,
        history=history,
        faults=_faults(facts, checkpoint, history),
        spikes=spikes,
        is_resumed=checkpoint is not None,
    )


def _new_spikes(config: RunConfig) -> SpikeWatch:
    return SpikeWatch(config=config.spikes, is_on=dist.is_main() and config.spikes.mode != "off")


def _faults(facts: RunFacts, checkpoint: Checkpoint | None, history: History) -> DataFaults:
    """Returns what the checkpoint knows of bad clips; with data that was changed since, it begins anew.

    Where they are too many to go on, they are tried again first: the run stopped for that, and a disk may be
    back. Collective.
    """
    is_same_data = facts.data_change is None
    faults = DataFaults(
        num_clips=facts.unit.data_summary().clips or 0,  # of an iterable none is replaced
        max_fraction=facts.config.data.max_unreadable_fraction,
        agreed=dict(checkpoint.state.replaced_clips) if checkpoint is not None and is_same_data else {},
        worker_restarts=history.worker_restarts,
    )
    if faults.are_too_many:
        known = faults.agreed
        unread = dist.from_main(lambda: facts.unread_clips(known))
        faults.agreed = {name: reason for name, reason in known.items() if name in unread}
        _LOG.warning("clips_tried_again clips=%d unreadable=%d", len(known), len(unread))
    return faults


def _note_resume(history: History, checkpoint: Checkpoint, facts: RunFacts) -> None:
    name, change = checkpoint.folder.name, change_in_words(checkpoint.state.layout, facts.layout)
    clock = checkpoint.state.clock
    history.resumed_from.append(name)
    _LOG.info("resumed checkpoint=%s update=%d phase=%d", name, clock.updates, clock.phase)
    if change is not None:
        history.resharded.append(f"{name}: {change}")
        _LOG.info("resharded checkpoint=%s %s", name, change)
    if facts.data_change is not None:
        history.accepted_data.append(f"{name}: {facts.data_change}")
        _LOG.warning("data_changed checkpoint=%s %s", name, facts.data_change)


def _new_saver(facts: RunFacts, history: History) -> Saver:
    files: dict[str, bytes] = {}
    dist.from_main(lambda: files.update({CLIPS: facts.clips().compressed}))
    return Saver(
        store=CheckpointStore(facts.folder / "checkpoints"),
        config=facts.config.checkpoint,
        phase_names=tuple(phase.name for phase in facts.plan.phases),
        require_folder=facts.disk.require_folder,
        on_replaced=history.note_replacement,
        beside=files,
    )


def _new_loop(
    facts: RunFacts,
    state: TrainState,
    standing: _Standing,
    saver: Saver,
    rollbacks: Rollbacks,
    around: _Surroundings,
) -> TrainingLoop:
    config, plan, clock, history = facts.config, facts.plan, standing.clock, standing.history
    # A stop saves before an evaluation of the same update that it has cut short or left out.
    is_measured = history.measured.get("updates") == clock.updates
    phase_is_measured = plan.phases[clock.phase].name in history.phase_metrics
    evaluates_again = clock.phase_updates > 0 and not is_measured and not phase_is_measured
    resumed = {"is_resumed": standing.is_resumed, "evaluates_again": evaluates_again}
    disk, sinks = facts.disk, list[Sink]()

    def begin_files() -> None:
        with disk_required(facts.folder, "the files of a run"):
            last = max((made["updates"] for made in history.evaluated.values()), default=None)
            drop_later_evaluations(facts.folder, count=history.evaluations, last_update=last)
            sinks.extend(open_sinks(config, plan, around.console, clock, disk=disk, **resumed))

    dist.from_main(begin_files)
    engine, stopwatch, spikes = state.engine, around.stopwatch, standing.spikes
    recorder = MetricsRecorder(
        device=engine.device, world_size=engine.world_size, sinks=sinks, on_flush=spikes.read
    )
    faults = standing.faults
    interrupts = Interrupts(
        around.watch,
        facts.folder,
        finished=lambda: saver.finished,
        wants_stop=lambda: faults.are_too_many or disk.wants_stop,
        has_spiked=lambda: spikes.found is not None,
    )
    evaluator = Evaluator(
        config=config,
        plan=plan,
        unit=facts.unit,
        folder=facts.folder,
        recorder=recorder,
        stopwatch=stopwatch,
        interrupts=interrupts,
        history=history,
        disk=disk,
    )
    saver.on_not_saved = evaluator.note_not_saved
    return TrainingLoop(
        parts=facts.parts,
        state=state,
        scheduler=standing.scheduler,
        recorder=recorder,
        stopwatch=stopwatch,
        evaluator=evaluator,
        saver=saver,
        interrupts=interrupts,
        replicas=ReplicaCheck(is_on=config.engine.compare_ranks),
        overflows=OverflowWatch(lowest_scale=_lowest_scale(facts.parts.resolved.settings)),
        spikes=spikes,
        rollbacks=rollbacks,
        faults=faults,
        layout=facts.layout,
        watchdog=around.watchdog,
        clock=clock,
        history=history,
    )


def _run(facts: RunFacts, loop: TrainingLoop, around: _Surroundings) -> RunSummary | WayBack:
    try:
        status = loop.run()
        way = None if status is not None else _decide(facts, loop, around)
    except BaseException as error:
        _close_files(loop)
        _report_ended(facts, loop, error)
        raise
    _close_files(loop)
    if way is not None:
        return way
    if status is RunStatus.COMPLETED:
        summary = report_completed(facts, loop)
    else:
        summary = report_interrupted(facts, loop)
    if dist.is_main():
        with suppress(OSError):  # standard error may be a file, on a disk that is full
            print_summary(around.console, summary, report=page_of(facts.folder))
    return summary


def _close_files(loop: TrainingLoop) -> None:
    loop.recorder.close()
    loop.evaluator.close()


def _take(lock: FolderLock, config: RunConfig) -> None:
    with disk_required(Path(config.output_dir), "the lock of a run"):
        lock.take_if_used()


def _lowest_scale(settings: DeepSpeedSettings) -> float | None:
    scale = settings.loss_scale
    return None if scale is None or scale.loss_scale else float(scale.min_loss_scale)


def _report_ended(facts: RunFacts, loop: TrainingLoop, error: BaseException) -> None:
    try:
        report_ended(facts, loop, error)
    except Exception:  # noqa: BLE001  the report must not hide what ended the run
        _LOG.exception("report_failed folder=%s", facts.folder)


def _decide(facts: RunFacts, loop: TrainingLoop, around: _Surroundings) -> WayBack:
    """Returns the way back from the spike that the loop has found, the same on all ranks. Collective."""
    rules = Rules(
        folder=facts.folder,
        config=facts.config,
        plan=facts.plan,
        started_from=around.started_from,
        can_begin_anew=around.can_begin_anew,
        clips_at=loop.clips_at,
    )

    def decided() -> WayBack:
        assert loop.spikes.found is not None, "the main rank has voted for it"
        return decide(loop.spikes.found, loop.rollbacks, rules)

    return dist.from_main(decided)


def _find_way(config: RunConfig, resume: str) -> WayBack:
    """Returns the verified checkpoint to go on from, and what is left out on the way, the same on all
    ranks."""
    return dist.from_main(lambda: find_way(Path(config.output_dir), resume))
