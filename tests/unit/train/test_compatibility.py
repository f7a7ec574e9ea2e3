"""What a run may go on from: other ranks and stages yes, another precision or other global batches no."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.train.planning.auto import ResolvedRun
from aiprod_ds.train.resume.compatibility import change_in_words, check_clock, check_compatible, run_layout

BY_GLOBAL_BATCH = {"global_batch_size": 8}
BY_MICRO_BATCH = {"micro_batch_size": 4}


def _config(batch: dict[str, int], **sections: Any) -> VAETrainerConfig:
    phase = {"resolution": "64x64", "duration": {"frames": 9}, "updates": 10, "learning_rate": 1e-3}
    phases = [{"name": "first", **phase, **BY_GLOBAL_BATCH}, {"name": "second", **phase, **batch}]
    base = {
        "output_dir": "out",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": phases},
    }
    return VAETrainerConfig.model_validate({**base, **sections})


def _layout(
    config: VAETrainerConfig, *, ranks: int, stage: int = 1, precision: str = "bf16"
) -> dict[str, Any]:
    values = {"zero_optimization": {"stage": stage}, precision: {"enabled": True}}
    plan = plan_run(config, world_size=ranks, strides=ModelStrides(spatial=32, temporal=8))
    resolved = ResolvedRun(plan=plan, settings=parse_deepspeed_settings(values, "settings"), choice=None)
    return run_layout(config, resolved, world_size=ranks)


def _saved(config: VAETrainerConfig, layout: dict[str, Any], *, phase: int = 1) -> RunState:
    return RunState(
        clock=Clock(updates=12, phase=phase, phase_updates=2),
        scheduler={},
        fingerprint=config_fingerprint(config),
        phase_fingerprints=phase_fingerprints(config),
        layout=layout,
    )


@pytest.mark.parametrize("kind", ["deepspeed", "local"])
@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (1, 1), (4, 3), (8, 0)])
def test_ranks_stage_and_engine_may_change(kind: str, ranks: int, stage: int) -> None:
    config, now = _config(BY_GLOBAL_BATCH), _config(BY_GLOBAL_BATCH, engine={"kind": kind})
    state = _saved(config, _layout(config, ranks=2))
    check_compatible(state, now, _layout(now, ranks=ranks, stage=stage), where="run")


def test_the_precision_must_stay() -> None:
    config = _config(BY_GLOBAL_BATCH)
    state = _saved(config, _layout(config, ranks=2))
    with pytest.raises(ConfigError, match="run: must be of this run's precision, fp16, got bf16"):
        check_compatible(state, config, _layout(config, ranks=2, precision="fp16"), where="run")


def test_the_global_batch_of_the_running_phase_must_stay() -> None:
    config = _config(BY_MICRO_BATCH)
    state = _saved(config, _layout(config, ranks=2))
    with pytest.raises(
        ConfigError,
        match=r"phases\[1\], \[4\] on 1 ranks, got \[\[8\]\] on 2\. Name them in global_batch_size",
    ):
        check_compatible(state, config, _layout(config, ranks=1), where="run")


def test_that_of_a_phase_to_come_may_change() -> None:
    config = _config(BY_MICRO_BATCH)
    check_compatible(
        _saved(config, _layout(config, ranks=2), phase=0), config, _layout(config, ranks=1), where="run"
    )


def test_another_configuration_is_refused() -> None:
    config = _config(BY_GLOBAL_BATCH)
    state = _saved(config, _layout(config, ranks=2))
    other = _config(BY_GLOBAL_BATCH, seed=1)
    with pytest.raises(ConfigError, match="must be of the same configuration"):
        check_compatible(state, other, _layout(other, ranks=2), where="run")


def test_a_change_is_told_in_words_and_no_change_is_none() -> None:
    config = _config(BY_GLOBAL_BATCH)
    saved, local = _layout(config, ranks=2), {**_layout(config, ranks=1, stage=0), "engine": "local"}
    assert change_in_words(saved, saved) is None
    assert change_in_words(saved, local) == "deepspeed on 2 ranks, ZeRO-1 -> local on 1 rank"
    assert (
        change_in_words(local, _layout(config, ranks=1, stage=3))
        == "local on 1 rank -> deepspeed on 1 rank, ZeRO-3"
    )


def test_a_clock_beyond_the_end_of_its_phase_is_refused() -> None:
    config = _config(BY_GLOBAL_BATCH)
    plan = plan_run(config, world_size=1, strides=ModelStrides(spatial=32, temporal=8))
    limit = plan.phases[1].end.limit_updates
    assert limit is not None
    clock = Clock(updates=10 + limit, phase=1, phase_updates=limit)
    check_clock(clock, plan, where="run")
    with pytest.raises(
        CheckpointError, match=rf"run: clock\.phase_updates: must be at most {limit}, which ends"
    ):
        check_clock(replace(clock, phase_updates=limit + 1), plan, where="run")
