"""What one media file holds: headers are not believed where packets or frames say it better.

Owns facts about single files; `data/probe_cache.py` remembers them, `data/manifest.py` decides which files
there are, `video.py` and `audio.py` decode them.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from aiprod_ds.decode.container_crop import Crop, container_crop
from aiprod_ds.decode.diagnosis import cut_off, diagnose
from aiprod_ds.decode.downmix import check_layout
from aiprod_ds.decode.frames import animation_frames, decoded_frames, is_among, is_animated_webp
from aiprod_ds.decode.orientation import Orientation, orientation_of
from aiprod_ds.decode.pixels import alpha_of
from aiprod_ds.decode.record import Details, Hdr, MediaRecord, Medium, Probed
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.decode.tone_map import is_wide, transfer_of
from aiprod_ds.errors import DataError
from aiprod_ds.files import file_sha256

_RATE_TOLERANCE = 0.01
# Wider than any format in use; what states more is damaged.
_MAX_PIXEL_ASPECT = 10.0
# Codec parameters of a stream that is interlaced somewhere: FFmpeg's AVFieldOrder.
_INTERLACED_ORDERS = frozenset({2, 3, 4, 5})
_MAX_FIELD_FRAMES = 8
_WITH_BOXES = frozenset({"mov"})
# Codecs overshoot full scale by a few dB; beyond 12 dB the samples are integers that somebody stored as
# floats.
_MAX_PEAK = 4.0
_FULL_SCALE = 0.9999
_CLIPPED_RUN = 3
# Containers round times to milliseconds or worse; a rate varies where intervals differ by more than that.
_ROUNDED_TICKS, _VARIABLE_SHARE = 2, 0.05
# Numbers of ISO/IEC 23091-4.
_MATRICES = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020",
    14: "ictcp",
}
_RANGES = {1: "limited", 2: "full"}


def probe(file: Path, *, medium: Medium = "video") -> MediaRecord:
    """Returns what clips of `file` depend on, with its whole name as `path`; see `look_into`."""
    return look_into(file, medium=medium).record


def look_into(file: Path, *, medium: Medium = "video") -> Probed:
    """Returns what `file` holds, with its whole name as `path`.

    Args:
        file: To look into.
        medium: `sound` decodes it to its end, `video` reads packets and a frame.

    Raises:
        DataError: If it cannot be opened or decoded; the message leaves out its name.
    """
    try:
        if medium == "sound":
            return _probe_sound(file)
        return _probe_animation(file) if is_animated_webp(file) else _probe_video(file)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(_diagnosis(file) or f"cannot be decoded: {error}") from error


def _diagnosis(file: Path) -> str | None:
    try:
        return diagnose(file)
    except OSError:
        return None


def _probe_video(file: Path) -> Probed:
    with av.open(str(file)) as container:
        if not container.streams.video:
            raise DataError("holds no video stream")
        # With the index in front, FFmpeg reads what is there of a file that was cut off, up to a damaged
        # frame.
        problem = cut_off(file) if is_among(container, _WITH_BOXES) else None
        if problem is not None:
            raise DataError(problem)
        stream = container.streams.video[0]
        audio = container.streams.audio[0] if container.streams.audio else None
        # Headers lie about the number of frames; packets do not. The flushing packet at the end has no size.
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not times:
            raise DataError("holds no frame")
        fps = _frames_per_second(stream, times)
        sound = None if audio is None else (audio.rate, audio.channels, audio.layout.name)
        container_name, codec = container.format.name, stream.codec_context.name
        is_variable = _is_variable(times, fps, stream)
    picture = _first_picture(file)
    rate_hz, channels, layout = sound or (None, None, None)
    details = Details(
        kind="picture" if len(times) == 1 else "film",
        num_bytes=file.stat().st_size,
        container=container_name.split(",")[0],
        codec=codec,
        pixel_format=picture.pixel_format,
        stored_height=picture.stored_height,
        stored_width=picture.stored_width,
        is_variable_rate=is_variable,
        color_matrix=_MATRICES.get(picture.matrix, ""),
        color_range=_RANGES.get(picture.range, ""),
    )
    record = MediaRecord(
        path=str(file),
        sha256=file_sha256(file),
        frames=len(times),
        fps=fps,
        height=picture.height,
        width=picture.width,
        seconds=len(times) / fps,
        crop=picture.crop,
        pixel_aspect=picture.pixel_aspect,
        rotation_degrees=picture.orientation.as_turn()[0],
        is_mirrored=picture.orientation.as_turn()[1],
        is_interlaced=picture.is_interlaced,
        hdr=picture.hdr,
        is_wide_gamut=picture.is_wide_gamut,
        has_alpha=picture.has_alpha,
        audio_rate_hz=rate_hz,
        audio_channels=channels,
        audio_layout=layout,
    )
    return Probed(record=record, details=details)


def _is_variable(times: list[int | None], fps: float, stream: av.VideoStream) -> bool:
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times) or len(known) < 3 or stream.time_base is None:
        return False
    steps = np.diff(np.array(known))
    allowed = max(_ROUNDED_TICKS, _VARIABLE_SHARE / (fps * float(stream.time_base)))
    return bool(steps.max() - steps.min() > allowed)


def _frames_per_second(stream: av.VideoStream, times: list[int | None]) -> float:
    """Returns the stated average rate, or the rate of the timestamps where that is missing or more than 1 %
    off."""
    stated = float(stream.average_rate) if stream.average_rate else None
    known = [time for time in times if time is not None]
    measured = None
    if stream.time_base is not None and len(known) == len(times) and max(known) > min(known):
        measured = (len(known) - 1) / float((max(known) - min(known)) * stream.time_base)
    if stated is not None and (measured is None or abs(measured - stated) <= _RATE_TOLERANCE * stated):
        return stated
    if measured is None:
        raise DataError("states neither a frame rate nor timestamps")
    return measured


class _Picture(NamedTuple):
    height: int
    width: int
    crop: Crop
    pixel_aspect: float
    orientation: Orientation
    is_interlaced: bool
    hdr: Hdr | None
    is_wide_gamut: bool
    has_alpha: bool
    stored_height: int
    stored_width: int
    pixel_format: str
    matrix: int
    range: int


def _first_picture(file: Path) -> _Picture:
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = decoded_frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise DataError("has packets but no frame that decodes")
        orientation = orientation_of(first, file)
        aspect = float(stream.sample_aspect_ratio or 1)
        if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
            raise DataError(f"states pixels that are {aspect:g} times as wide as high")
        crop = container_crop(file)
        height, shown = first.height - crop.top - crop.bottom, first.width - crop.left - crop.right
        if min(height, shown) < 1:
            raise DataError(f"crops all of its pictures of {first.width}x{first.height}")
        width = max(1, round(shown * aspect))  # FFmpeg's convention: the height stays
        transfer = transfer_of(first)
        return _Picture(
            height=width if orientation.is_transposed else height,
            width=height if orientation.is_transposed else width,
            crop=crop,
            pixel_aspect=aspect,
            orientation=orientation,
            is_interlaced=first.interlaced_frame
            or (
                stream.codec_context.field_order in _INTERLACED_ORDERS
                and any(frame.interlaced_frame for frame in islice(frames, _MAX_FIELD_FRAMES))
            ),
            hdr=None if transfer == "sdr" else transfer,
            is_wide_gamut=transfer == "sdr" and is_wide(first),
            has_alpha=alpha_of(first) is not None,
            stored_height=first.height,
            stored_width=first.width,
            pixel_format=first.format.name,
            matrix=int(first.colorspace),
            range=int(first.color_range),
        )


def _probe_animation(file: Path) -> Probed:
    items = [(item.seconds, item.period, alpha_of(item.frame) is not None) for item in animation_frames(file)]
    seconds = items[-1][0] + items[-1][1]
    first = next(animation_frames(file)).frame
    periods = {period for _, period, _ in items}
    details = Details(
        kind="film",
        num_bytes=file.stat().st_size,
        container="webp",
        codec="webp",
        pixel_format=first.format.name,
        stored_height=first.height,
        stored_width=first.width,
        is_variable_rate=max(periods) - min(periods) > _VARIABLE_SHARE * min(periods),
    )
    record = MediaRecord(
        path=str(file),
        sha256=file_sha256(file),
        frames=len(items),
        fps=len(items) / seconds,
        height=first.height,
        width=first.width,
        seconds=seconds,
        has_alpha=items[0][2],
    )
    return Probed(record=record, details=details)


def _probe_sound(file: Path) -> Probed:
    """Decodes the whole sound: headers lie about lengths, and a NaN or damage in the middle must be found
    before training."""
    level = SoundLevel()
    with SoundFile(file) as sound:
        for piece in sound.pieces():
            if not np.isfinite(piece.wave).all():
                raise DataError(f"holds NaN or infinity after sample {piece.start}")
            level.add(piece.wave)
        rate_hz, channels, layout = sound.sample_rate_hz, sound.channels, sound.layout
        layout_name, container, codec = sound.layout_name, sound.container_name, sound.codec_name
    if level.peak > _MAX_PEAK:
        raise DataError(f"its samples must be in [-1, 1], got a peak of {level.peak:g}")
    check_layout(channels, layout)
    details = Details(kind="sound", num_bytes=file.stat().st_size, container=container, codec=codec)
    record = MediaRecord(
        path=str(file),
        sha256=file_sha256(file),
        frames=level.samples,
        fps=float(rate_hz),
        height=1,
        width=1,
        seconds=level.samples / rate_hz,
        audio_rate_hz=rate_hz,
        audio_channels=channels,
        audio_layout=layout_name,
        audio_peak=level.peak,
        audio_clipped=level.clipped,
        audio_dc=level.dc(),
    )
    return Probed(record=record, details=details)


class SoundLevel:
    """Peak, mean and clipped samples of a sound that comes in pieces."""

    def __init__(self) -> None:
        self.samples, self.peak, self.clipped = 0, 0.0, 0
        self._sum_C: NDArray[np.float64] | None = None
        self._open_C: NDArray[np.int64] | None = None

    def add(self, wave_CN: NDArray[np.float32]) -> None:
        """Goes on with the next piece."""
        magnitude_CN = np.abs(wave_CN)
        self.samples += wave_CN.shape[1]
        self.peak = max(self.peak, float(magnitude_CN.max()))
        total_C = wave_CN.sum(axis=1, dtype=np.float64)
        self._sum_C = total_C if self._sum_C is None else self._sum_C + total_C
        open_C = np.zeros(len(wave_CN), dtype=np.int64) if self._open_C is None else self._open_C
        self._open_C = np.zeros_like(open_C)
        if not open_C.any() and magnitude_CN.max() < _FULL_SCALE:
            return
        for channel, full_N in enumerate(magnitude_CN >= _FULL_SCALE):
            self._open_C[channel] = self._count(full_N, int(open_C[channel]))

    def dc(self) -> float:
        """Returns the largest absolute mean of a channel."""
        return 0.0 if self._sum_C is None else float(np.abs(self._sum_C).max()) / self.samples

    def _count(self, full_N: NDArray[np.bool_], open_run: int) -> int:
        """Counts samples in long runs; returns how long the run is that the piece ends in."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], full_N, [False])).astype(np.int8)))
        last = 0
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            before = open_run if begin == 0 else 0
            run = before + end - begin
            counted = before if before >= _CLIPPED_RUN else 0
            if run >= _CLIPPED_RUN:
                self.clipped += run - counted
            if end == len(full_N):
                last = run
        return last
