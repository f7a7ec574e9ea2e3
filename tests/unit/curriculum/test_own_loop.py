"""The scheduler in a loop that is not ours: it keeps the time, says what each update is, and goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aiprod_ds.clock import Clock
from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.phase import PhaseConfig, PhaseDuration, PhaseResolution
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Reason
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, ConfigError, PlanError


def phase(name: str, **values: Any) -> PhaseConfig:
    shape = {"resolution": PhaseResolution(height=65, width=64), "duration": PhaseDuration(frames=8)}
    return PhaseConfig.model_validate(
        {
            "name": name,
            **shape,
            "global_batch_size": 4,
            "learning_rate": 0.1,
            "schedule": "constant",
            **values,
        }
    )


def curriculum(*phases: PhaseConfig) -> CurriculumConfig:
    return CurriculumConfig(phases=phases)


TWO = curriculum(phase("a", updates=3, warmup_updates=2), phase("b", updates=2, loss={"kl_weight": 0.5}))


def test_a_loop_runs_through_all_phases_with_the_rates_of_the_plan() -> None:
    scheduler = CurriculumScheduler.from_config(TWO)
    seen, decisions = [], []
    while not scheduler.phase_info().is_finished:
        info = scheduler.phase_info()
        seen.append((info.name, info.phase_updates, info.learning_rate, dict(info.loss_weights)))
        decisions.append(scheduler.advance())
    assert seen == [
        ("a", 0, 0.05, {}),
        ("a", 1, 0.1, {}),
        ("a", 2, 0.1, {}),
        ("b", 0, 0.1, {"kl_weight": 0.5}),
        ("b", 1, 0.1, {"kl_weight": 0.5}),
    ]
    assert [(decision.action, decision.reason) for decision in decisions] == [
        (Action.STAY, Reason.RUNNING),
        (Action.STAY, Reason.RUNNING),
        (Action.NEXT_PHASE, Reason.UPDATES),
        (Action.STAY, Reason.RUNNING),
        (Action.FINISHED, Reason.UPDATES),
    ]
    assert scheduler.clock == Clock(updates=5, micro_batches=5, samples=20, phase=1, phase_updates=2)
    with pytest.raises(ConfigError, match=r"advance: all phases are over after 5 updates"):
        scheduler.advance()


def test_shapes_and_batches_are_those_of_the_plan() -> None:
    info = CurriculumScheduler.from_config(TWO, world_size=2).phase_info()
    assert (info.height, info.width, info.frames, info.phase_length) == (65, 64, 8, 3)
    assert (info.global_batch_size, info.micro_batch_size, info.accumulation) == (4, 2, 1)
    with pytest.raises(PlanError, match=r"global_batch_size: must be a multiple of .* 3"):
        CurriculumScheduler.from_config(TWO, world_size=3)
    with pytest.raises(PlanError, match=r"resolution\.height: must be a multiple of the model's stride 8"):
        CurriculumScheduler.from_config(TWO, strides=ModelStrides(spatial=8, temporal=4))
    sized = curriculum(phase("a", updates=1, resolution="64x64"))
    strides = ModelStrides(spatial=8, temporal=4)
    assert CurriculumScheduler.from_config(sized, strides=strides).phase_info().frames == 9


def test_the_default_curriculum_and_that_of_a_trainer_begin_alike() -> None:
    whole = VAETrainerConfig(
        output_dir="x",
        model=ModelConfig(source="m"),
        data=VideoDataConfig(train="t"),
        curriculum=CurriculumConfig(),
    )
    info, of_whole = (CurriculumScheduler.from_config(c).phase_info() for c in (CurriculumConfig(), whole))
    assert (info.height, info.frames, info.global_batch_size) == (256, 8, 16)
    assert info.learning_rate == of_whole.learning_rate == pytest.approx(1e-7)
    assert of_whole.loss_weights["kl_weight"] == whole.loss.kl_weight
    assert info.loss_weights == {}


def test_epochs_end_after_as_many_clips_and_the_rate_decays_over_them() -> None:
    ends = curriculum(phase("a", epochs=2, schedule="linear", final_learning_rate_ratio=0.0))
    scheduler = CurriculumScheduler.from_config(ends, num_clips=10)
    rates, actions = [], []
    for _ in range(5):  # 2 * 10 clips in batches of 4
        rates.append(scheduler.phase_info().learning_rate)
        actions.append(scheduler.advance().action)
    assert actions == [Action.STAY] * 4 + [Action.FINISHED]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    with pytest.raises(PlanError, match=r"phases\[0\]\.epochs: needs num_clips, got none"):
        CurriculumScheduler.from_config(ends)


def test_a_skipped_update_moves_the_data_but_not_the_rates() -> None:
    ends = curriculum(phase("a", epochs=1, min_updates=1))
    scheduler = CurriculumScheduler.from_config(ends, num_clips=8)
    assert scheduler.advance(is_applied=False).action is Action.STAY
    assert scheduler.phase_info().phase_updates == 0
    decision = scheduler.advance()
    assert (decision.action, decision.reason) == (Action.FINISHED, Reason.EPOCHS)
    assert scheduler.clock.skipped_updates == 1


class Scalar:
    """What a loss is: something that `float` reads, and that must not be read where nobody asks."""

    def __init__(self, value: float, *, is_asked: bool) -> None:
        self.value, self.is_asked = value, is_asked

    def __float__(self) -> float:
        assert self.is_asked, "reading a loss waits for the device"
        return self.value


def test_a_plateau_ends_a_phase_and_only_it_reads_losses() -> None:
    rule = {"patience_updates": 2, "smoothing": 0.0}
    ends = curriculum(phase("a", updates=1), phase("b", plateau=rule, max_updates=9, warmup_updates=1))
    scheduler = CurriculumScheduler.from_config(ends)
    assert scheduler.advance(Scalar(1.0, is_asked=False)).action is Action.NEXT_PHASE
    assert scheduler.advance(Scalar(1.0, is_asked=False)).action is Action.STAY  # warm-up
    with pytest.raises(ConfigError, match=r"must be given the loss, by which phase 'b' ends"):
        scheduler.advance()
    found = [scheduler.advance(Scalar(1.0, is_asked=True)) for _ in range(3)]
    assert [decision.reason for decision in found] == [Reason.RUNNING, Reason.RUNNING, Reason.PLATEAU]


def test_the_state_holds_the_time_and_a_new_scheduler_goes_on_from_it() -> None:
    scheduler = CurriculumScheduler.from_config(TWO)
    for _ in range(4):
        scheduler.advance()
    state = json.loads(json.dumps(scheduler.state_dict()))
    fresh = CurriculumScheduler.from_config(TWO)
    fresh.load_state_dict(state)
    assert fresh.phase_info() == scheduler.phase_info()
    assert fresh.advance() == scheduler.advance()
    planned = plan_run(
        VAETrainerConfig(
            output_dir="x", model=ModelConfig(source="m"), data=VideoDataConfig(train="t"), curriculum=TWO
        ),
        world_size=1,
        strides=ModelStrides(spatial=1, temporal=1),
    )
    with pytest.raises(CheckpointError, match="scheduler state of format 1"):
        CurriculumScheduler(planned).load_state_dict(state)
    with pytest.raises(ConfigError, match="keeps no time of its own"):
        CurriculumScheduler(planned).phase_info()


def test_adapters_and_what_only_trainers_know() -> None:
    lora = curriculum(phase("a", updates=1, training_mode="lora", lora={"rank": 4}), phase("b", updates=1))
    scheduler = CurriculumScheduler.from_config(lora)
    info = scheduler.phase_info()
    assert info.adapters is not None
    assert info.adapters.rank == 4
    scheduler.advance()
    assert scheduler.phase_info().adapters is None
    assert scheduler.phase_info().moment_scale == 0.0  # other parameters are trained
    with pytest.raises(
        PlanError, match=r"phases\[0\]\.buckets: must be listed for a loop of your own, got auto"
    ):
        CurriculumScheduler.from_config(curriculum(phase("a", updates=1, buckets="auto")))


def test_what_is_no_plan_and_no_configuration_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"got CurriculumConfig\. Write CurriculumScheduler\.from_config"):
        CurriculumScheduler(CurriculumConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"from_config: config must be a CurriculumConfig .* got str"):
        CurriculumScheduler.from_config("c.yaml")  # type: ignore[arg-type]
