"""What people's items and batches are, and the one form that the rest of the package reads.

Owns axis orders, keys of mappings and how a batch is cut into items. What values mean is `values.py`'s; time,
size and rate are the datasets'. Shapes: B batch, C channels, T frames, H height, W width, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aiprod_ds.errors import DataError

_FRAME_RATES = ("fps", "frame_rate_hz")
_SAMPLE_RATES = ("sample_rate_hz", "sample_rate", "sampling_rate")
_MANY_ROWS = 64  # more channels has no sound, fewer samples no clip
_PICTURE_MODES = ("RGB", "L")


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemKind:
    """What an item of one kind looks like.

    Attributes:
        key: Of a mapping: where the tensor is.
        dims: Numbers of axes that the tensor of an item may have; a batch has one more.
        wanted: The accepted forms, in words, for messages.
    """

    key: str
    dims: tuple[int, ...]
    wanted: str


VIDEO = ItemKind(
    key="video",
    dims=(3, 4),
    wanted="a tensor or array [3,T,H,W] (or [T,3,H,W], [T,H,W,3]; of one picture [3,H,W] or [H,W,3]), "
    "floating or uint8, or a mapping with one under 'video'",
)
AUDIO = ItemKind(
    key="audio",
    dims=(1, 2),
    wanted="a tensor or array [N] or [C,N], floating or int16, or a mapping with one under 'audio'",
)
LATENTS = ItemKind(key="latents", dims=(4,), wanted="a mapping with latents [C,F,H,W]")


def video_of(item: Any, name: str) -> tuple[Tensor, float | None]:
    """Returns the frames [3,T,H,W] of an item, in its own type and range, and its frames per second if it
    says them.

    Args:
        item: As `VIDEO.wanted` says, a PIL picture, or a sequence of PIL pictures: the frames.
        name: How messages name it.

    Raises:
        DataError: If it is none of these, or the shape does not tell which axis holds the channels.
    """
    payload, fps = _content(item, VIDEO, _FRAME_RATES)
    video = _as_tensor(payload)
    if video is None or not _is_number(video, torch.uint8) or video.ndim not in VIDEO.dims:
        raise _wrong(item, payload, name, VIDEO)
    video = video if video.ndim == 4 else _one_picture(video, payload, name)
    return _with_channels_first(video, name), fps


def sound_of(item: Any, name: str) -> tuple[Tensor, int | None]:
    """Returns the samples [C,N] of an item, in its own type and range, and its sample rate if it says one.

    Args:
        item: As `AUDIO.wanted` says; under 'audio' may also be a mapping with 'array' and 'sampling_rate'.
        name: How messages name it.

    Raises:
        DataError: If it is none of these, or holds more channels than samples.
    """
    payload, rate_hz = _content(item, AUDIO, _SAMPLE_RATES)
    wave = _as_tensor(payload)
    if wave is None or not _is_number(wave, torch.int16) or wave.ndim not in AUDIO.dims or not wave.numel():
        raise _wrong(item, payload, name, AUDIO)
    if wave.ndim == 2 and wave.shape[0] > max(wave.shape[1], _MANY_ROWS):
        raise DataError(
            f"{name}: sound must be [C,N], channels before samples, got {list(wave.shape)}. Transpose it; a "
            "batch [B,N] must come from a DataLoader, or be given to ClipIterable with yields='batches'."
        )
    return wave.reshape(-1, wave.shape[-1]), None if rate_hz is None else int(rate_hz)


def latents_of(item: Any, name: str) -> dict[str, Tensor]:
    """Returns the tensors of an item of latents and embeddings, and `fps` where it has one.

    Raises:
        DataError: If it is no mapping with latents [C,F,H,W].
    """
    latents = _as_tensor(item.get("latents")) if isinstance(item, Mapping) else None
    if latents is None or latents.ndim != 4:
        if isinstance(item, Mapping) and ("video" in item or "audio" in item):
            raise DataError(
                f"{name}: must be a mapping with latents [C,F,H,W], got media under {sorted(item)}. A "
                "transformer trains on latents: encode media first (aiprod-ds encode)."
            )
        found = item.get("latents") if isinstance(item, Mapping) else None
        got = type(item).__name__ if found is None else list(getattr(found, "shape", ()))
        raise DataError(f"{name}: must be a mapping with latents [C,F,H,W], got {got}. Return one.")
    tensors = {key: _as_tensor(value) for key, value in item.items() if key != "fps"}
    return {key: value for key, value in tensors.items() if value is not None}


def items_of(element: Any, kind: ItemKind, *, is_batch: bool | None, is_collated: bool = False) -> list[Any]:
    """Returns the items that one element of an iterable consists of, in order.

    Args:
        element: An item, or a batch: a tensor with one axis more than an item's, a mapping of such tensors
            (and of lists, one entry an item), or a sequence of items.
        kind: What the items are.
        is_batch: Whether it is a batch; None: it is one if its shape says so.
        is_collated: Whether torch's `default_collate` made it: a sequence then holds the fields of a batch.

    Raises:
        DataError: If a batch has several fields without names.
    """
    if isinstance(element, list | tuple):
        if is_collated and len(element) > 1:
            raise DataError(
                f"dataset: a batch of {kind.key} must be one tensor or a mapping, got a sequence of "
                f"{len(element)} fields. Let items be mappings with {kind.key!r} and what belongs to it."
            )
        if is_collated or (len(element) == 1 and _is_stack(element[0], kind, is_batch=None)):
            return items_of(element[0], kind, is_batch=is_batch)
        return [element] if _are_pictures(element) and not is_batch else list(element)
    if not _is_stack(element, kind, is_batch=is_batch):
        return [element]
    payload = _payload(element, kind)
    size = len(payload)
    if isinstance(element, Mapping):
        return [{key: _at(value, index, size) for key, value in element.items()} for index in range(size)]
    return [element[index] for index in range(size)]


def _is_stack(element: Any, kind: ItemKind, *, is_batch: bool | None) -> bool:
    payload = _payload(element, kind)
    ndim = getattr(payload, "ndim", None)
    if ndim is None:
        return bool(is_batch) and isinstance(element, Mapping) and isinstance(payload, list)
    return ndim > max(kind.dims) or (bool(is_batch) and ndim - 1 in kind.dims)


def _payload(element: Any, kind: ItemKind) -> Any:
    payload = element.get(kind.key) if isinstance(element, Mapping) else element
    return payload.get("array") if isinstance(payload, Mapping) else payload


def _at(value: Any, index: int, size: int) -> Any:
    """Returns one item's part of what a batch says; what is not one entry an item belongs to all."""
    if isinstance(value, Mapping):
        return {key: _at(part, index, size) for key, part in value.items()}
    is_listed = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
    if not is_listed or len(value) not in {1, size}:
        return value
    return value[index if len(value) == size else 0]


