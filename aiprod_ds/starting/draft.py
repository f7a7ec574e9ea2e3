"""What a first configuration says, before it is text: what is trained, on what, and the phases.

Owns the choice of shapes, batches, lengths and rates for a folder of media; whether they fit a GPU is
`fit.py`'s, the text `write.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.starting.look import Facts

CPU = "cpu"
_NAMES = ("low", "medium", "high")
_LEAST_GROWTH = 1.2  # of a side, or of a length, from one phase to the next
_HELD_OUT = 4  # clips at least, of which a measure says something, as far as there are enough
_MOST_HELD_OUT = 0.25


class Kind(str, Enum):
    """What can be trained."""

    VIDEO_VAE = "video_vae"
    AUDIO_VAE = "audio_vae"
    LTX_LORA = "ltx_lora"
    LTX_FULL = "ltx_full"

    @property
    def is_diffusion(self) -> bool:
        """Whether latents are trained on, which are encoded before."""
        return self in {Kind.LTX_LORA, Kind.LTX_FULL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for.

    Attributes:
        data: As it was typed.
        machine: A name of `aiprod_ds.planner.hardware.MACHINES`, or `cpu`.
        ranks: GPUs, or processes of a CPU.
        model: Folder or hub name of trained weights; None starts a VAE from random ones.
    """

    kind: Kind
    file: Path
    data: str
    machine: str
    ranks: int
    model: str | None
    output_dir: str

    @property
    def encode_file(self) -> Path:
        """The configuration of `encode` that goes with one of a transformer."""
        return self.file.with_name(f"{self.file.stem}_encode.yaml")

    @property
    def precision(self) -> str:
        """In which the machine computes."""
        if self.machine == CPU:
            return "fp32"
        return "fp16" if self.machine.startswith("v100") else "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDraft:
    """One phase; the micro-batch and the recomputation are unknown until `fit`.

    Attributes:
        height: 0 of sound.
        width: Likewise.
        length: Frames, of sound samples.
    """

    name: str
    height: int
    width: int
    length: int
    global_batch_size: int
    updates: int
    learning_rate: float
    warmup_updates: int
    micro_batch_size: int | None = None
    is_recomputed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What a kind of run begins with, one entry a phase.

    Attributes:
        sides: Of a square of the same area, in pixels.
        lengths: In frames, of sound in seconds.
        batches: Clips a rank.
        passes: Over all clips.
        updates: The least and the most.
    """

    sides: tuple[int, ...] = (0, 0, 0)
    lengths: tuple[float, ...]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    passes: tuple[int, ...]
    updates: tuple[int, int]


_ON_GPUS = {
    Kind.VIDEO_VAE: _Recipe(
        sides=(256, 512, 1024), lengths=(9, 17, 49), batches=(16, 8, 4), rates=(1e-4, 5e-5, 2e-5),
        passes=(200, 100, 50), updates=(2_000, 50_000),
    ),
    Kind.AUDIO_VAE: _Recipe(
        lengths=(1.5, 3.0, 6.0), batches=(32, 16, 8), rates=(1e-4, 5e-5, 2e-5), passes=(400, 200, 100),
        updates=(2_000, 100_000),
    ),
    Kind.LTX_LORA: _Recipe(
        sides=(256, 512, 768), lengths=(9, 25, 49), batches=(8, 4, 2), rates=(2e-4, 1e-4, 5e-5),
        passes=(40, 30, 20), updates=(500, 5_000),
    ),
    Kind.LTX_FULL: _Recipe(
        sides=(256, 512, 768), lengths=(9, 25, 49), batches=(16, 8, 4), rates=(1e-4, 5e-5, 2e-5),
        passes=(100, 60, 40), updates=(2_000, 50_000),
    ),
}  # fmt: skip
_ON_CPU = {
    Kind.VIDEO_VAE: _Recipe(
        sides=(64, 96, 128), lengths=(9, 17, 17), batches=(2, 1, 1), rates=(2e-3, 1e-3, 5e-4),
        passes=(100, 20, 10), updates=(30, 300),
    ),
    Kind.AUDIO_VAE: _Recipe(
        lengths=(0.25, 1.0), batches=(2, 2), rates=(3e-3, 1e-3), passes=(200, 20), updates=(60, 600),
    ),
    Kind.LTX_LORA: _Recipe(
        sides=(64, 96), lengths=(9, 17), batches=(2, 2), rates=(2e-4, 1e-4), passes=(50, 10),
        updates=(20, 200),
    ),
    Kind.LTX_FULL: _Recipe(
        sides=(64, 96), lengths=(9, 17), batches=(2, 2), rates=(1e-3, 5e-4), passes=(50, 10),
        updates=(20, 200),
    ),
}  # fmt: skip


def phases_for(
    wish: Wish, facts: Facts, strides: ModelStrides, *, sample_rate_hz: int = 0
) -> tuple[PhaseDraft, ...]:
    """Returns phases that grow as far as nine of ten clips do.

    Args:
        wish: What is trained, and where. facts: Of the media. strides: Of the VAE; pictures are multiples of
        the spatial one, films 1 + k times the temporal one, sounds multiples of the temporal one.
        sample_rate_hz: Of sound.
    """
    recipe = (_ON_CPU if wish.machine == CPU else _ON_GPUS)[wish.kind]
    shapes: list[tuple[int, int, int]] = []
    places: list[int] = []
    for index, length in enumerate(recipe.lengths):
        if wish.kind is Kind.AUDIO_VAE:
            shape = (0, 0, _samples(length, facts, strides, sample_rate_hz))
        else:
            shape = (*_frame(recipe.sides[index], facts, strides), _frames(int(length), facts, strides))
        if not shapes or _has_grown(shapes[-1], shape):
            shapes.append(shape)
            places.append(index)
    return tuple(
        _phase(recipe, place, _NAMES[number], shape, wish.ranks, facts.clips)
        for number, (place, shape) in enumerate(zip(places, shapes, strict=True))
    )


def held_out_share(clips: int) -> float:
    """Returns the share of clips to hold out: 5 %, and of few clips more."""
    return round(min(_MOST_HELD_OUT, max(0.05, _HELD_OUT / clips)), 3)


def _phase(
    recipe: _Recipe, place: int, name: str, shape: tuple[int, int, int], ranks: int, clips: int
) -> PhaseDraft:
    per_rank = recipe.batches[place]
    while per_rank > 1 and per_rank * ranks > clips:
        per_rank //= 2
    batch = per_rank * ranks
    least, most = recipe.updates
    updates = _rounded(min(most, max(least, recipe.passes[place] * clips // batch)))
    height, width, length = shape
    return PhaseDraft(
        name=name,
        height=height,
        width=width,
        length=length,
        global_batch_size=batch,
        updates=updates,
        learning_rate=recipe.rates[place],
        warmup_updates=max(1, updates // 50),
    )


def _frame(side: int, facts: Facts, strides: ModelStrides) -> tuple[int, int]:
    """Returns height and width of the usual shape, or of a square where clips have many; no clip of nine in
    ten is enlarged by more than the rounding."""
    aspect = 1.0 if facts.is_mixed else facts.aspect
    short = side / max(aspect, 1 / aspect) ** 0.5
    short = _multiple(min(short, facts.short_side), strides.spatial)
    long = _multiple(short * max(aspect, 1 / aspect), strides.spatial)
    return (short, long) if aspect >= 1 else (long, short)


def _frames(wanted: int, facts: Facts, strides: ModelStrides) -> int:
    frames: int = strides.fit(min(wanted, max(1, facts.frames)))
    return frames


def _samples(seconds: float, facts: Facts, strides: ModelStrides, rate_hz: int) -> int:
    return _multiple(min(seconds, facts.seconds) * rate_hz, strides.temporal)


def _multiple(value: float, stride: int) -> int:
    return max(1, int(value / stride + 1e-6)) * stride


def _has_grown(before: Sequence[int], now: Sequence[int]) -> bool:
    return any(new >= _LEAST_GROWTH * old for old, new in zip(before, now, strict=True) if old)


def _rounded(number: int) -> int:
    """Returns two digits and zeros."""
    step = int("1".ljust(max(1, len(str(number)) - 1), "0"))
    return max(1, number // step * step)
