"""Of how many blocks `performance.recompute` has one computed again, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.run import PerformanceConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.errors import EngineError
from aiprod_ds.planner.cost import Estimator
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.planner.workload import Workload
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.train.planning.recompute import with_recompute

SETTINGS = parse_deepspeed_settings(
    Path(__file__).parents[3] / "ds_configs/zero1_bf16.json", where="zero1_bf16.json"
)
GB = 10**9
LEVELS = (0, 8, 4, 2, 1)


BUCKET = BucketPlan(
    frames=9,
    requested_frames=9,
    height=64,
    width=64,
    frame_rate_hz=None,
    global_batch_size=1,
    micro_batch_size=1,
    accumulation=1,
)


def _plan(*phases: dict[str, Any]) -> RunPlan:
    made = [
        replace(phase_plan(index=index, updates=10, buckets=(BUCKET,)), **changes)
        for index, changes in enumerate(phases or ({},))
    ]
    return RunPlan(phases=tuple(made), world_size=1)


def _estimator(plan: RunPlan, kept: int, *, has_blocks: bool = True) -> Estimator:
    """Of an H200, which has 150 GB, and a model whose blocks keep `kept` bytes, a twentieth if recomputed."""

    def trace(_: PhasePlan, bucket: int, *, micro_batch_size: int, recompute: int) -> Workload:
        del bucket, micro_batch_size
        if recompute and not has_blocks:
            raise EngineError("nothing to recompute")
        held = kept if not recompute else int(kept * (1 - 0.95 / recompute))
        return Workload(
            parameters=GB,
            trained=GB,
            trained_tensors=1,
            largest_trained=GB,
            buffer_bytes=0,
            saved_bytes=held,
            curve=((0, held), (GB, 0)),
            work=(),
            dispatched=1,
        )

    return Estimator(
        plan=plan,
        machine=MACHINES["h200-141gb"],
        trace=trace,
        has_average=False,
        dollars_per_gpu_hour=1.0,
        recompute_levels=LEVELS,
    )


def _levels(asked: str, plan: RunPlan, estimator: Estimator | None = None) -> tuple[list[int], list[str]]:
    config = PerformanceConfig(recompute=asked, recompute_every=3)  # type: ignore[arg-type]
    found, reasons = with_recompute(config, plan, SETTINGS, estimator)
    return [phase.recompute(default=SETTINGS.activation_checkpointing) for phase in found.phases], [*reasons]


@pytest.mark.parametrize(("asked", "expected"), [("none", 0), ("full", 1), ("every_n", 3)])
def test_what_is_asked_for_by_name_is_taken(asked: str, expected: int) -> None:
    levels, (reason,) = _levels(asked, _plan())
    assert levels == [expected]
    assert reason.endswith(": as configured")


def test_a_phase_that_says_itself_comes_first() -> None:
    plan = _plan({"activation_checkpointing": True}, {"activation_checkpointing": False}, {})
    levels, reasons = _levels("every_n", plan)
    assert levels == [1, 0, 3]
    assert len(reasons) == 1


def test_what_was_chosen_before_stays() -> None:
    assert _levels("full", _plan({"recompute_every": 4})) == ([4], [])


def test_by_default_nothing_changes_and_nothing_is_said() -> None:
    plan = _plan({}, {"activation_checkpointing": True})
    assert with_recompute(PerformanceConfig(), plan, SETTINGS, None) == (plan, ())


@pytest.mark.parametrize(
    ("kept", "expected", "why"),
    [
        # 14 GB of weights and optimizer, 0.47 of buckets; 150.1 - 1.8 GB less 5 % leave 126.8 GB.
        (120 * GB, 0, "recompute none in phase"),
        (130 * GB, 8, "recompute 1 of 8 blocks"),
        (200 * GB, 2, "recompute 1 of 2 blocks"),
        (1000 * GB, 1, "recompute full"),
    ],
)
def test_auto_takes_the_fewest_with_which_the_phase_fits(kept: int, expected: int, why: str) -> None:
    plan = _plan()
    levels, (reason,) = _levels("auto", plan, _estimator(plan, kept))
    assert levels == [expected]
    assert reason.startswith(why)
    assert "of 150.1 GB" in reason
    assert ("would need" in reason) == (expected > 0)


def test_auto_takes_the_least_memory_where_nothing_fits() -> None:
    plan = _plan()
    levels, (reason,) = _levels("auto", plan, _estimator(plan, 10_000 * GB))
    assert levels == [1]
    assert "nothing fits h200-141gb, 150.1 GB, and full would need" in reason


def test_auto_recomputes_nothing_of_a_model_without_blocks_and_on_a_cpu() -> None:
    plan = _plan()
    levels, (reason,) = _levels("auto", plan, _estimator(plan, 200 * GB, has_blocks=False))
    assert levels == [0]
    assert "the model has no repeated blocks" in reason
    levels, (reason,) = _levels("auto", plan, None)
    assert levels == [0]
    assert "on a CPU memory is not estimated" in reason


def test_a_model_that_cannot_be_estimated_is_left_as_the_settings_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = _plan()

    def trace(*_: Any, **__: Any) -> Workload:
        raise RuntimeError("no kernel for the meta device")

    levels, (reason,) = _levels("auto", plan, replace(_estimator(plan, GB), trace=trace))
    assert levels == [0]
    assert "cannot be estimated" in reason
    assert "recompute_not_estimated" in caplog.text
