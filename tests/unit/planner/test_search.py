"""Which settings are chosen for a run whose workloads are given, and what its hours and dollars are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings, with_parallel
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.errors import EngineError, PlanError
from aiprod_ds.planner.advice import starving
from aiprod_ds.planner.computing import Computing
from aiprod_ds.planner.cost import Estimator
from aiprod_ds.planner.hardware import MACHINES, Machine
from aiprod_ds.planner.roofline import (
    COMPILED_BYTES,
    COMPILED_OPERATIONS,
    ONE_PASS_BYTES,
    SECONDS_PER_CAPTURED,
    SECONDS_PER_ONE_PASS,
    SECONDS_PER_TENSOR,
    SECONDS_PER_UPDATE,
    micro_batch_seconds,
    update_seconds,
)
from aiprod_ds.planner.search import ParallelChoice, search
from aiprod_ds.planner.workload import Work, WorkKind, Workload
from aiprod_ds.testing.plans import phase_plan

FILES = Path(__file__).parents[3] / "ds_configs"
BF16 = parse_deepspeed_settings(FILES / "zero1_bf16.json", where="zero1_bf16.json")
TRAINED, BYTES_PER_CLIP = 10**9, 10 * 10**9


def _trace(
    phase: PhasePlan,
    bucket: int,
    *,
    micro_batch_size: int,
    recompute: int,
    has_blocks: bool = True,
    trained: int = TRAINED,
) -> Workload:
    """A model that keeps 10 GB for each clip, a tenth of it when it recomputes, which takes a third
    longer."""
    if recompute and not has_blocks:
        raise EngineError("nothing to recompute")
    held = BYTES_PER_CLIP * micro_batch_size * (phase.index + 1) // (10 if recompute else 1)
    flops = 1e15 * micro_batch_size * (4 if recompute else 3)
    return Workload(
        parameters=trained,
        trained=trained,
        trained_tensors=100,
        largest_trained=10**7,
        buffer_bytes=0,
        saved_bytes=held,
        curve=((0, held), (trained, 0)),
        work=(Work(kind=WorkKind.MATMUL, flops=flops, moved_bytes=1e9, element_bytes=2, count=1),),
        dispatched=1000,
    )


def _bucket(global_batch_size: int, world_size: int) -> BucketPlan:
    return BucketPlan(
        frames=9,
        requested_frames=9,
        height=64,
        width=64,
        frame_rate_hz=None,
        global_batch_size=global_batch_size,
        micro_batch_size=global_batch_size // world_size,
        accumulation=1,
    )


def _plan(*, world_size: int = 1, batch: int = 8, phases: int = 2) -> RunPlan:
    bucket = _bucket(batch, world_size)
    return RunPlan(
        phases=tuple(phase_plan(updates=3600, index=index, buckets=(bucket,)) for index in range(phases)),
        world_size=world_size,
    )


def _estimator(machine: str = "h200-141gb", plan: RunPlan | None = None, **changes: object) -> Estimator:
    return Estimator(
        plan=plan or _plan(),
        machine=MACHINES[machine],
        trace=partial(_trace, **changes),  # type: ignore[arg-type]
        has_average=False,
        dollars_per_gpu_hour=2.0,
    )


def _settings(stage: int, is_offloaded: bool) -> DeepSpeedSettings:
    return with_parallel(BF16, zero_stage=stage, is_offloaded=is_offloaded, where="test")


def test_what_fits_whole_is_neither_recomputed_nor_cut() -> None:
    choice = search(_estimator(plan=_plan(batch=8, phases=1)), _settings, where="run")
    assert (choice.zero_stage, choice.is_offloaded) == (1, False)
    assert [(phase.recompute, phase.micro_batch_sizes) for phase in choice.phases] == [(0, (8,))]
    assert "ZeRO-1, recomputation off, micro-batch 8 x 1" in choice.reason[0]


def test_a_larger_phase_is_cut_before_it_is_recomputed_where_that_is_faster() -> None:
    choice = search(_estimator(), _settings, where="run")
    # Phase 1 keeps 20 GB a clip: 8 clips are 160 of 150 GB, 4 are 80; cutting costs launches, recomputing a
    # third of the time.
    assert [(phase.recompute, phase.micro_batch_sizes) for phase in choice.phases] == [
        (0, (8,)),
        (0, (4,)),
    ]


def test_a_phase_of_which_no_clip_fits_is_recomputed() -> None:
    plan = _plan(phases=4, batch=4)
    choice = search(_estimator("v100-32gb", plan), _settings, where="run")
    assert choice.phases[0].recompute == 0
    assert choice.phases[3].recompute == 1  # one clip keeps 40 GB of 34
    applied = choice.applied(plan)
    assert applied.phases[3].activation_checkpointing is True
    for phase in applied.phases:
        (bucket,) = phase.buckets
        assert bucket.micro_batch_size * bucket.accumulation * plan.world_size == bucket.global_batch_size


def test_more_is_sharded_or_offloaded_when_optimizer_state_does_not_fit() -> None:
    eight = search(_estimator("v100-32gb", _plan(world_size=8), trained=7 * 10**9), _settings, where="run")
    assert eight.zero_stage > 1
    one = search(
        _estimator("v100-32gb", _plan(batch=1, phases=1), trained=25 * 10**8), _settings, where="run"
    )
    assert one.is_offloaded


def test_what_fits_nowhere_is_refused_with_the_least_need() -> None:
    with pytest.raises(
        PlanError, match=r"run: must fit v100-32gb with 1 GPUs, got phase phase_0, which needs .* of 34\.0 GB"
    ):
        search(_estimator("v100-32gb", _plan(batch=1, phases=1), trained=40 * 10**9), _settings, where="run")


def test_a_model_without_blocks_is_not_recomputed() -> None:
    choice = search(_estimator("h200-141gb", _plan(phases=1), has_blocks=False), _settings, where="run")
    assert not choice.phases[0].recompute
    with pytest.raises(PlanError, match="must fit"):
        search(_estimator("v100-32gb", _plan(phases=4, batch=4), has_blocks=False), _settings, where="run")


def test_a_choice_is_the_same_every_time_and_survives_json() -> None:
    first, second = (search(_estimator(), _settings, where="run") for _ in range(2))
    assert first == second == ParallelChoice.from_dict(first.to_dict())


@pytest.mark.parametrize(
    ("plan", "fits"),
    [
        (_plan(), True),
        (_plan(batch=16), True),
        (_plan(batch=6), False),
        (_plan(phases=3), False),
        (_plan(world_size=2), False),
    ],
)
def test_a_choice_is_kept_for_plans_that_it_can_cut(plan: RunPlan, fits: bool) -> None:
    assert search(_estimator(), _settings, where="run").fits(plan) is fits


def test_hours_and_dollars_follow_from_seconds() -> None:
    plan = _plan(world_size=2, phases=1)
    (cost,) = _estimator(plan=plan).costs(plan, BF16)
    assert cost.gpu_hours == pytest.approx(3600 * cost.seconds_per_update * 2 / 3600)
    assert cost.dollars == pytest.approx(2.0 * cost.gpu_hours)
    assert cost.flops_per_update == pytest.approx(2 * 4 * 3e15)
    assert cost.fits
    assert cost.to_dict()["memory"]["needed"] == cost.memory.needed


def _seconds(machine: Machine, workload: Workload, *, world_size: int = 1, accumulation: int = 1) -> float:
    return update_seconds(workload, BF16, machine, world_size=world_size, accumulation=accumulation)


def test_time_is_bounded_by_flops_by_bytes_or_by_the_host() -> None:
    h200, phase = MACHINES["h200-141gb"], _plan().phases[0]
    large = _trace(phase, 0, micro_batch_size=8, recompute=0)
    step = SECONDS_PER_ONE_PASS + 100 * SECONDS_PER_TENSOR
    assert _seconds(h200, large) == pytest.approx(24e15 / (989e12 * 0.64) + step)
    assert _seconds(h200, large, accumulation=2) == pytest.approx(2 * 24e15 / (989e12 * 0.64) + step)
    small = Workload(**{**{name: getattr(large, name) for name in Workload.__dataclass_fields__}, "work": ()})
    assert _seconds(h200, small) == pytest.approx(1000 * 17e-6 + step)
    assert _seconds(MACHINES["v100-32gb"], large) > 7 * _seconds(h200, large)
    assert _seconds(h200, small, world_size=8) > 1000 * 17e-6 + SECONDS_PER_ONE_PASS + 7 / 8 * 4 * TRAINED / (
        450e9 * 0.7
    )


def test_captured_passes_cost_the_host_nothing_and_compiled_ones_half() -> None:
    h200, phase = MACHINES["h200-141gb"], _plan().phases[0]
    workload = replace(_trace(phase, 0, micro_batch_size=1, recompute=0), work=(), block_dispatched=1.0)
    compiled = Computing(compiles_blocks=True)
    assert micro_batch_seconds(workload, h200) == pytest.approx(1000 * 17e-6)
    assert micro_batch_seconds(workload, h200, compiled) == pytest.approx(1000 * 17e-6 * COMPILED_OPERATIONS)
    assert micro_batch_seconds(workload, h200, compiled, is_captured=True) == 0
    step = update_seconds(workload, BF16, h200, world_size=1, accumulation=1, is_captured=True)
    assert step == pytest.approx(SECONDS_PER_CAPTURED + ONE_PASS_BYTES * TRAINED / (4.8e12 * 0.98))


def test_compiled_blocks_move_fewer_bytes() -> None:
    work = (Work(kind=WorkKind.OTHER, flops=0.0, moved_bytes=4.8e12 * 0.98, element_bytes=2, count=1),)
    phase = _plan().phases[0]
    workload = replace(_trace(phase, 0, micro_batch_size=1, recompute=0), work=work, block_share=0.5)
    h200, compiled = MACHINES["h200-141gb"], Computing(compiles_blocks=True)
    assert micro_batch_seconds(workload, h200) == pytest.approx(1.0)
    assert micro_batch_seconds(workload, h200, compiled) == pytest.approx(0.5 + 0.5 * COMPILED_BYTES)
    half = replace(compiled, activation_memory_budget=0.5)
    assert micro_batch_seconds(workload, h200, half) > micro_batch_seconds(workload, h200, compiled)


def test_flat_parameters_cost_the_host_less() -> None:
    h200, phase = MACHINES["h200-141gb"], _plan().phases[0]
    workload = replace(
        _trace(phase, 0, micro_batch_size=8, recompute=0), trained_tensors=1000, flat_tensors=10
    )
    stage_3 = _settings(3, False)
    many, flat = (
        update_seconds(workload, stage_3, h200, world_size=1, accumulation=1, computing=computing)
        for computing in (Computing(), Computing(has_flat_parameters=True))
    )
    assert many - flat == pytest.approx(1000 * SECONDS_PER_TENSOR - 90 * TRAINED / (4.8e12 * 0.98))
    assert flat > SECONDS_PER_UPDATE


def test_some_of_the_blocks_are_recomputed_where_that_is_asked_for() -> None:
    estimator = replace(_estimator("v100-32gb", _plan(batch=1, phases=4)), recompute_levels=(4,))
    choice = search(estimator, _settings, where="run")
    assert [phase.recompute for phase in choice.phases] == [4] * 4
    assert ParallelChoice.from_dict(choice.to_dict()) == choice
    applied = choice.applied(_plan(batch=1, phases=4))
    assert [(phase.activation_checkpointing, phase.recompute_every) for phase in applied.phases] == [
        (True, 4)
    ] * 4


def _starved(held: int) -> list[str]:
    """An update of which half does not depend on the micro-batch."""

    def trace(phase: PhasePlan, bucket: int, *, micro_batch_size: int, recompute: int) -> Workload:
        found = _trace(phase, bucket, micro_batch_size=micro_batch_size, recompute=recompute)
        flops = 989e12 * 0.64 * 0.05 * micro_batch_size
        work = (Work(kind=WorkKind.MATMUL, flops=flops, moved_bytes=1.0, element_bytes=2, count=1),)
        return replace(found, work=work, curve=((0, held * micro_batch_size),), trained_tensors=263)

    plan = _plan(batch=1, phases=1)
    return [*starving(replace(_estimator(plan=plan), trace=trace), plan, BF16)]


def test_a_phase_that_starves_the_card_is_told_what_larger_batches_bring() -> None:
    (line,) = _starved(held=10**9)
    assert "starves the card with micro-batches of 1: global_batch_size: 4" in line
    assert "1.8 times the clips a second" in line  # (0.05 + 0.075) / (0.05 + 0.075 / 4)


def test_larger_batches_that_do_not_fit_are_not_advised() -> None:
    assert _starved(held=60 * 10**9) == []


def test_a_phase_that_accumulates_is_advised_to_do_so_less() -> None:
    bucket = replace(_bucket(8, 1), micro_batch_size=1, accumulation=8)
    plan = RunPlan(phases=(phase_plan(updates=10, index=0, buckets=(bucket,)),), world_size=1)

    def trace(phase: PhasePlan, bucket: int, *, micro_batch_size: int, recompute: int) -> Workload:
        found = _trace(phase, bucket, micro_batch_size=micro_batch_size, recompute=recompute)
        return replace(found, work=(), curve=((0, 1),))

    (line,) = starving(replace(_estimator(plan=plan), trace=trace), plan, BF16)
    assert "micro_batch_size: 4 and accumulation: 2, the same batch" in line