def _content(item: Any, kind: ItemKind, rates: Sequence[str]) -> tuple[Any, float | None]:
    if isinstance(item, list | tuple) and len(item) == 1:
        item = item[0]  # as a TensorDataset gives
    if not isinstance(item, Mapping):
        return item, None
    payload, rate = item.get(kind.key), next((item[key] for key in rates if item.get(key) is not None), None)
    if isinstance(payload, Mapping):
        rate = next((payload[key] for key in rates if payload.get(key) is not None), rate)
        payload = payload.get("array")
    return payload, None if rate is None else float(rate)


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if _are_pictures(value):
        value = np.stack([_pixels(picture) for picture in value])
    elif _is_picture(value):
        value = _pixels(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return None
    # torch refuses what cannot be written to, as an array from a file may be, and negative strides.
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def _is_picture(value: Any) -> bool:
    # PIL is asked for by what its pictures have, so that nothing is imported for those who do not use it.
    return all(hasattr(value, name) for name in ("mode", "size", "convert", "getpixel"))


def _are_pictures(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_picture, value))


def _pixels(picture: Any) -> Any:
    if picture.mode not in _PICTURE_MODES:
        raise DataError(
            f"dataset: a PIL picture must be of mode {' or '.join(_PICTURE_MODES)}, got {picture.mode}. "
            "Convert it, transparent ones onto a background."
        )
    return np.array(picture.convert("RGB"))


def _is_number(value: Tensor, integer: torch.dtype) -> bool:
    return value.is_floating_point() or value.dtype == integer


def _one_picture(picture: Tensor, payload: Any, name: str) -> Tensor:
    """Returns a clip [3,1,H,W] of one picture."""
    if picture.shape[2] == 3 and picture.shape[0] != 3:
        return picture.permute(2, 0, 1)[:, None]
    if picture.shape[0] == 3 and picture.shape[2] != 3:
        return picture[:, None]
    raise _wrong(payload, payload, name, VIDEO)


_TO_CTHW: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "[3,T,H,W]": (0, lambda video: video),
    "[T,3,H,W]": (1, lambda video: video.transpose(0, 1)),
    "[T,H,W,3]": (3, lambda video: video.permute(3, 0, 1, 2)),
}


def _with_channels_first(video: Tensor, name: str) -> Tensor:
    fitting = [order for order, (axis, _) in _TO_CTHW.items() if video.shape[axis] == 3]
    # [3,T,H,W] has always been the form of floating clips; of uint8 clips nobody has promised one.
    is_doubtful = len(fitting) != 1 and not (fitting[:1] == ["[3,T,H,W]"] and video.is_floating_point())
    if is_doubtful:
        got = f"{list(video.shape)}, which may be {' or '.join(fitting)}" if fitting else list(video.shape)
        raise DataError(
            f"{name}: a clip must have 3 channels in one of the orders {', '.join(_TO_CTHW)}, got {got}. "
            + (
                "Give it as floating [3,T,H,W] (uint8 / 127.5 - 1)."
                if fitting
                else "Repeat grey, drop alpha, or permute the axes."
            )
        )
    return _TO_CTHW[fitting[0]][1](video)


def _wrong(item: Any, payload: Any, name: str, kind: ItemKind) -> DataError:
    if isinstance(payload, Tensor | np.ndarray):
        got = f"{list(payload.shape)} {payload.dtype}"
    elif isinstance(item, Mapping):
        got = f"a mapping with {sorted(map(str, item))}"
    else:
        got = type(item).__name__
    return DataError(f"{name}: must be {kind.wanted}, got {got}. Convert the item.")
