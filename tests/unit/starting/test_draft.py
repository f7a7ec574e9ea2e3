"""Phases grow as far as the clips do, batches divide, and shapes are those that the VAE takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.starting.draft import Kind, PhaseDraft, Wish, held_out_share, phases_for
from aiprod_ds.starting.look import Facts
from aiprod_ds.starting.write import quoted
from aiprod_ds.strict_yaml import read_yaml

LTX = ModelStrides(spatial=32, temporal=8)
OOBLECK = ModelStrides(spatial=1, temporal=2048, is_causal=False)


def _facts(**changes: object) -> Facts:
    values: dict[str, object] = {
        "clips": 5000, "unusable": 0, "short_side": 720, "aspect": 16 / 9, "is_mixed": False, "frames": 120,
        "seconds": 5.0, "sound_rate_hz": 48_000, "captioned": 5000,
    }  # fmt: skip
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def _phases(
    kind: Kind = Kind.VIDEO_VAE, *, machine: str = "h200-141gb", ranks: int = 1, **changes: object
) -> tuple[PhaseDraft, ...]:
    wish = Wish(
        kind=kind, file=Path("a.yaml"), data="clips", machine=machine, ranks=ranks, model=None, output_dir="r"
    )
    strides = OOBLECK if kind is Kind.AUDIO_VAE else LTX
    return phases_for(wish, _facts(**changes), strides, sample_rate_hz=44_100)


def test_phases_have_the_shape_of_the_clips() -> None:
    shapes = [(phase.height, phase.width, phase.length) for phase in _phases()]
    assert shapes == [(192, 320, 9), (384, 672, 17), (704, 1248, 49)]
    upright = [(phase.height, phase.width) for phase in _phases(aspect=9 / 16)]
    assert upright == [(320, 192), (672, 384), (1248, 704)]
    square = [(phase.height, phase.width) for phase in _phases(is_mixed=True)]
    assert square == [(256, 256), (512, 512), (704, 704)]


@pytest.mark.parametrize("kind", [Kind.VIDEO_VAE, Kind.LTX_LORA, Kind.LTX_FULL])
@pytest.mark.parametrize("short_side", [64, 240, 480, 2160])
@pytest.mark.parametrize("frames", [1, 8, 12, 500])
def test_nothing_is_enlarged_and_every_shape_is_taken(kind: Kind, short_side: int, frames: int) -> None:
    phases = _phases(kind, short_side=short_side, frames=frames)
    for phase in phases:
        assert min(phase.height, phase.width) <= short_side
        assert phase.height % 32 == phase.width % 32 == 0
        assert phase.length <= frames
        assert (phase.length - 1) % 8 == 0
    assert len({(phase.height, phase.width, phase.length) for phase in phases}) == len(phases)
    assert [phase.name for phase in phases] == ["low", "medium", "high"][: len(phases)]


def test_short_sounds_make_fewer_phases() -> None:
    assert [phase.length / 44_100 for phase in _phases(Kind.AUDIO_VAE, seconds=10.0)] == pytest.approx(
        [1.5, 3.0, 6.0], abs=0.05
    )
    (only,) = _phases(Kind.AUDIO_VAE, seconds=1.0)
    assert only.length == 21 * 2048


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("clips", [2, 10, 100_000])
def test_batches_divide_and_lengths_follow_from_the_clips(ranks: int, clips: int) -> None:
    for phase in _phases(ranks=ranks, clips=clips):
        assert phase.global_batch_size % ranks == 0
        assert phase.global_batch_size <= max(clips, ranks)
        assert 2_000 <= phase.updates <= 50_000
        assert phase.warmup_updates < phase.updates


def test_of_few_clips_more_are_held_out() -> None:
    assert [held_out_share(clips) for clips in (2, 16, 40, 1000)] == [0.25, 0.25, 0.1, 0.05]


@pytest.mark.parametrize(
    "text", ["clips", "/data/my clips", "true", "a: b", "..", "0012", "Ünicode", 'a"b', "./x"]
)
def test_paths_are_read_back_as_they_were(text: str) -> None:
    assert read_yaml(f"key: {quoted(text)}\n".encode(), "test") == {"key": text}
