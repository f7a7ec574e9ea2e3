"""Map-style datasets that answer a `ClipRequest`: which clip, how long, how large, augmented or not.

Owns the choice of start, crop and flip as pure functions of (seed, sample, epoch), so that a resumed run sees
the clips of an uninterrupted one; decoding is `decode/video.py`'s, the order of requests the sampler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.data.own.items import VIDEO, ItemKind, video_of
from aiprod_ds.data.own.values import ValueCheck, ValueRange, to_signed
from aiprod_ds.decode.fit import fit_clip
from aiprod_ds.decode.pixels import BLACK, Color
from aiprod_ds.decode.video import decode_clip, max_start_seconds
from aiprod_ds.decode.whole import read_video_to_end
from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

_EPSILON = 1e-6
_PIECE_FRAMES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """One clip to deliver: frames, pixels and rate (None keeps the clip's own). Without `augment` it is the
    centre clip."""

    sample_index: int
    epoch: int
    frames: int
    height: int
    width: int
    frame_rate_hz: float | None = None
    augment: bool = True
    flip: bool = False


ClipSample = Mapping[str, torch.Tensor]
"""What a request yields, by name: `video` [3,T,H,W] or `audio` [C,N], float32 in [-1,1]."""


class ClipSource(Protocol):
    """What the loader needs of a dataset."""

    def __getitem__(self, request: ClipRequest, /) -> ClipSample:
        """Returns the requested clip, always the same for the same request.

        Raises:
            DataError: If there is no such clip or it cannot be read.
        """


class ClipDataset(ClipSource, Protocol):
    """Clips that answer requests, and what is known of each of them."""

    def lengths(self) -> Sequence[ClipFacts]:
        """Returns what the plan's rules need to know of every clip, in order."""


class MapDataset(Protocol):
    """Any map-style dataset: `torch.utils.data.Dataset` with a length, or a list."""

    def __len__(self) -> int:
        """Returns the number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """Returns one item."""


class VideoClipDataset:
    """Clips of a manifest's files, decoded when asked for.

    Args:
        manifest: From `scan` of videos or images; `ClipRequest.sample_index` counts its records.
        seed: With sample and epoch it decides start, crop and flip.
        background: RGB behind transparent pixels.
    """

    def __init__(self, manifest: Manifest, *, seed: int, background: Color = BLACK) -> None:
        self._manifest = manifest
        self._seed = seed
        self._background = background

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self._manifest.records)

    def __getitem__(self, request: ClipRequest) -> ClipSample:
        """See `ClipSource.__getitem__`.

        Raises:
            DataError: If the file is too short for the request or cannot be decoded.
        """
        record = self._manifest.records[request.sample_index]
        # Resampling at the file's own rate yields its frames one by one, and is right for files of variable
        # rate too.
        rate_hz = record.fps if request.frame_rate_hz is None else request.frame_rate_hz
        latest_frame = int(max_start_seconds(record, request.frames, rate_hz) * record.fps + _EPSILON)
        with self._manifest.file(record.path) as path:
            frames_THWC = decode_clip(
                path,
                start_seconds=record.start_seconds + _start(self._seed, request, latest_frame) / record.fps,
                num_frames=request.frames,
                frame_rate_hz=rate_hz,
                background=self._background,
                crop=record.crop,
                end_seconds=record.end_seconds,
            )
        return _sample(frames_THWC, self._seed, request, displayed=(record.height, record.width))

    def read_whole(self, index: int) -> None:
        """Decodes every frame of a file.

        Raises:
            DataError: If one cannot be decoded.
        """
        record = self._manifest.records[index]
        with self._manifest.file(record.path) as path:
            if record.start_seconds == 0 and record.end_seconds is None:
                read_video_to_end(path, frames=record.frames)
                return
            # A scene of a film, whose other scenes may be damaged.
            for first in range(0, record.frames, _PIECE_FRAMES):
                decode_clip(
                    path,
                    start_seconds=record.start_seconds + first / record.fps,
                    end_seconds=record.end_seconds,
                    num_frames=min(_PIECE_FRAMES, record.frames - first),
                    frame_rate_hz=record.fps,
                    background=self._background,
                    crop=record.crop,
                )

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; opens no file."""
        return [
            ClipFacts(
                name=record.name,
                frames=record.frames,
                seconds=record.seconds,
                height=record.height,
                width=record.width,
            )
            for record in self._manifest.records
        ]


class ItemReader(Protocol):
    """Makes clips of the items of a user's own data, whatever holds them."""

    @property
    def kind(self) -> ItemKind:
        """What the items look like."""

    @property
    def value_range(self) -> ValueRange | None:
        """The range that was declared for their values."""

    def values(self, item: Any, name: str) -> torch.Tensor:
        """Returns the tensor that an item is about, in its own type and range.

        Raises:
            DataError: If the item has another form; `name` says which.
        """

    def facts(self, item: Any, name: str) -> ClipFacts:
        """Returns what the plan's rules need to know of an item.

        Raises:
            DataError: If the item has another form.
        """

    def clip(self, item: Any, request: ClipRequest, name: str) -> ClipSample:
        """Returns the requested clip of an item.

        Raises:
            DataError: If the item has another form, does not have what is asked for, or is not finite.
        """


class ItemDataset:
    """A user's map-style dataset, answering requests.

    Args:
        dataset: Items as the reader takes them.
        reader: Of their kind.
        indices: Which items count, in this order; None: all. `ClipRequest.sample_index` counts these.
        is_held_out: Whether nothing is learned from them.
    """

    def __init__(
        self,
        dataset: MapDataset,
        reader: ItemReader,
        *,
        indices: Sequence[int] | None = None,
        is_held_out: bool = False,
    ) -> None:
        self._is_held_out = is_held_out
        self._dataset = dataset
        self._reader = reader
        self._indices = indices
        self._lengths: Sequence[ClipFacts] | None = None
        self._notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self._dataset) if self._indices is None else len(self._indices)

    def __getitem__(self, request: ClipRequest) -> ClipSample:
        """See `ClipSource.__getitem__`.

        Raises:
            DataError: As `ItemReader.clip`.
        """
        index = self._own_index(request.sample_index)
        return self._reader.clip(self._dataset[index], request, self._name(index))

    def lengths(self) -> Sequence[ClipFacts]:
        """See `ClipDataset.lengths`; the first call reads each item once and looks at the first ones' values.

        Raises:
            DataError: If an item has another form, or the first ones' values cannot be right.
        """
        if self._lengths is None:
            reader = self._reader
            check = ValueCheck(reader.kind.key, reader.value_range, is_held_out=self._is_held_out)
            self._lengths = [self._facts(place, check) for place in range(len(self))]
            self._notes = check.judge()
        return self._lengths

    def notes(self) -> tuple[str, ...]:
        """Returns what is doubtful about the first items' values, in words."""
        self.lengths()
        return self._notes

    def part(self, places: Sequence[int]) -> ItemDataset:
        """Returns the items at `places` alone, under the names that they have here."""
        found, known = ItemDataset(self._dataset, self._reader, indices=list(places)), self.lengths()
        found._lengths = [known[place] for place in places]
        return found

    def _name(self, index: int) -> str:
        return f"{'validation' if self._is_held_out else 'dataset'}[{index}]"

    def _own_index(self, place: int) -> int:
        return place if self._indices is None else self._indices[place]

    def _facts(self, place: int, check: ValueCheck) -> ClipFacts:
        index = self._own_index(place)
        item, name = self._dataset[index], self._name(index)
        if not check.is_full:
            check.see(self._reader.values(item, name), name)
        return self._reader.facts(item, name)


