"""Does decoding cost more than the decoder does?

Draws films of 20 s at 30 Hz, a drifting texture with grain, in H.264 (480p and 1080p), HEVC (1080p) and VP9
(480p), with a keyframe every 2 s. Each is read in two ways, several times in turn, always in another order:

    random          clips of 17 frames at the film's own rate, from drawn places (the same for every reader)
    sequential      the first 96 frames in one call

by

    aiprod_ds       `decode_clip`, as a loader's worker calls it
    plain PyAV      open, seek to the keyframe, decode and convert to RGB; nothing is checked: no damage, no
                    turning, no alpha, and no second look where a seek was wrong
    torchcodec      `VideoDecoder` with `seek_mode="approximate"`, the quicker one, if it can be imported

All open the file anew for every clip, give [T,H,W,3] uint8 RGB in memory, and decode with as many threads as
FFmpeg chooses. A run is the time of all clips of a case, by the clock and by the processor (of all threads,
what counts where many workers share the cores); the least of the runs counts, since what else a machine does
only adds to it. Frames are compared once: those of `decode_clip` and PyAV must be equal bit by bit.

    python benchmarks/decoding.py --runs 7 --output benchmarks/results/NAME.json

torchcodec is no dependency of the project; it needs FFmpeg's libraries of the system, PyAV brings its own.

Of several runs the value is the best one, not the median. Those of 29 November 2026 were taken beside other
work of lower priority on the same two cores. It does not show: network file systems, resizing,
a loader with many workers, or decoding on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from result_file import figure, write_result

from aiprod_ds.decode.video import decode_clip

_RATE_HZ, _SECONDS, _GOP = 30, 20, 60
_RANDOM_FRAMES, _SEQUENTIAL_FRAMES = 17, 96

Pixels = NDArray[np.uint8]
Times = tuple[float, float]
"""Seconds by the clock and by the processor."""
Reader = Callable[[Path, float, int], Any]
"""Of a file, from a second on, so many frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """How a film is stored."""

    codec: str
    height: int
    width: int
    suffix: str = ".mp4"
    options: Mapping[str, str] = field(default_factory=dict)


_X265 = {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={_GOP}:min-keyint={_GOP}:bframes=3"}
_VP9 = {"deadline": "realtime", "cpu-used": "8", "b:v": "2M", "g": str(_GOP), "row-mt": "1"}
FILMS = {
    "H.264 480p": Film(codec="libx264", height=480, width=854, options={"preset": "veryfast"}),
    "H.264 1080p": Film(codec="libx264", height=1080, width=1920, options={"preset": "veryfast"}),
    "HEVC 1080p": Film(codec="libx265", height=1080, width=1920, options=_X265),
    "VP9 480p": Film(codec="libvpx-vp9", height=480, width=854, suffix=".webm", options=_VP9),
}


def main() -> None:
    """Draws the films, reads them in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="decode_clip against plain PyAV and torchcodec.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--clips", type=int, default=12, help="random clips a run")
    parser.add_argument("--films", nargs="+", choices=list(FILMS), default=list(FILMS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    readers = _readers()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.films:
            film = _draw(Path(folder), name, FILMS[name])
            _compare(film, readers)
            for case, clips in _cases(arguments.clips).items():
                seconds = _measure(film, clips, readers, runs=arguments.runs)
                rows += _rows(f"{name}, {case}", seconds, sum(count for _, count in clips))
    write_result(arguments.output, "decoding", rows)


def _readers() -> dict[str, Reader]:
    found: dict[str, Reader] = {"aiprod_ds": _ours, "plain PyAV": _pyav}
    if importlib.util.find_spec("torchcodec") is not None:
        found["torchcodec"] = _torchcodec
    return found


def _ours(path: Path, start: float, count: int) -> Pixels:
    return decode_clip(path, start_seconds=start, num_frames=count, frame_rate_hz=_RATE_HZ)


def _pyav(path: Path, start: float, count: int) -> Pixels:
    frames: list[Pixels] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        assert stream.time_base is not None
        origin = stream.start_time or 0
        if start > 0:
            container.seek(origin + int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            if float((frame.pts - origin) * stream.time_base) < start - 0.5 / _RATE_HZ:
                continue
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == count:
                break
    return np.stack(frames)


def _torchcodec(path: Path, start: float, count: int) -> Any:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode="approximate")
    first = round(start * _RATE_HZ)
    return decoder.get_frames_in_range(first, first + count).data


def _cases(clips: int) -> dict[str, list[tuple[float, int]]]:
    draw = random.Random(0)
    last = _SECONDS * _RATE_HZ - _RANDOM_FRAMES - 1
    places = [(draw.randint(0, last) / _RATE_HZ, _RANDOM_FRAMES) for _ in range(clips)]
    return {"random": places, "sequential": [(0.0, _SEQUENTIAL_FRAMES)]}


def _draw(folder: Path, name: str, film: Film) -> Path:
    path = folder / (name.replace(" ", "_") + film.suffix)
    draw = np.random.default_rng(0)
    tall, wide = film.height * 2, film.width * 2
    coarse = draw.integers(0, 256, (tall // 16 + 1, wide // 16 + 1, 3), dtype=np.uint8)
    texture = coarse.repeat(16, axis=0).repeat(16, axis=1)[:tall, :wide]
    grain = draw.integers(0, 12, (film.height, film.width, 1), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"g": str(_GOP), **film.options}
        stream = container.add_stream(film.codec, rate=_RATE_HZ, options=options)
        stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
        for index in range(_SECONDS * _RATE_HZ):
            top, left = 2 * index % film.height, 3 * index % film.width
            part = texture[top : top + film.height, left : left + film.width] // 2
            pixels = part + np.roll(grain, index, axis=1) + np.uint8(40)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, _RATE_HZ)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _compare(film: Path, readers: Mapping[str, Reader]) -> None:
    for start, count in ((0.0, 5), (3.5, 5)):
        ours, plain = (readers[name](film, start, count) for name in ("aiprod_ds", "plain PyAV"))
        assert np.array_equal(ours, plain), f"{film}: frames from {start} s differ"


def _measure(
    film: Path,
    clips: Sequence[tuple[float, int]],
    readers: Mapping[str, Reader],
    *,
    runs: int,
) -> dict[str, list[Times]]:
    seconds: dict[str, list[Times]] = {name: [] for name in readers}
    names = list(readers)
    for name in names:
        readers[name](film, *clips[0])
    for run in range(runs):
        for name in names if run % 2 else reversed(names):
            began, used = time.perf_counter(), time.process_time()
            for start, count in clips:
                readers[name](film, start, count)
            seconds[name].append((time.perf_counter() - began, time.process_time() - used))
    return seconds


def _rows(where: str, seconds: Mapping[str, Sequence[Times]], frames: int) -> list[dict[str, Any]]:
    goals = {"plain PyAV": 100.0, "torchcodec": 90.0}
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(("clock", "processor")):
        best = {name: min(run[number] for run in runs) for name, runs in seconds.items()}
        rows += [
            figure(
                f"{where}, {name}",
                f"frames per second by the {kind}",
                "frames/s",
                _rates(runs, number, frames),
            )
            | {"value": frames / best[name]}
            for name, runs in seconds.items()
        ]
        rows += [
            figure(
                where,
                f"speed of {name}, by the {kind}",
                "%",
                [100 * best[name] / best["aiprod_ds"]],
                goal=goal,
            )
            for name, goal in goals.items()
            if name in seconds
        ]
    return rows


def _rates(runs: Sequence[Times], number: int, frames: int) -> list[float]:
    return [frames / run[number] for run in runs]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
