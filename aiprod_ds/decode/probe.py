"""What one media file holds: probed once, remembered while the file's size and modification time stay as they
were.

Owns facts about files; `data/manifest.py` decides which files there are, `video.py` and `audio.py` decode
them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

import av
import numpy as np

from aiprod_ds.decode.audio import check_channels
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.errors import DataError
from aiprod_ds.files import file_sha256, write_atomically

_CACHE_VARIABLE = "AIPROD_DS_CACHE_DIR"
# What probed the files: a cache of another format, or of another FFmpeg, is not believed.
_PROBED_BY = f"2, PyAV {av.__version__}"
_RATE_TOLERANCE = 0.01
# Codecs overshoot full scale by a few dB; beyond 12 dB the samples are integers that somebody stored as
# floats.
_MAX_PEAK = 4.0
Medium = Literal["video", "sound"]
"""What of a file counts: its pictures, or its sound alone."""
_Facts = TypeVar("_Facts")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRecord:
    """One readable clip: `path` relative to the manifest's root, frames >= 1, seconds = frames / fps, pixels
    as displayed.

    An image has one frame; its `fps` is what FFmpeg assumes and means nothing. A sound is a clip of 1x1 whose
    frames are its samples and whose `fps` is its sample rate; `audio_peak` is its largest absolute sample,
    known of sounds only.
    """

    path: str
    sha256: str
    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    audio_rate_hz: int | None = None
    audio_channels: int | None = None
    audio_peak: float | None = None
    caption: str | None = None


class ProbeCache:
    """Probes files that it does not know yet.

    Args:
        file: JSON in which probes are kept between runs; None keeps none. If it cannot be read or written,
            the log says so and the files are probed. One file is for one medium: probes of the other are not
            believed.
        medium: `sound` decodes each file to its end, `video` reads packets and one frame.
    """

    def __init__(self, file: Path | None, *, medium: Medium = "video") -> None:
        self._file = file
        self._probe = _probe_video if medium == "video" else _probe_sound
        self._probed_by = f"{_PROBED_BY}, {medium}"
        self._known = {} if file is None else _read_probes(file, self._probed_by)
        self._seen: dict[str, _Probe] = {}

    def record(self, file: Path) -> MediaRecord:
        """Returns what `file` holds, with its whole name as `path`.

        Raises:
            DataError: If it cannot be opened or decoded; the message leaves out its name.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"cannot be opened: {error.strerror}") from error
        key, stamp = str(file.absolute()), (status.st_size, status.st_mtime_ns)
        known = self._known.get(key)
        record = known.record if known is not None and known.stamp == stamp else _guarded(file, self._probe)
        self._seen[key] = _Probe(stamp=stamp, record=record)
        return record

    def save(self) -> None:
        """Keeps the probes of this scan; those of files that it did not ask for are forgotten."""
        if self._file is None or self._seen == self._known:
            return
        content = {
            "probed_by": self._probed_by,
            "probes": {key: asdict(probe) for key, probe in self._seen.items()},
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(content))
        except OSError as error:
            _log.warning(
                "probe cache is not written, the next run probes again: file=%s error=%s", self._file, error
            )


def default_probe_cache(source: Path, *, medium: Medium = "video") -> Path | None:
    """Returns where the probes of `source` are kept between runs: one file a source and medium in the user's
    cache folder.

    That is `$AIPROD_DS_CACHE_DIR`, else `$XDG_CACHE_HOME/aiprod_ds`, else `~/.cache/aiprod_ds`, never beside
    the data, which may be shared or read-only. None when there is no home either.
    """
    own, shared = os.environ.get(_CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "aiprod_ds"
    except RuntimeError:
        return None
    name = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    return folder / (f"probes-{name}.json" if medium == "video" else f"sounds-{name}.json")


def probe_audio(file: Path) -> tuple[int, int]:
    """Returns the sample rate in Hz and the number of channels of a sound file.

    Raises:
        DataError: If it cannot be opened or decoded, or holds no sound.
    """
    return _guarded(file, _probe_audio)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """What a file held when it had this size and modification time (ns)."""

    stamp: tuple[int, int]
    record: MediaRecord


def _read_probes(file: Path, probed_by: str) -> dict[str, _Probe]:
    """Returns the cached probes; none if there is no file, or another version wrote it, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["probed_by"] != probed_by:
            return {}
        return {
            key: _Probe(stamp=tuple(probe["stamp"]), record=MediaRecord(**probe["record"]))
            for key, probe in content["probes"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("probe cache is unreadable and is made anew: file=%s error=%s", file, error)
        return {}


def _guarded(file: Path, probe: Callable[[Path], _Facts]) -> _Facts:
    try:
        return probe(file)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"cannot be decoded: {error}") from error


def _probe_video(file: Path) -> MediaRecord:
    with av.open(str(file)) as container:
        if not container.streams.video:
            raise DataError("holds no video stream")
        stream = container.streams.video[0]
        audio = container.streams.audio[0] if container.streams.audio else None
        # Headers lie about the number of frames; packets do not. The flushing packet at the end has no size.
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not times:
            raise DataError("holds no frame")
        fps = _frames_per_second(stream, times)
        audio_rate_hz, audio_channels = (audio.rate, audio.channels) if audio is not None else (None, None)
    height, width = _first_frame_size(file)
    return MediaRecord(
        path=str(file),
        sha256=file_sha256(file),
        frames=len(times),
        fps=fps,
        height=height,
        width=width,
        seconds=len(times) / fps,
        audio_rate_hz=audio_rate_hz,
        audio_channels=audio_channels,
    )


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


def _first_frame_size(file: Path) -> tuple[int, int]:
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            is_sideways = frame.rotation % 180 != 0
            return (frame.width, frame.height) if is_sideways else (frame.height, frame.width)
    raise DataError("has packets but no frame that decodes")


def _probe_audio(file: Path) -> tuple[int, int]:
    with av.open(str(file)) as container:
        if not container.streams.audio:
            raise DataError(f"its audio file {file.name} holds no audio stream")
        stream = container.streams.audio[0]
        return stream.rate, stream.channels


def _probe_sound(file: Path) -> MediaRecord:
    """Decodes the whole sound: headers lie about lengths, and a NaN or damage in the middle must be found
    before training."""
    samples, peak = 0, 0.0
    with SoundFile(file) as sound:
        for piece in sound.pieces():
            if not np.isfinite(piece.wave).all():
                raise DataError(f"holds NaN or infinity after sample {piece.start}")
            samples += piece.wave.shape[1]
            peak = max(peak, float(np.abs(piece.wave).max()))
        rate_hz, channels = sound.sample_rate_hz, sound.channels
    if peak > _MAX_PEAK:
        raise DataError(f"its samples must be in [-1, 1], got a peak of {peak:g}")
    check_channels(channels)
    return MediaRecord(
        path=str(file),
        sha256=file_sha256(file),
        frames=samples,
        fps=float(rate_hz),
        height=1,
        width=1,
        seconds=samples / rate_hz,
        audio_rate_hz=rate_hz,
        audio_channels=channels,
        audio_peak=peak,
    )
