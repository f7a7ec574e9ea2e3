"""What does the pure-Python part of an update cost: the scheduler's decision, the learning rate and the order
of samples?

One update asks the scheduler (in a phase with a plateau, the dearest kind) and the learning rate's schedule,
then the sampler for bucket, pass and samples, cut into the micro-batches of one rank as the loader does. No
model, no decoding, no engine, and the clock is made beforehand. It is processor time of one thread, so that
other work on the machine counts little:

    python benchmarks/scheduling.py --output benchmarks/results/NAME.json

It does not show the first update of a pass, which makes the permutation of its samples and has a row of its
own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from result_file import figure, write_result

from aiprod_ds.clock import Clock
from aiprod_ds.config.phase import PlateauConfig
from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.phase import BucketPlan, PhaseEnd, RunPlan, UpdateRange
from aiprod_ds.curriculum.scheduler import CurriculumScheduler
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler, rank_slice
from aiprod_ds.testing.plans import phase_plan

_BATCHES = (8, 64, 256)
_MICRO_BATCH = 8
_CLIPS = 100_000
_SHARES = (0.2, 0.5, 0.3)
_LIMIT = 10**9
_WARM_UP = 100
_GOAL_MICROSECONDS = 50.0

Update = Callable[[int], object]


def main() -> None:
    """Measures every part and the whole at each batch size and writes one result file."""
    parser = argparse.ArgumentParser(description="The pure-Python part of an update.")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for batch in _BATCHES:
        for mix, shares in (
            ("one bucket", (None,)),
            ("three buckets by fit", (None,) * 3),
            ("three buckets by share", _SHARES),
        ):
            case = f"global batch {batch}, {mix}"
            for metric, goal, make in _parts(batch, shares, arguments.updates):
                runs = [_microseconds(make(), arguments.updates) for _ in range(arguments.runs)]
                rows.append(figure(case, metric, "us", runs, goal=goal))
            rows.append(
                figure(
                    case,
                    f"first batch of a pass over {_CLIPS} clips",
                    "us",
                    _first_batches(batch, shares, arguments.runs),
                )
            )
    write_result(arguments.output, "scheduling", rows)


def _parts(
    batch: int, shares: tuple[float | None, ...], updates: int
) -> list[tuple[str, float | None, Callable[[], Update]]]:
    def schedule() -> Update:
        return _schedule_update(batch, _WARM_UP + updates)

    def draw() -> Update:
        return _draw_update(_sampler(batch, shares))

    def whole() -> Update:
        first, second = schedule(), draw()
        return lambda position: (first(position), second(position))

    return [
        ("scheduler and learning rate", None, schedule),
        ("sampler", None, draw),
        ("together", _GOAL_MICROSECONDS, whole),
    ]


def _schedule_update(batch: int, updates: int) -> Update:
    plan = _plan(batch)
    scheduler, rate = CurriculumScheduler(plan), plan.phases[0].learning_rate
    clocks = list(_clocks(batch, updates))

    def update(position: int) -> object:
        before, after = clocks[position], clocks[position + 1]
        # The loss keeps falling, so that the plateau is never reached.
        return (
            scheduler.needs_loss(before),
            rate.at(before.phase_updates),
            scheduler.observe(after, 1.0 / (1 + position)),
        )

    return update


def _clocks(batch: int, updates: int) -> Iterator[Clock]:
    clock = Clock()
    for _ in range(updates + 1):
        yield clock
        clock = clock.after_update(micro_batches=1, samples=batch, epoch=0)


def _draw_update(sampler: PhaseSampler) -> Update:
    def update(position: int) -> object:
        bucket, epoch = sampler.bucket_at(position), sampler.epoch_at(position + 1)
        return (
            bucket,
            epoch,
            rank_slice(sampler.batch(position), rank=0, world_size=1, micro_batch_size=_MICRO_BATCH),
        )

    return update


def _sampler(batch: int, shares: tuple[float | None, ...]) -> PhaseSampler:
    buckets = [
        BucketSamples(indices=tuple(range(number, _CLIPS, len(shares))), global_batch_size=batch, share=share)
        for number, share in enumerate(shares)
    ]
    return PhaseSampler(seed=0, phase=0, buckets=buckets)


def _plan(batch: int) -> RunPlan:
    bucket = BucketPlan(
        frames=9,
        requested_frames=9,
        height=256,
        width=256,
        frame_rate_hz=None,
        global_batch_size=batch,
        micro_batch_size=batch,
        accumulation=1,
    )
    phase = phase_plan(
        updates=_LIMIT,
        buckets=(bucket,),
        length=UpdateRange(minimum=1, maximum=_LIMIT),
        end=PhaseEnd(limit_updates=_LIMIT, epochs=_LIMIT, plateau=PlateauConfig(patience_updates=1000)),
        learning_rate=LearningRateSchedule(
            peak=1e-4, kind="cosine", warmup_updates=0, updates=_LIMIT, final_ratio=0.1
        ),
    )
    return RunPlan(phases=(phase,), world_size=1)


def _microseconds(update: Update, updates: int) -> float:
    """Returns microseconds per update over `updates` of them, after a warm-up; passes that begin in between
    are included."""
    for position in range(_WARM_UP):
        update(position)
    began = time.process_time()
    for position in range(_WARM_UP, _WARM_UP + updates):
        update(position)
    return (time.process_time() - began) / updates * 1e6


def _first_batches(batch: int, shares: tuple[float | None, ...], runs: int) -> list[float]:
    """Returns microseconds for the first update of the second pass, as a resumed run asks for it."""
    found = []
    for _ in range(runs):
        sampler = _sampler(batch, shares)
        position = sampler.updates_in(1)
        began = time.process_time()
        sampler.batch(position)
        found.append((time.process_time() - began) * 1e6)
    return found


if __name__ == "__main__":
    main()
