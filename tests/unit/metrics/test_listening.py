"""ViSQOL: order of scores, the worst, what is not judged; and the message without its package."""

import builtins
import math

import pytest
import torch

from aiprod_ds.errors import ConfigError
from aiprod_ds.metrics.listening import Visqol

RATE_HZ = 16000


def _sound(seconds=1.0, rate_hz=RATE_HZ):
    times = torch.arange(int(seconds * rate_hz)) / rate_hz
    tones = [
        torch.sin(2 * math.pi * tone * times) / number for number, tone in enumerate((220, 440, 1500), 1)
    ]
    swell = 0.6 + 0.4 * torch.sin(2 * math.pi * 3 * times)
    return (0.15 * sum(tones) * swell)[None]


@pytest.fixture(scope="module")
def visqol():
    pytest.importorskip("visqol")
    return Visqol(sample_rate_hz=RATE_HZ)


@pytest.mark.slow
def test_a_copy_has_the_highest_score_and_noise_lowers_it(visqol):
    x = _sound()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    copy, near, far = (visqol(x, x + level * noise) for level in (0.0, 0.001, 0.02))

    # ViSQOL's audio mode ends at 4.732; docstring of its own documentation.
    assert copy == pytest.approx(4.732, abs=1e-3)
    assert copy > near > far >= 1.0


def test_silence_and_what_is_not_finite(visqol):
    x = _sound()
    broken = x.clone()
    broken[0, 100] = math.nan

    assert visqol(x, torch.zeros_like(x)) == visqol(x, torch.full_like(x, 0.3)) == 1.0
    assert math.isnan(visqol(x, broken))
    assert visqol(torch.cat([x, -x]), torch.cat([x, x])) == "silent where channels are averaged"


def test_a_sound_under_a_second_is_not_judged(visqol):
    x = _sound(0.9)
    assert visqol(x, x) == "under 1 s"


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "visqol":
            raise ImportError("No module named 'visqol'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"evaluation\.measures\.visqol: needs the package visqol-python"):
        Visqol(sample_rate_hz=RATE_HZ)
