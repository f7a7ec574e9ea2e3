"""MelQuality: its worked number, silence, and what is not finite."""

import math

import pytest
import torch

from aiprod_ds.metrics.mel_quality import MelQuality


def _mels(batch=2):
    return torch.rand(batch, 1, 20, 8, generator=torch.Generator().manual_seed(0))


def test_worked_number_of_the_docstring():
    x = _mels()
    quality = MelQuality()
    quality.update(x, x + 1)

    # fp32 sums of numbers near 1.
    assert quality.compute()["log_mel_l1"] == pytest.approx(1.0, rel=1e-6)


def test_silence_is_named_and_left_out():
    x = _mels()
    x[0] = math.log(1e-5)
    quality = MelQuality()
    quality.update(x, x + torch.tensor([5.0, 1.0]).view(2, 1, 1, 1), names=["silent.wav", "speech.wav"])

    assert quality.compute()["log_mel_l1"] == pytest.approx(1.0, rel=1e-6)
    assert [(entry.clip, entry.reason) for entry in quality.not_judged] == [("silent.wav", "digital silence")]


def test_nothing_but_silence_has_no_measure():
    quality = MelQuality()
    quality.update(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    assert quality.compute() == {}


def test_nan_shows_and_is_not_left_out():
    x = _mels()
    y = x.clone()
    y[1, 0, 0, 0] = math.nan
    quality = MelQuality()
    quality.update(x, y)

    assert math.isnan(quality.compute()["log_mel_l1"])
    assert quality.not_judged == ()