class VideoItems:
    """Reads items that are whole clips; see `items.VIDEO` for what they may be.

    Args:
        seed: With sample and epoch it decides start, crop and flip.
        value_range: Of floating pixels; see `values.to_signed`.
    """

    kind = VIDEO

    def __init__(self, *, seed: int, value_range: ValueRange | None = None) -> None:
        self._seed = seed
        self.value_range = value_range

    def values(self, item: Any, name: str) -> torch.Tensor:
        """See `ItemReader.values`."""
        return video_of(item, name)[0]

    def facts(self, item: Any, name: str) -> ClipFacts:
        """See `ItemReader.facts`; an item without `fps` counts as one frame a second."""
        video_CTHW, fps = video_of(item, name)
        _, frames, height, width = video_CTHW.shape
        return ClipFacts(name=name, frames=frames, seconds=frames / (fps or 1.0), height=height, width=width)

    def clip(self, item: Any, request: ClipRequest, name: str) -> ClipSample:
        """See `ItemReader.clip`.

        Raises:
            DataError: If the item is no clip, has too few frames, has no `fps` where a rate is asked for, or
                holds NaN or infinity.
        """
        video_CTHW, fps = video_of(item, name)
        step = _step(request, fps, name)
        latest_frame = int(video_CTHW.shape[1] - request.frames * step + _EPSILON)
        if video_CTHW.shape[1] - request.frames * step < -_EPSILON:
            raise DataError(
                f"{name}: must have {request.frames} frames, "
                f"got {int(video_CTHW.shape[1] / step + _EPSILON)}. Ask for fewer frames or drop the item."
            )
        start = _start(self._seed, request, latest_frame)
        indices = [
            min(int(start + index * step + 0.5), video_CTHW.shape[1] - 1) for index in range(request.frames)
        ]
        sample = _sample(self._fit_for(video_CTHW[:, indices]), self._seed, request)
        # uint8 cannot be anything else; the clamp to [-1,1] leaves NaN and hides infinity.
        if video_CTHW.is_floating_point() and not bool(video_CTHW[:, indices].isfinite().all()):
            raise DataError(f"{name}: pixels must be finite, got NaN or infinity. Repair or drop the item.")
        return sample

    def _fit_for(self, frames_CTHW: torch.Tensor) -> torch.Tensor:
        """Returns the frames as `fit_clip` takes them: bytes stay bytes, which it converts one frame at a
        time."""
        if frames_CTHW.dtype == torch.uint8:
            # Contiguous by channels, or scaling would add in another order than for floating clips.
            return frames_CTHW.contiguous().permute(1, 2, 3, 0)
        return to_signed(frames_CTHW, self.value_range)


