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
from aiprod_ds.decode.fit import fit_clip
from aiprod_ds.decode.pixels import BLACK, Color
from aiprod_ds.decode.video import decode_clip, max_start_seconds
from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

_EPSILON = 1e-6


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
                start_seconds=_start(self._seed, request, latest_frame) / record.fps,
                num_frames=request.frames,
                frame_rate_hz=rate_hz,
                background=self._background,
                crop=record.crop,
            )
        return _sample(frames_THWC, self._seed, request, displayed=(record.height, record.width))

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; opens no file."""
        return [
            ClipFacts(
                name=record.path,
                frames=record.frames,
                seconds=record.seconds,
                height=record.height,
                width=record.width,
            )
            for record in self._manifest.records
        ]


class TensorVideoDataset:
    """A user's dataset of whole clips, answering the same requests.

    Args:
        dataset: Items are floating tensors [3,T,H,W] in [-1,1], or mappings with one under `video` and
            optionally its rate under `fps`, which requests with a `frame_rate_hz` need.
        seed: With sample and epoch it decides start, crop and flip.
    """

    def __init__(self, dataset: MapDataset, *, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._lengths: list[ClipFacts] | None = None

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self._dataset)

    def __getitem__(self, request: ClipRequest) -> ClipSample:
        """See `ClipSource.__getitem__`.

        Raises:
            DataError: If the item is no clip, has too few frames, or has no `fps` where a rate is asked for.
        """
        video_CTHW, fps = self._item(request.sample_index)
        step = self._step(request, fps)
        latest_frame = int(video_CTHW.shape[1] - request.frames * step + _EPSILON)
        if video_CTHW.shape[1] - request.frames * step < -_EPSILON:
            raise DataError(
                f"dataset[{request.sample_index}]: must have {request.frames} frames, "
                f"got {int(video_CTHW.shape[1] / step + _EPSILON)}. Ask for fewer frames or drop the item."
            )
        start = _start(self._seed, request, latest_frame)
        indices = [
            min(int(start + index * step + 0.5), video_CTHW.shape[1] - 1) for index in range(request.frames)
        ]
        return _sample(video_CTHW[:, indices], self._seed, request)

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; the first call reads each item once.

        An item without `fps` counts as one frame a second.
        """
        if self._lengths is None:
            self._lengths = [self._facts(index) for index in range(len(self._dataset))]
        return self._lengths

    def _facts(self, index: int) -> ClipFacts:
        video_CTHW, fps = self._item(index)
        _, frames, height, width = video_CTHW.shape
        return ClipFacts(
            name=f"dataset[{index}]", frames=frames, seconds=frames / (fps or 1.0), height=height, width=width
        )

    def _item(self, index: int) -> tuple[torch.Tensor, float | None]:
        item = self._dataset[index]
        is_mapping = isinstance(item, Mapping)
        video = item.get("video") if is_mapping else item
        fps = item.get("fps") if is_mapping else None
        if (
            not isinstance(video, torch.Tensor)
            or not video.is_floating_point()
            or video.ndim != 4
            or video.shape[0] != 3
        ):
            got = (
                f"{list(video.shape)} {video.dtype}"
                if isinstance(video, torch.Tensor)
                else type(video).__name__
            )
            raise DataError(
                f"dataset[{index}]: must be a floating tensor [3,T,H,W] in [-1,1], or a mapping with one "
                "under 'video', "
                f"got {got}. Convert the item."
            )
        return video, None if fps is None else float(fps)

    def _step(self, request: ClipRequest, fps: float | None) -> float:
        """Returns how many frames of the item lie between two frames of the clip."""
        if request.frame_rate_hz is None or request.frames == 1:
            return 1.0
        if fps is None:
            raise DataError(
                f"dataset[{request.sample_index}]: must state its rate under 'fps' for clips at "
                f"{request.frame_rate_hz:g} Hz, "
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
