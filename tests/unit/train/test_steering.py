# ruff: noqa: E501  messages stand on one line, as users see them
"""Steering: the finished and the running phase are pinned, later ones may change, and messages say what changed."""

from typing import Any

import pytest

from aiprod_ds.clock import Clock
from aiprod_ds.config.fingerprint import phase_fingerprints
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.train.resume.compatibility import check_steering

PHASE = {
    "resolution": "64x64",
    "duration": {"frames": 9},
    "global_batch_size": 4,
    "updates": 10,
    "learning_rate": 1e-3,
}
NOW = Clock(updates=13, phase=1, phase_updates=3)


def config(*changes: dict[str, Any]) -> VAETrainerConfig:
    phases = [{"name": f"p{index}", **PHASE, **change} for index, change in enumerate(changes)]
    return VAETrainerConfig.model_validate(
        {
            "output_dir": "out",
            "model": {"source": "M"},
            "data": {"train": "s"},
            "curriculum": {"phases": phases},
        }
    )


OLD = config({}, {}, {})


def steer(
    new: VAETrainerConfig, *, clock: Clock = NOW, saved_config: VAETrainerConfig | None = OLD
) -> tuple[str, ...]:
    return check_steering(phase_fingerprints(OLD), new, clock, saved_config=saved_config)


def test_unchanged_curriculum_has_nothing_to_say() -> None:
    assert steer(config({}, {}, {})) == ()


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (config({}, {}, {"updates": 99}), ("curriculum.phases[2]: phase 'p2' with updates 10 -> 99",)),
        (
            config({}, {}, {"duration": {"frames": 17}}),
            ("curriculum.phases[2]: phase 'p2' with duration.frames 9 -> 17",),
        ),
        (config({}, {}), ("curriculum.phases[2]: removed",)),
        (config({}, {}, {}, {}), ("curriculum.phases[3]: phase 'p3' added",)),
        (
            config({}, {}, {"learning_rate": 0.5}, {}),
            (
                "curriculum.phases[2]: phase 'p2' with learning_rate 0.001 -> 0.5",
                "curriculum.phases[3]: phase 'p3' added",
            ),
        ),
    ],
)
def test_phases_not_yet_reached_may_change(new: VAETrainerConfig, lines: tuple[str, ...]) -> None:
    assert steer(new) == lines


FIX = "Restore it, edit later phases only, or start a new run in another output_dir."


@pytest.mark.parametrize(
    ("new", "messages"),
    [
        (
            config({"updates": 11}, {}, {}),
            [
                f"curriculum.phases[0]: must stay as it was, because it is finished (update 13), got phase 'p0' with updates 10 -> 11. {FIX}"
            ],
        ),
        (
            config({}, {"loss": {"kl_weight": 1.0}}, {}),
            [
                f"curriculum.phases[1]: must stay as it was, because it is running (update 13), got phase 'p1' with loss.kl_weight None -> 1.0. {FIX}"
            ],
        ),
        (
            config({}),
            [
                f"curriculum.phases[1]: must stay as it was, because it is running (update 13), got removed. {FIX}"
            ],
        ),
    ],
)
def test_pinned_phases_may_not(new: VAETrainerConfig, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        steer(new)
    assert list(caught.value.problems) == messages


def test_every_pinned_change_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        steer(config({"updates": 11}, {"updates": 12}, {"updates": 13}))
    assert len(caught.value.problems) == 2


def test_without_the_old_configuration_the_phase_is_still_named() -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.phases\[0\]: .* got another phase 'p0'"):
        steer(config({"updates": 11}, {}, {}), saved_config=None)


@pytest.mark.parametrize("index", range(3))
def test_the_factor_of_the_learning_rate_may_change_in_any_phase(index: int) -> None:
    changes: list[dict[str, Any]] = [{}, {}, {}]
    changes[index] = {"learning_rate_factor": 0.5}
    assert steer(config(*changes)) == ()