class TensorVideoDataset(ItemDataset):
    """A user's dataset of whole clips, answering requests.

    Args:
        dataset: Items as `VideoItems` reads them: of floating or uint8 pixels, [3,T,H,W] or another order
            that the shape tells, or mappings with one under `video` and optionally its rate under `fps`,
            which requests with a `frame_rate_hz` need.
        seed: With sample and epoch it decides start, crop and flip.
        value_range: Of floating pixels; None: [-1,1].
    """

    def __init__(self, dataset: MapDataset, *, seed: int, value_range: ValueRange | None = None) -> None:
        super().__init__(dataset, VideoItems(seed=seed, value_range=value_range))


def _step(request: ClipRequest, fps: float | None, name: str) -> float:
    """Returns how many frames of the item lie between two frames of the clip."""
    if request.frame_rate_hz is None or request.frames == 1:
        return 1.0
    if fps is None:
        raise DataError(
            f"{name}: must state its rate under 'fps' for clips at {request.frame_rate_hz:g} Hz, "
            "got none. Add 'fps' to the item or remove frame_rate_hz."
        )
    return fps / request.frame_rate_hz


def _clip_seed(seed: int, request: ClipRequest, purpose: str) -> int:
    # One stream a purpose: the same generator for both would tie where a clip starts to where it is cropped.
    return stream_seed(stream_seed(seed, "clip", request.sample_index, request.epoch), purpose)


def _start(seed: int, request: ClipRequest, latest_frame: int) -> int:
    if not request.augment:
        return latest_frame // 2
    return int(np.random.default_rng(_clip_seed(seed, request, "start")).integers(latest_frame + 1))


def _sample(
    frames: Any, seed: int, request: ClipRequest, *, displayed: tuple[int, int] | None = None
) -> ClipSample:
    crop_seed = _clip_seed(seed, request, "crop") if request.augment else None
    video_CTHW = fit_clip(
        frames,
        height=request.height,
        width=request.width,
        seed=crop_seed,
        flip=request.flip,
        displayed=displayed,
    )
    return {"video": video_CTHW}
