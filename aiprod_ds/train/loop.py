"""THE training loop: phases, updates, evaluation, metrics and saving, the same for every trainer.

Owns the order of things inside a phase, and the clock. What is trained comes from a `Unit`, how from an
`Engine`, when phases end from the `CurriculumScheduler`, which stage follows which from `stages.py`, and the
change from one phase to the next is `phase_change.py`. Everything that depends on time is a function of the
clock, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Decision
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import UpdateResult
from aiprod_ds.errors import DivergenceError, HangError
from aiprod_ds.metrics.evaluations import Reason
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.report.environment import device_peak_bytes, rss_bytes
from aiprod_ds.report.summary import RunStatus
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.evaluating import Evaluator
from aiprod_ds.train.interrupts import Interrupt, Interrupts
from aiprod_ds.train.overflow import OverflowWatch
from aiprod_ds.train.phase_change import Entered, RunParts, change_phase, enter_phase
from aiprod_ds.train.replicas.check import ReplicaCheck
from aiprod_ds.train.replicas.verdict import Divergence
from aiprod_ds.train.resume.data_faults import DataFaults
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.spikes.detector import LOSS, Made, SpikeWatch
from aiprod_ds.train.spikes.rollbacks import Rollbacks
from aiprod_ds.train.stages import ENDS, Change, Event, Saved, Stage, Staging, after_change, next_stage
from aiprod_ds.train.state import TrainState
from aiprod_ds.train.throughput import throughput
from aiprod_ds.train.unit import ClipWork, Evaluation, NamedStream, Part
from aiprod_ds.train.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class TrainingLoop:
    """Runs updates until the curriculum is finished or someone asks the run to stop.

    Attributes:
        parts: Configuration, plan and unit, which no update changes.
        state: What is trained; a change of phase may fill it anew.
        saver: Saves it, possibly beside training.
        evaluator: Measures it and makes what shows it.
        interrupts: What is asked of the run from outside.
        overflows: Judges updates with non-finite gradients.
        spikes: Finds where training goes wrong; once it has, the run goes back to before that.
        rollbacks: What earlier ones left out of the data.
        replicas: Compares what all ranks hold alike.
        faults: Clips that could not be read, and workers that died.
        watchdog: Ends a run that does not come on.
        layout: How the state is spread over ranks, for checkpoints.
        clock: Where the run stands; replaced, never changed.
        history: What the report will say of the past; saved with every checkpoint.
    """

    parts: RunParts
    state: TrainState
    scheduler: CurriculumScheduler
    recorder: MetricsRecorder
    stopwatch: Stopwatch
    evaluator: Evaluator
    saver: Saver
    interrupts: Interrupts
    overflows: OverflowWatch
    spikes: SpikeWatch
    rollbacks: Rollbacks
    replicas: ReplicaCheck
    faults: DataFaults
    layout: Mapping[str, Any]
    watchdog: Watchdog
    clock: Clock
    history: History
    _saved: Saved = Saved.NO
    _entered: Entered | None = None
    _phase_left_at: float | None = None
    _has_spiked: bool = False
    _work: dict[tuple[int, int], ClipWork | None] = field(default_factory=dict)

    def run(self) -> RunStatus | None:
        """Trains from the clock to the end of the curriculum, or until a request to stop, which it has then
        saved for, or until a spike is found.

        Returns:
            `COMPLETED` or `INTERRUPTED`, the same on all ranks; None if the run is to go back from a spike,
            which the main rank knows.

        Raises:
            NonFiniteError: If too many updates had a non-finite gradient; see `overflow.py`.
            DataError: Once the run has saved, if too many clips could not be read.
            DiskError: Once the run has saved, if the disk takes no more and that is to end it.
            DivergenceError: If a rank holds other bits than the rest; what was saved before stays.
        """
        if self.clock.updates:
            self._saved = after_change(self._saved, Change.RESUMED)
        _LOG.info("training_begins update=%d", self.clock.updates)
        stage = Stage.MEASURE_START
        while stage not in ENDS:
            stage = next_stage(stage, self._do(stage))
        if stage is Stage.INTERRUPTED:
            self.faults.require_few()
            dist.from_main(self.evaluator.disk.require_no_fault)
        if stage is Stage.ROLLED_BACK:
            return None
        return RunStatus.COMPLETED if stage is Stage.COMPLETED else RunStatus.INTERRUPTED

    @property
    def config(self) -> RunConfig:
        """The whole configuration."""
        return self.parts.config

    @property
    def plan(self) -> RunPlan:
        """The phases as they run."""
        return self.parts.resolved.plan

    def clips_at(self, position: int) -> Sequence[str]:
        """Returns the names of the clips of an update of the phase, by its position in the data; empty where
        nobody knows."""
        stream = None if self._entered is None else self._entered.stream
        return stream.clips_at(position) if isinstance(stream, NamedStream) else ()

    def _do(self, stage: Stage) -> Event:
        """Does what `stage` stands for and returns how it ended."""
        if stage is Stage.TRAIN:
            return self._train()
        if stage is Stage.CHANGE_PHASE:
            with self.stopwatch.during(Activity.TRANSITION):
                self._change_phase()
            return Event.DONE
        is_measured = self._measure_start() if stage is Stage.MEASURE_START else self._measure_phase()
        if not is_measured or stage is Stage.MEASURE_PHASE:
            return Event.STOP if self._must_stop(at_once=True) else Event.DONE
        if stage is Stage.MEASURE_LAST:
            self._save()
            self._finish_save()
        return Event.DONE

    def _train(self) -> Event:
        decision = self.scheduler.decision(self.clock)
        if decision.action is Action.STAY:  # else resumed exactly at the edge
            decision = self._train_phase(self.plan.phases[self.clock.phase], decision)
            if decision.action is Action.STAY:
                return Event.SPIKE if self._has_spiked else Event.STOP
        # An evaluation or a change of engine may last longer than the sender of a signal waits.
        if self._must_stop(at_once=True):
            return Event.SPIKE if self._has_spiked else Event.STOP
        return Event.LAST_PHASE_ENDED if decision.action is Action.FINISHED else Event.PHASE_ENDED

    def _train_phase(self, phase: PhasePlan, decision: Decision) -> Decision:
        """Returns why the phase ended; `STAY` if it did not and the run is to stop."""
        if self._entered is None:
            with self.stopwatch.during(Activity.TRANSITION):
                self._entered = enter_phase(
                    self.parts, phase, state=self.state, clock=self.clock, faults=self.faults
                )
        entered = self._entered
        self.spikes.begin_phase(phase.index)
        self.history.note_rate_factor(phase.name, phase.learning_rate.factor, self.clock)
        began = self.stopwatch.seconds(Activity.TRAIN) - self.history.phase_seconds.get(phase.name, 0.0)
        try:
            with self.stopwatch.during(Activity.TRAIN):
                decision = self._updates(entered, began, decision)
        except HangError as error:
            # Of the only rank: nobody waits for it, and the update has changed nothing yet.
            self._save()
            self._finish_save()
            if not error.was_asked:
                raise
            _LOG.warning("left_without_data update=%d reason=%s", self.clock.updates, error)
        finally:
            entered.close()
        if decision.action is not Action.STAY:
            reason = decision.reason.value
            self.history.phase_ends[phase.name] = reason
            _LOG.info("phase_ends name=%s update=%d reason=%s", phase.name, self.clock.updates, reason)
        return decision

    def _updates(self, entered: Entered, began: float, decision: Decision) -> Decision:
        phase, before, staging = entered.phase, self.clock.updates, Staging.DUE
        self.replicas.begin(self.state)
        # Asked for while the run started or the phase changed; or due where a resumed run was stopped.
        must_stop = self._between_updates(at_once=True)
        while decision.action is Action.STAY and not must_stop:
            if self.rollbacks.leaves_out(self.clock):
                decision = self._pass_over(entered)
                continue
            loss = self._update(entered)
            if staging is Staging.DUE and self.clock.updates > before:
                # Only now are there moments, and their size is what the memory for copies depends on.
                self.saver.reserve(self.state)
                staging = Staging.ASKED_FOR
            decision = self.scheduler.observe(self.clock, loss)
            self.history.phase_updates[phase.name] = self.clock.phase_updates
            self.history.phase_seconds[phase.name] = self.stopwatch.seconds(Activity.TRAIN) - began
            if self.clock.updates % self.config.report.flush_updates == 0:
                self.recorder.flush(dist.reduce_mean)
            self._require_alike(self.replicas.look())
            must_stop = decision.action is Action.STAY and self._between_updates()
        self._require_alike(self.replicas.end())
        if decision.action is not Action.STAY:
            # What is wrong with the last updates is found before the next phase begins.
            self.recorder.flush(dist.reduce_mean)
        self._phase_left_at = time.perf_counter()
        return decision

    def _pass_over(self, entered: Entered) -> Decision:
        """Takes the data of an update that is left out from the loader, and counts it as skipped."""
        stream, position = entered.stream, self.clock.phase_position
        bucket = entered.phase.buckets[stream.bucket_at(position)]
        for _ in range(bucket.accumulation):
            with self.stopwatch.during(Activity.DATA_WAIT):
                batch = self.watchdog.await_data(partial(next, entered.batches))
            assert batch.position == position, f"loader at {batch.position}, clock at {position}"
            if batch.unread or batch.restarts:
                self.faults.note(batch)
        epoch = stream.epoch_at(position + 1)
        self.clock = self.clock.after_skip(micro_batches=bucket.accumulation, epoch=epoch)
        _LOG.info("update_left_out phase=%s position=%d", entered.phase.name, position)
        return self.scheduler.observe(self.clock, None)

    def _update(self, entered: Entered) -> float | None:
        """Runs one update, advances the clock and returns the reduced loss if the curriculum asked for it.

        Nobody here looks whether a value is finite: the engine finds a non-finite gradient norm, leaves
        weights and moments as they are and says that the update was not applied; `overflows` judges that.
        """
        began, waited_before = time.perf_counter(), self.stopwatch.seconds(Activity.DATA_WAIT)
        phase, stream, engine = entered.phase, entered.stream, self.state.engine
        position = self.clock.phase_position
        bucket = phase.buckets[stream.bucket_at(position)]
        needs_loss = self.scheduler.needs_loss(self.clock)
        rate = phase.learning_rate.at(self.clock.phase_updates)
        # Between two updates no gradients are held, so this is where another bucket's accumulation may begin.
        engine.set_batch(micro_batch_size=bucket.micro_batch_size, accumulation=bucket.accumulation)
        engine.set_learning_rate(rate)
        self.state.begin_beside(self.clock, phase=phase, bucket=bucket, learning_rate=rate)
        sums: dict[str, Tensor] = {}
        result: UpdateResult | None = None
        clipped: dict[str, float] = {}
        shape = (phase.index, stream.bucket_at(position))
        for index in range(bucket.accumulation):
            with self.stopwatch.during(Activity.DATA_WAIT):
                batch = self.watchdog.await_data(partial(next, entered.batches))
            self.watchdog.begin(shape)
            assert batch.position == position, f"loader at {batch.position}, clock at {position}"
            if batch.unread or batch.restarts:
                self.faults.note(batch)
            if shape not in self._work:
                self._work[shape] = self.parts.unit.clip_work(batch)
            # Dropout inside the module draws from torch's own stream. Seeded by the count of micro-batches it
            # is the same after a resume, and differs between micro-batches and ranks.
            torch.manual_seed(
                stream_seed(self.config.seed, "module", self.clock.micro_batches + index, engine.rank)
            )
            is_last = index == bucket.accumulation - 1
            if entered.graphs is None:
                terms = self.parts.unit.loss(engine, batch, phase)
            else:
                terms = entered.graphs.loss(batch, is_last=is_last)
            engine.backward(terms.total)
            if is_last:
                # Not earlier: the limit needs the norm of the update before, whose copy from the device is
                # done by now, so that nobody waits. Not later: the engine clips inside the step.
                clipped = self._set_clip_norm()
            result = engine.step()
            for name, value in {**terms.terms, "loss/total": terms.total.detach()}.items():
                sums[name] = sums[name] + value if name in sums else value
        assert result is not None, "the engine's accumulation window differs from the bucket's"
        if self.state.clip is not None:
            self.state.clip.observe(result.gradient_norm)
        self._advance(result, bucket, stream.epoch_at(position + 1))
        means = {name: value / bucket.accumulation for name, value in sums.items()}
        made = Made(position=position, update=self.clock.updates, learning_rate=rate)
        if not result.applied:
            self._note_skipped(made, means[LOSS], result)
            return None
        self.spikes.note(made)
        waited = self.stopwatch.seconds(Activity.DATA_WAIT) - waited_before
        times = {"time/update_seconds": time.perf_counter() - began, "time/data_wait_seconds": waited}
        if self._phase_left_at is not None:
            times["time/phase_change_seconds"] = began - self._phase_left_at
            self._phase_left_at = None
        values = {**means, **clipped, **self.state.metrics_beside()}
        self._record(values, result, bucket, rate=rate, times=times, work=self._work[shape])
        return float(dist.reduce_mean(means["loss/total"])) if needs_loss else None

    def _note_skipped(self, made: Made, loss: Tensor, result: UpdateResult) -> None:
        """Judges a skipped update at once: the host has waited for its norm already."""
        reduced = float(dist.reduce_mean(loss))
        is_explained = self.overflows.explains(result.loss_scale) and math.isfinite(reduced)
        self.spikes.note(replace(made, is_applied=False, loss=reduced, is_explained=is_explained))
        self.recorder.flush(dist.reduce_mean)

    def _set_clip_norm(self) -> dict[str, float]:
        """Sets the limit of the update whose last gradient is being computed, and returns it as a metric."""
        limit = None if self.state.clip is None else self.state.clip.limit()
        if limit is None:
            return {}
        self.state.engine.set_clip_norm(limit)
        return {"gradient/clip_norm": limit}

    def _advance(self, result: UpdateResult, bucket: BucketPlan, epoch: int) -> None:
        if result.applied:
            before = self.clock.samples
            samples = bucket.global_batch_size
            self.clock = self.clock.after_update(
                micro_batches=bucket.accumulation, samples=samples, epoch=epoch
            )
            if self.state.ema is not None:
                self.state.ema.update(samples_before=before, samples_after=self.clock.samples)
        else:
            self.clock = self.clock.after_skip(micro_batches=bucket.accumulation, epoch=epoch)
        self.watchdog.update = self.clock.updates
        self._saved = after_change(self._saved, Change.UPDATED if result.applied else Change.SKIPPED)
        self.overflows.observe(
            is_applied=result.applied, loss_scale=result.loss_scale, update=self.clock.updates
        )

    def _record(
        self,
        means: dict[str, Tensor | float],
        result: UpdateResult,
        bucket: BucketPlan,
        *,
        rate: float,
        times: dict[str, float],
        work: ClipWork | None,
    ) -> None:
        clock = self.clock
        values: dict[str, float | Tensor] = {
            **means,
            "gradient/norm": result.gradient_norm,
            "gradient/loss_scale": result.loss_scale,
            "learning_rate": rate,
            **times,
            **throughput(
                work,
                clips=bucket.global_batch_size,
                world_size=self.state.engine.world_size,
                seconds=times["time/update_seconds"],
                peak=self.parts.peak_flops,
            ),
            "memory/rss_bytes": rss_bytes(),
            # Agreed, so that all ranks have the row or none.
            **({"data/replaced_clips": len(self.faults.agreed)} if self.faults.agreed else {}),
            **(
                {"memory/device_peak_bytes": device_peak_bytes()}
                if self.state.engine.device.type == "cuda"
                else {}
            ),
            "clock/phase": clock.phase,
            "clock/epoch": clock.epoch,
            "clock/samples": clock.samples,
            "clock/skipped_updates": clock.skipped_updates,
            **({"clock/rollbacks": behind} if (behind := self.rollbacks.num_behind(clock)) else {}),
        }
        self.recorder.record(clock.updates, values)

    def _change_phase(self) -> None:
        self._entered = change_phase(
            self.parts,
            self._entered,
            state=self.state,
            clock=self.clock,
            history=self.history,
            faults=self.faults,
            save=self._save,
            finish_save=self._finish_save,
        )
        self.clock = self._entered.clock

    def _measure_start(self) -> bool:
        """Returns False if the run is to stop before the evaluation has ended."""
        # Nothing may have been found, of silent clips: a resumed run then does not measure once more.
        is_due = self.clock.updates == 0 and self.evaluator.missing(self.clock) is not Part.NONE
        if is_due and not self.history.before:
            found = self._evaluate(self.evaluator.every_part, "before")
            if found is None:
                return False
            self.history.before = dict(found.metrics)
        return True

    def _measure_phase(self) -> bool:
        """Returns False if the run is to stop before the evaluation has ended."""
        phase = self.plan.phases[self.clock.phase]
        self.recorder.flush(dist.reduce_mean)
        if phase.name not in self.history.phase_metrics:
            found = self._evaluate(self.evaluator.every_part, "phase_end")
            if found is None:
                return False
            self.history.phase_metrics[phase.name] = dict(found.metrics)
            self.evaluator.is_best()  # the end of a phase is saved in any case
            self.interrupts.done(Interrupt.EVALUATE)
        return True

    def _evaluate(self, parts: Part, reason: Reason) -> Evaluation | None:
        """Returns None if the run is to stop before the evaluation has ended."""
        if self.config.checkpoint.keep_best is not None:
            self._finish_save()  # whether the best is saved decides what the next has to be better than
        found = self.evaluator.make(parts, reason, state=self.state, clock=self.clock)
        if found is not None:
            self._saved = after_change(self._saved, Change.MEASURED)
        return found

    def _evaluate_inside(self, parts: Part, reason: Reason) -> bool:
        """Evaluates, saves what is the best so far, and returns whether that came to its end."""
        if parts is Part.NONE:
            return True
        found = self._evaluate(parts, reason)
        if found is not None and found.metrics and self.evaluator.is_best():
            self._save()
        return found is not None

    def _between_updates(self, *, at_once: bool = False) -> bool:
        """Evaluates and saves where it is time for that, does what is asked, and returns whether the run is
        to end."""
        due = self.evaluator.due(self.clock)
        self._evaluate_inside(due, "interval")
        # After the evaluation, whose measures belong to the checkpoint.
        if self.clock.updates and self.clock.updates % self.config.checkpoint.every_updates == 0:
            self._save()
        # An evaluation may last longer than the sender of a signal waits.
        return self._must_stop(at_once=at_once or due is not Part.NONE, may_evaluate=True)

    def _must_stop(self, *, at_once: bool = False, may_evaluate: bool = False) -> bool:
        """Does what is asked of the run between two updates and returns whether it is to end."""
        interrupt = self.interrupts.agreed(at_once=at_once)
        with self.stopwatch.during(Activity.CHECKPOINT):
            self.saver.advance(self.interrupts.finished_by_all)
        if interrupt is Interrupt.EVALUATE:
            if not may_evaluate:  # the end of the phase, or its beginning, is near enough
                return False
            if not self._evaluate_inside(self.evaluator.missing(self.clock), "asked"):
                return self._must_stop(at_once=True)
        elif interrupt is Interrupt.NONE and self.interrupts.has_any_spiked:
            self._has_spiked = True
            self.interrupts.finish()
            self._finish_save()
            return True
        elif interrupt is not Interrupt.NONE:
            self._agree_on_faults()
            self._save()
            self._finish_save()
        if interrupt is not Interrupt.NONE:
            self.interrupts.done(interrupt)
            _LOG.warning("request_done name=%s update=%d", interrupt.name, self.clock.updates)
        return interrupt is Interrupt.STOP

    def _finish_save(self) -> None:
        with self.stopwatch.during(Activity.CHECKPOINT):
            self.saver.finish()

    def _save(self) -> None:
        if self._saved is Saved.YES:
            return
        self.recorder.flush(dist.reduce_mean)
        with self.stopwatch.during(Activity.CHECKPOINT):
            self._require_alike(self.replicas.look_at_all(self.state))
            self._agree_on_faults()
            self.saver.save(self.state, self._run_state())
        self._saved = after_change(self._saved, Change.SAVED)

    def _require_alike(self, found: Divergence | None) -> None:
        if found is not None:
            self._finish_save()  # of what was alike when it began
            names = dist.from_main(self.saver.store.names)
            last = names[0] if names else None
            raise DivergenceError(found.message(update=self.clock.updates, checkpoint=last))

    def _agree_on_faults(self) -> None:
        """Makes the clips that a rank could not read those of all ranks, from this checkpoint on."""
        has_grown = self.faults.merge()
        self.history.worker_restarts = self.faults.worker_restarts
        if has_grown:
            self._saved = after_change(self._saved, Change.FAULTS_FOUND)
            if self._entered is not None:
                self._entered.stream.leave_out(self.faults.agreed)

    def _streams(self) -> dict[str, Any]:
        """Returns where the data of the phase stands on every rank, if the clock alone does not say it."""
        entered = self._entered
        if entered is None or entered.phase.index != self.clock.phase:
            return dict(self.state.streams)  # of the checkpoint that the run stands at
        own = entered.stream.state_at(self.clock.phase_position)
        return {"ranks": dist.gather_objects(own)} if own else {}

    def _run_state(self) -> RunState:
        clip = self.state.clip
        return RunState(
            clock=self.clock,
            scheduler=self.scheduler.state_dict(),
            fingerprint=config_fingerprint(self.config),
            phase_fingerprints=phase_fingerprints(self.config),
            layout=dict(self.layout),
            history=self.history.to_dict(),
            adaptive_clip={} if clip is None else clip.to_dict(),
            streams=self._streams(),
            replaced_clips=dict(self.faults.agreed),
            spikes={
                "rollbacks": self.rollbacks.to_list(),
                "watch": self.spikes.to_dict(),
                "is_doubtful": self.spikes.is_doubtful,
            },
        )
