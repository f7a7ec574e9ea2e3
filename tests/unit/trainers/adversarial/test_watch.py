"""When adversarial training is said to have collapsed."""

from __future__ import annotations

import logging

import pytest
import torch

from aiprod_ds.trainers.adversarial.watch import WINDOW_UPDATES, CollapseWatch, judgement

HEALTHY = {
    "discriminator/real_accuracy": 0.8,
    "discriminator/fake_accuracy": 0.7,
    "discriminator/gradient_ratio": 0.5,
}


@pytest.mark.parametrize(
    ("changed", "applied", "words"),
    [
        ({}, 100, None),
        ({"discriminator/real_accuracy": 0.99, "discriminator/fake_accuracy": 0.99}, 100, "has won"),
        ({"discriminator/real_accuracy": 0.99}, 100, None),
        ({"discriminator/fake_accuracy": 0.01}, 100, "one answer"),
        ({"discriminator/gradient_ratio": 11.0}, 100, "11.0 times"),
        ({}, 0, "not finite"),
    ],
)
def test_what_is_wrong_is_told(changed: dict[str, float], applied: int, words: str | None) -> None:
    found = judgement({**HEALTHY, **changed}, num_applied=applied)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)


def test_without_a_model_that_follows_there_is_no_ratio_to_judge() -> None:
    means = {name: value for name, value in HEALTHY.items() if "ratio" not in name}
    assert judgement(means, num_applied=1) is None


def test_it_warns_once_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()

    def windows(number: int, accuracy: float) -> None:
        for update in range(number * WINDOW_UPDATES):
            terms = {name: torch.tensor(accuracy) for name in HEALTHY if "accuracy" in name}
            watch.observe(terms, is_applied=True, update=update)

    with caplog.at_level(logging.WARNING):
        windows(3, 1.0)
        assert len(caplog.records) == 1
        windows(2, 0.7)
        windows(1, 1.0)
    assert len(caplog.records) == 2
    assert "has won" in caplog.text
