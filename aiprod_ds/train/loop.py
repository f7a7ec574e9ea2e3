"""THE training loop: phases, updates, evaluation, metrics and saving, the same for every trainer.

Owns the order of things and the clock. What is trained comes from a `Unit`, how from an `Engine`, when phases
end from the `CurriculumScheduler`. Everything that depends on time is a function of the clock, so a resumed
run repeats an uninterrupted one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.clock import Clock
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Decision
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine, UpdateResult
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.optim.adaptive_clip import AdaptiveClip
from aiprod_ds.optim.ema import Ema, evaluated_weights
from aiprod_ds.report.environment import device_peak_bytes, reset_device_peak, rss_bytes
from aiprod_ds.report.summary import RunStatus
from aiprod_ds.rng import stream_seed
from aiprod_ds.snapshot import Base
from aiprod_ds.train.interrupts import Interrupt, Interrupts
from aiprod_ds.train.overflow import OverflowWatch
from aiprod_ds.train.phase_change import begin_phase
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.unit import Evaluation, Stream, Unit

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class TrainingLoop:
    """Runs updates until the curriculum is finished or someone asks the run to stop.

    Attributes:
        save: Saves a checkpoint of the given clock, or begins to. Collective.
        saver: What `save` begins goes on in it.
        retrain: Given the phase that ended and the one that begins, replaces `engine`, `ema` and `clip` by
            those of a new trained set. Collective.
        interrupts: What is asked of the run from outside.
        overflows: Judges updates with non-finite gradients.
        recompute_default: Whether phases that do not say recompute activations.
        clock: Where the run stands; replaced, never changed.
        ema: The average of the weights that is evaluated in their place, if the run keeps one.
        clip: Finds the norm to clip each update at, if the run adapts it.
        base: The frozen weights that checkpoints refer to in place of holding them.
    """

    config: RunConfig
    plan: RunPlan
    unit: Unit
    engine: Engine
    scheduler: CurriculumScheduler
    recorder: MetricsRecorder
    stopwatch: Stopwatch
    folder: Path
    save: Callable[[Clock], None]
    saver: Saver
    retrain: Callable[[TrainingLoop, PhasePlan, PhasePlan], None]
    interrupts: Interrupts
    overflows: OverflowWatch
    recompute_default: bool
    clock: Clock
    history: History
    ema: Ema | None = None
    clip: AdaptiveClip | None = None
    base: Base | None = None
    _saved_updates: int = -1
    _phase_left_at: float | None = None

    def run(self) -> RunStatus:
        """Trains from the clock to the end of the curriculum, or until a request to stop, which it has then
        saved for.

        Returns:
            `COMPLETED` or `INTERRUPTED`, the same on all ranks.

        Raises:
            NonFiniteError: If too many updates had a non-finite gradient; see `overflow.py`.
        """
        self._saved_updates = self.clock.updates if self.clock.updates else -1
        _LOG.info("training_begins update=%d", self.clock.updates)
        if not self.history.before:
            self.history.before = dict(self._evaluate("before training", "before").metrics)
        while True:
            phase = self.plan.phases[self.clock.phase]
            action = self._run_phase(phase)
            # An evaluation or a change of engine may last longer than the sender of a signal waits.
            if action is Action.STAY or self._must_stop(at_once=True):
                return RunStatus.INTERRUPTED
            self._finish_phase(phase)
            if action is Action.FINISHED:
                self._finish_save()
                return RunStatus.COMPLETED
            if self._must_stop(at_once=True):
                return RunStatus.INTERRUPTED
            following = self.plan.phases[phase.index + 1]
            if following.adapters != phase.adapters:
                self._finish_save()
                with self.stopwatch.during(Activity.TRANSITION):
                    self.retrain(self, phase, following)
            self.clock = self.clock.at_phase(following.index)

    def _run_phase(self, phase: PhasePlan) -> Action:
        """Returns why the phase ended; `STAY` if it did not and the run is to stop."""
        decision = self.scheduler.decision(self.clock)
        if decision.action is not Action.STAY:  # resumed exactly at the edge
            return decision.action
        _LOG.info("phase_begins name=%s update=%d", phase.name, self.clock.updates)
        with self.stopwatch.during(Activity.TRANSITION):
            reset_device_peak()
            module, default = self.unit.module, self.recompute_default
            begin_phase(self.engine, module, phase, self.clock, recompute_default=default)
            stream = self.unit.open_stream(
                phase, self.clock, rank=self.engine.rank, world_size=self.engine.world_size
            )
        began = self.stopwatch.seconds(Activity.TRAIN) - self.history.phase_seconds.get(phase.name, 0.0)
        try:
            with self.stopwatch.during(Activity.TRAIN):
                decision = self._updates(phase, stream, began, decision)
        finally:
            stream.close()
        if decision.action is Action.STAY:
            return decision.action
        self.history.phase_ends[phase.name] = decision.reason.value
        _LOG.info(
            "phase_ends name=%s update=%d reason=%s", phase.name, self.clock.updates, decision.reason.value
        )
        return decision.action

    def _updates(self, phase: PhasePlan, stream: Stream, began: float, decision: Decision) -> Decision:
        batches = iter(stream)
        must_stop = self._must_stop(at_once=True)  # asked for while the run started or the phase changed
        first = self.clock.updates + 1
        while decision.action is Action.STAY and not must_stop:
            loss = self._update(phase, stream, batches)
            if self.clock.updates == first:  # there are moments now
                self.saver.reserve(self.engine, self.ema, base=self.base)
                first = 0
            decision = self.scheduler.observe(self.clock, loss)
            self.history.phase_updates[phase.name] = self.clock.phase_updates
            self.history.phase_seconds[phase.name] = self.stopwatch.seconds(Activity.TRAIN) - began
            if self.clock.updates % self.config.report.flush_updates == 0:
                self.recorder.flush(dist.reduce_mean)
            if (
                self.clock.updates % self.config.checkpoint.every_updates == 0
                and decision.action is Action.STAY
            ):
                self._save()
            must_stop = decision.action is Action.STAY and self._must_stop()
        self._phase_left_at = time.perf_counter()
        return decision

    def _update(self, phase: PhasePlan, stream: Stream, batches: Iterator[MicroBatch]) -> float | None:
        """Runs one update, advances the clock and returns the reduced loss if the curriculum asked for it."""
        began, waited_before = time.perf_counter(), self.stopwatch.seconds(Activity.DATA_WAIT)
        position = self.clock.phase_position
        bucket = phase.buckets[stream.bucket_at(position)]
        needs_loss = self.scheduler.needs_loss(self.clock)
        rate = phase.learning_rate.at(self.clock.phase_updates)
        self.engine.set_batch(micro_batch_size=bucket.micro_batch_size, accumulation=bucket.accumulation)
        self.engine.set_learning_rate(rate)
        sums: dict[str, Tensor] = {}
        result: UpdateResult | None = None
        clipped: dict[str, float] = {}
        for index in range(bucket.accumulation):
            with self.stopwatch.during(Activity.DATA_WAIT):
                batch = next(batches)
            assert batch.position == position, f"loader at {batch.position}, clock at {position}"
            torch.manual_seed(
                stream_seed(self.config.seed, "module", self.clock.micro_batches + index, self.engine.rank)
            )
            terms = self.unit.loss(self.engine, batch, phase)
            self.engine.backward(terms.total)
            if index == bucket.accumulation - 1:
                clipped = self._set_clip_norm()
            result = self.engine.step()
            for name, value in {**terms.terms, "loss/total": terms.total.detach()}.items():
                sums[name] = sums[name] + value if name in sums else value
        assert result is not None, "the engine's accumulation window differs from the bucket's"
        if self.clip is not None:
            self.clip.observe(result.gradient_norm)
        self._advance(result, bucket, stream.epoch_at(position + 1))
        if not result.applied:
            return None
        means = {name: value / bucket.accumulation for name, value in sums.items()}
        waited = self.stopwatch.seconds(Activity.DATA_WAIT) - waited_before
        times = {"time/update_seconds": time.perf_counter() - began, "time/data_wait_seconds": waited}
        if self._phase_left_at is not None:
            times["time/phase_change_seconds"] = began - self._phase_left_at
            self._phase_left_at = None
        self._record({**means, **clipped}, result, bucket, rate=rate, times=times)
        return float(dist.reduce_mean(means["loss/total"])) if needs_loss else None

    def _set_clip_norm(self) -> dict[str, float]:
        """Sets the limit of the update whose last gradient is being computed, and returns it as a metric."""
        limit = None if self.clip is None else self.clip.limit()
        if limit is None:
            return {}
        self.engine.set_clip_norm(limit)
        return {"gradient/clip_norm": limit}

    def _advance(self, result: UpdateResult, bucket: BucketPlan, epoch: int) -> None:
        if result.applied:
            before = self.clock.samples
            samples = bucket.global_batch_size
            self.clock = self.clock.after_update(
                micro_batches=bucket.accumulation, samples=samples, epoch=epoch
            )
            if self.ema is not None:
                self.ema.update(samples_before=before, samples_after=self.clock.samples)
        else:
            self.clock = self.clock.after_skip(micro_batches=bucket.accumulation, epoch=epoch)
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
    ) -> None:
        clock = self.clock
        values: dict[str, float | Tensor] = {
            **means,
            "gradient/norm": result.gradient_norm,
            "gradient/loss_scale": result.loss_scale,
            "learning_rate": rate,
            **times,
            "throughput/clips_per_second": bucket.global_batch_size
            / times["time/update_seconds"]
            / self.engine.world_size,
            "memory/rss_bytes": rss_bytes(),
            **(
                {"memory/device_peak_bytes": device_peak_bytes()} if self.engine.device.type == "cuda" else {}
            ),
            "clock/phase": clock.phase,
            "clock/epoch": clock.epoch,
            "clock/samples": clock.samples,
            "clock/skipped_updates": clock.skipped_updates,
        }
        self.recorder.record(clock.updates, values)

    def _finish_phase(self, phase: PhasePlan) -> None:
        self.recorder.flush(dist.reduce_mean)
        if phase.name not in self.history.phase_metrics:
            found = self._evaluate(f"after phase {phase.name}", f"phase_{phase.index + 1}_{phase.name}")
            self.history.phase_metrics[phase.name] = dict(found.metrics)
            self._saved_updates = -1  # a request at the edge may have saved without them
        self._save()

    def _evaluate(self, title: str, picture: str) -> Evaluation:
        with self.stopwatch.during(Activity.EVALUATION):
            self.engine.eval()
            with evaluated_weights(self.ema):
                found = self.unit.evaluate(self.engine)
            self.engine.train()
            if dist.is_main():
                measures = {f"evaluation/{name}": value for name, value in found.metrics.items()}
                self.recorder.log_now(self.clock.updates, measures)
                if found.examples is not None:
                    samples = self.folder / "samples"
                    samples.mkdir(parents=True, exist_ok=True)
                    found.examples.save(samples, picture, title=f"{title}: {found.headline}")
        return found

    def _must_stop(self, *, at_once: bool = False) -> bool:
        """Does what is asked of the run between two updates and returns whether it is to end."""
        request = self.interrupts.agreed(at_once=at_once)
        with self.stopwatch.during(Activity.CHECKPOINT):
            self.saver.advance(self.interrupts.finished_by_all)
        if request is not Interrupt.NONE:
            self._save()
            self._finish_save()
            self.interrupts.done(request)
            _LOG.warning("request_done name=%s update=%d", request.name, self.clock.updates)
        return request is Interrupt.STOP

    def _finish_save(self) -> None:
        with self.stopwatch.during(Activity.CHECKPOINT):
            self.saver.finish()

    def _save(self) -> None:
        if self.clock.updates == self._saved_updates:
            return
        self.recorder.flush(dist.reduce_mean)
        with self.stopwatch.during(Activity.CHECKPOINT):
            self.save(self.clock)
        self._saved_updates = self.clock.updates
