"""Held-out clips through the model, spread over ranks: what evaluation measures and what the latents'
statistics are taken of. A clip that cannot be read is left out by name and ends nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from aiprod_ds import progress
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.dataset import ClipSample
from aiprod_ds.data.reading.replacing import UnreadClip
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.metrics.evaluations import EVERY_MEASURE, NotJudged
from aiprod_ds.trainers.clip_data import ClipData

_LOG = logging.getLogger(__name__)
NOTHING_READ = "no held-out clip could be read"


class Quality(Protocol):
    """An accumulator of measures whose states add up."""

    def state(self) -> Tensor:
        """Returns the sums so far."""

    def merge(self, state: Tensor) -> None:
        """Adds the sums of another accumulator."""


_Quality = TypeVar("_Quality", bound=Quality)
_Shown = TypeVar("_Shown")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutClip:
    """One clip through the model, on the engine's device in fp32.

    Attributes:
        place: Its number among all that are measured.
        original: [1, ...] in [-1, 1], as the dataset gives it.
        output: What the module returns first, usually the reconstruction.
        mean: The posterior's mean, [1, channels, ...].
    """

    place: int
    original: Tensor
    output: Tensor
    mean: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSlot:
    """One item for this rank to run forward.

    Attributes:
        place: Its number among all that are measured.
        item: As the dataset gives it, on the CPU.
        is_own: Whether this rank measures it; else it is another one's, or stands in for one that cannot be
            read, run only to keep the ranks together.
    """

    place: int
    item: ClipSample
    is_own: bool


def evaluation_slots(
    engine: Engine,
    data: ClipData,
    bucket: BucketPlan,
    *,
    max_clips: int,
    unread: dict[int, str],
    go_on: Callable[[], None] = lambda: None,
) -> Iterator[EvaluationSlot]:
    """Yields this rank's part of the first `max_clips` held-out clips in the bucket's shape.

    As many slots on every rank, because ZeRO-3 gathers in each forward. Draws nothing from the training's
    random streams.

    Args:
        engine: Says which ranks there are.
        data: Of the run.
        bucket: The shape.
        max_clips: The most that are measured by all ranks together.
        unread: Gets the places of this rank's clips that cannot be read, and why; for `without_unread`.
        go_on: Called before each slot, on all ranks; see `EvaluationRequest`.

    Raises:
        DataError: If neither a held-out clip nor a training clip can be read.
    """
    clips = data.held_out(bucket)[:max_clips]
    with progress.counting("evaluating clip", len(clips)) as shown:
        for slot in range(-(-len(clips) // engine.world_size)):
            go_on()
            place = slot * engine.world_size + engine.rank
            last = len(clips) - 1
            is_own, found = place <= last, data.try_held_out(clips[min(place, last)], bucket)
            if isinstance(found, UnreadClip):
                if is_own:
                    unread[place] = found.reason
                is_own, found = False, data.readable_clip(bucket)
            yield EvaluationSlot(place=place, item=found, is_own=is_own)
            shown.advance(min(engine.world_size, len(clips) - slot * engine.world_size))


def measured_names(data: ClipData, bucket: BucketPlan, *, max_clips: int) -> tuple[str, ...]:
    """Returns the names of the clips of `evaluation_slots`, by place."""
    return tuple(data.validation_clips[index].name for index in data.held_out(bucket)[:max_clips])


def without_unread(
    names: Sequence[str], unread: dict[int, str]
) -> tuple[tuple[str, ...], tuple[NotJudged, ...]]:
    """Returns which clips were measured, and which could not be read by their rank. Collective.

    Args:
        names: Of all that were to be measured, by place.
        unread: Of this rank, from `evaluation_slots`.
    """
    reasons = {place: reason for part in dist.gather_objects(unread) for place, reason in part.items()}
    left_out = tuple(
        NotJudged(clip=names[place], measure=EVERY_MEASURE, reason=reasons[place])
        for place in sorted(reasons)
    )
    for entry in left_out:
        _LOG.warning("held_out_clip_unread name=%s reason=%s", entry.clip, entry.reason)
    return tuple(name for place, name in enumerate(names) if place not in reasons), left_out


@torch.no_grad()
def held_out_clips(
    engine: Engine,
    data: ClipData,
    bucket: BucketPlan,
    *,
    name: str,
    dtype: torch.dtype,
    max_clips: int,
    unread: dict[int, str],
    go_on: Callable[[], None] = lambda: None,
) -> Iterator[HeldOutClip]:
    """Yields the clips of `evaluation_slots` through a VAE, with the posterior's mode. Collective: exhaust it
    on every rank.

    Args:
        engine: In evaluation mode; its module returns (output, mean, logvar).
        data: Of the run.
        bucket: The shape.
        name: Of the tensor in the dataset's items: `video` or `audio`.
        dtype: In which the module wants it.
        max_clips: The most that are measured by all ranks together.
        unread: As in `evaluation_slots`.
        go_on: Likewise.
    """
    slots = evaluation_slots(engine, data, bucket, max_clips=max_clips, unread=unread, go_on=go_on)
    for slot in slots:
        original = slot.item[name][None].to(engine.device)
        output, mean, _ = engine(original.to(dtype))
        if slot.is_own:
            yield HeldOutClip(place=slot.place, original=original, output=output.float(), mean=mean.float())


def over_ranks(engine: Engine, own: _Quality, empty: _Quality) -> _Quality:
    """Returns `empty` filled with what all ranks have accumulated in `own`. Collective."""
    empty.merge(dist.reduce_mean(own.state().to(engine.device)).cpu() * engine.world_size)
    return empty


def gather_shown(shown: dict[int, _Shown]) -> list[_Shown]:
    """Returns what every rank wants to show, in the order of its places, on every rank. Collective."""
    gathered: list[dict[int, Any]] = dist.gather_objects(shown)
    return [value for _, value in sorted(item for part in gathered for item in part.items())]
