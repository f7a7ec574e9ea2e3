"""Reads samples of a sound file by exact position: the same part is the same samples wherever decoding
starts.

Owns FFmpeg's decoding of sound and its traps; resampling and channels are `audio.py`'s, facts about files
`probe.py`'s. Raises PyAV's errors and `ValueError` without the file's name, which the callers add. Shapes: C
channels, N samples.

Damage that the format shows is an error. PCM and MP3 carry no check sums that FFmpeg looks at: there, some
damage becomes wrong samples, and an MP3 frame with a damaged header is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

# Decoders that, a second after an arbitrary start, give bit for bit what they give from the beginning;
# measured in `test_a_part_is_the_same_part_of_the_whole`. AAC is not among them: FFmpeg fills its noise bands
# from a generator that runs through the file, so it is decoded from the beginning (a minute of sound in about
# 40 ms).
_FORGETFUL_CODECS = frozenset({"alac", "flac", "mp3", "opus", "vorbis"})
_WARM_UP_SECONDS = 1
# Demuxers that find a time by an index or by arithmetic. In others the packets before it are read and not
# decoded: after a seek, the timestamps of MP3 with variable bit rate are guesses.
_EXACT_SEEK = frozenset({"aiff", "flac", "mov", "mp4", "wav"})
# Demuxers that drop damaged data and show it in nothing but the number of samples.
_STATING = frozenset({"flac"})
# Without it FFmpeg leaves out what it cannot decode.
_STRICT_DECODING = {"err_detect": "crccheck+explode"}

# FFmpeg looks through 5 MB of every 16-bit WAV for hidden DTS, which takes 25 ms. 32 KiB still hold several
# frames of it.
_SHORT_PROBE = {"probesize": "32768"}


class Piece(NamedTuple):
    """Decoded samples: `wave` [C,N] float32, the first of which is number `start` of the file."""

    start: int
    wave: NDArray[np.float32]


class SoundFile:
    """The first audio stream of a file, open for one reading; a context manager.

    Raises:
        ValueError: If it holds no sound.
        av.FFmpegError: If it cannot be opened or its beginning not decoded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()
        self.sample_rate_hz: int = self._first.sample_rate
        self.channels: int = self._first.layout.nb_channels
        self.layout: tuple[str, ...] = _layout(self._first)
        self.layout_name: str = self._first.layout.name
        self.container_name: str = self._container.format.name.split(",")[0]
        self.codec_name: str = self._stream.codec_context.codec.canonical_name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def pieces(self) -> Iterator[Piece]:
        """Yields the whole sound in order.

        Raises:
            ValueError: If data is damaged, or rate or channels change.
            av.FFmpegError: If it cannot be decoded.
        """
        end = 0
        for piece in self._counted(chain([self._first], self._frames)):
            yield piece
            end = piece.start + piece.wave.shape[1]
        stated = self._stated_samples()
        if stated is not None and end < stated:
            raise ValueError(f"it states {stated} samples and holds {end}")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Returns samples `start` to `stop`, [C,N] float32; N is smaller where the sound ends.

        Raises:
            ValueError: If data is damaged, or rate or channels change.
            av.FFmpegError: If it cannot be decoded.
        """
        warm = start - _WARM_UP_SECONDS * self.sample_rate_hz
        if warm > 0 and self._can_skip():
            try:
                return _part(self._counted(self._frames_from(warm)), start, stop)
            except (av.FFmpegError, ValueError):
                # Not always damage: an index may be wrong. From the beginning, what fails is damaged.
                self._container.close()
                self._open()
        return _part(self.pieces(), start, stop)

    def _open(self) -> None:
        is_wave = self._path.suffix.lower() == ".wav"
        self._container = av.open(str(self._path), options=_SHORT_PROBE if is_wave else {})
        try:
            self._begin()
        except (av.FFmpegError, ValueError):
            self._container.close()
            raise

    def _begin(self) -> None:
        if not self._container.streams.audio:
            raise ValueError("it holds no sound")
        self._stream = self._container.streams.audio[0]
        self._stream.codec_context.options = _STRICT_DECODING
        self._frames = self._decoded()
        first = next(self._frames, None)
        if first is None:
            raise ValueError("it holds no sample")
        self._first = first

    def _decoded(self, *, after: int | None = None) -> Iterator[av.AudioFrame]:
        """Yields frames, of packets from the timestamp `after` on only."""
        for packet in self._container.demux(self._stream):
            if after is not None and packet.pts is not None and packet.pts < after:
                continue
            for frame in packet.decode():
                if frame.samples:
                    yield frame

    def _stated_samples(self) -> int | None:
        """Returns the length that the header states, where that is a count and not a guess."""
        duration = self._stream.duration
        return (
            duration
            if duration is not None and self._is_among(_STATING) and self._ticks_per_sample() == 1
            else None
        )

    def _is_among(self, demuxers: frozenset[str]) -> bool:
        return not demuxers.isdisjoint(self._container.format.name.split(","))

    def _can_skip(self) -> bool:
        """Returns whether timestamps name single samples and the decoder forgets its past."""
        codec = self._stream.codec_context.codec.canonical_name
        is_exact = self._first.pts is not None and self._ticks_per_sample() >= 1
        return is_exact and (codec in _FORGETFUL_CODECS or codec.startswith("pcm_"))

    def _ticks_per_sample(self) -> Fraction:
        time_base = self._stream.time_base
        return 1 / (time_base * self.sample_rate_hz) if time_base else Fraction(0)

    def _frames_from(self, sample: int) -> Iterator[av.AudioFrame]:
        assert self._first.pts is not None, "see _can_skip"
        ticks = self._first.pts + int(sample * self._ticks_per_sample())
        if self._is_among(_EXACT_SEEK):
            self._container.seek(ticks, stream=self._stream)
            return self._decoded()
        # The decoder has seen the first packets; those that it is given next do not follow them.
        self._stream.codec_context.flush_buffers()
        return self._decoded(after=ticks)

    def _counted(self, frames: Iterable[av.AudioFrame]) -> Iterator[Piece]:
        """Yields frames with their positions: of the first by its timestamp, of the others by counting,
        because some containers round timestamps to milliseconds."""
        position: int | None = None
        before: av.AudioFrame | None = None
        for frame in frames:
            if position is None:
                position = self._position(frame)
            self._check(frame, before, position)
            yield Piece(position, _as_float(frame))
            position += frame.samples
            before = frame

    def _position(self, frame: av.AudioFrame) -> int:
        if frame is self._first:
            return 0
        if frame.pts is None or self._first.pts is None:
            raise ValueError("a frame without a timestamp after a seek")
        return round((frame.pts - self._first.pts) / self._ticks_per_sample())

    def _check(self, frame: av.AudioFrame, before: av.AudioFrame | None, position: int) -> None:
        if frame.is_corrupt:
            raise ValueError(f"damaged data at sample {position}")
        form, expected = (frame.sample_rate, frame.layout.nb_channels), (self.sample_rate_hz, self.channels)
        if form == expected and self.channels > 2 and _layout(frame) != self.layout:
            raise ValueError(
                f"the layout changes from {self.layout_name} to {frame.layout.name} at sample {position}"
            )
        if form != expected:
            raise ValueError(f"rate and channels change from {expected} to {form} at sample {position}")
        if before is None or before.pts is None or frame.pts is None or not self._ticks_per_sample():
            return
        # Demuxers of FLAC, Ogg, Matroska and MPEG-TS leave out damaged packets; only the timestamps show it.
        missing = round((frame.pts - before.pts) / self._ticks_per_sample()) - before.samples
        if missing > before.samples / 2:
            raise ValueError(f"{missing} samples are missing before sample {position}")


def _part(pieces: Iterator[Piece], start: int, stop: int) -> NDArray[np.float32]:
    chosen: list[NDArray[np.float32]] = []
    is_first = True
    for piece in pieces:
        if is_first and piece.start > start:
            raise ValueError("the seek went past the first sample")
        is_first = False
        part_CN = piece.wave[:, max(0, start - piece.start) : max(0, stop - piece.start)]
        chosen.append(part_CN)
        if piece.start + piece.wave.shape[1] >= stop:
            break
    if is_first:
        raise ValueError("the seek went past the end")
    return np.concatenate(chosen, axis=1)


def _layout(frame: av.AudioFrame) -> tuple[str, ...]:
    return tuple(channel.name for channel in frame.layout.channels)


def _as_float(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Returns [C,N] float32, integers scaled to [-1,1)."""
    samples: NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    wave: NDArray[np.float32] = np.array(samples, dtype=np.float32)
    if samples.dtype == np.uint8:
        wave -= 128
    if np.issubdtype(samples.dtype, np.integer):
        wave /= 2 ** (8 * samples.dtype.itemsize - 1)
    return wave
