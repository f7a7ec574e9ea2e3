"""Makes the sample clips and manifests in samples/ from two freely licensed films.

Owns the list of clips: where each is cut, which part of the picture it shows and its caption. Not used by the
package; a maintainer runs it when the samples change. samples/ATTRIBUTION.md says where the films come from
and is written by hand.

    python tools/make_samples.py --bunny bigbuckbunny.mp4 --city cityCC0.mpg --output samples

Training and validation never share a moment of a film, and the city film's second shot is held out as a
whole.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import numpy.typing as npt

from aiprod_ds.crash import guarded

_FRAME_RATE = 25
_WIDTH, _HEIGHT = 320, 180
_CRF = 20
_AUDIO_BITS_PER_SECOND = 96_000
_NUM_FRAMES = 49
_FILM_SIZES = {"bunny": (1280, 720), "city": (720, 405)}

logger = logging.getLogger("make_samples")


class SampleError(Exception):
    """A source film is not what the list of clips was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A part of the source picture, in source pixels; both sides in the ratio 16:9."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One sample: `_NUM_FRAMES` frames of a film from `start_seconds` on.

    Args:
        split: `train` or `validation`; the folder and the manifest it goes to.
        name: File name without suffix.
        film: `bunny` or `city`, as the command line names the sources.
        start_seconds: Time of the first frame, counted from the film's first frame.
        crop: The part of the picture to show; None shows all of it.
        caption: What is seen (and moves) in exactly this clip.
    """

    split: str
    name: str
    film: str
    start_seconds: Fraction
    crop: Crop | None = None
    caption: str

    @property
    def path(self) -> str:
        """Where the clip stands, relative to samples/."""
        return f"{self.split}/{self.name}.mp4"


CLIPS = (
    Clip(
        split="train",
        name="bunny_leaving_burrow",
        film="bunny",
        start_seconds=Fraction("0"),
        caption="A big grey cartoon rabbit crawls out of a burrow in a grassy hill and stands up.",
    ),
    Clip(
        split="train",
        name="bunny_stretching",
        film="bunny",
        start_seconds=Fraction("1.36"),
        caption="A big grey cartoon rabbit rises in front of its burrow, throws its arms out and stretches.",
    ),
    Clip(
        split="train",
        name="bunny_rising_near",
        film="bunny",
        start_seconds=Fraction("0.6"),
        crop=Crop(left=0, top=0, width=960, height=540),
        caption="A big grey cartoon rabbit, seen from near, gets up beside two round stones and stretches "
        "its arms.",
    ),
    Clip(
        split="train",
        name="bunny_meadow",
        film="bunny",
        start_seconds=Fraction("0.2"),
        crop=Crop(left=320, top=180, width=960, height=540),
        caption="A bright green meadow with stone blocks; at the left edge a grey cartoon rabbit gets up.",
    ),
    Clip(
        split="train",
        name="city_towers_early",
        film="city",
        start_seconds=Fraction("0"),
        caption="Office towers at night seen from below, a wavy facade on the left and a glass tower on the "
        "right.",
    ),
    Clip(
        split="train",
        name="city_towers_late",
        film="city",
        start_seconds=Fraction("2.64"),
        caption="Lit office towers against a violet night sky, a wavy facade on the left and a curved glass "
        "tower on the right.",
    ),
    Clip(
        split="train",
        name="city_wavy_facade",
        film="city",
        start_seconds=Fraction("1"),
        crop=Crop(left=0, top=134, width=480, height=270),
        caption="A facade of wavy bands next to two office buildings with green lit windows at night.",
    ),
    Clip(
        split="train",
        name="city_glass_tower",
        film="city",
        start_seconds=Fraction("2"),
        crop=Crop(left=240, top=0, width=480, height=270),
        caption="A dark office block with bright green windows beside a tall glass tower at night.",
    ),
    Clip(
        split="validation",
        name="bunny_yawning",
        film="bunny",
        start_seconds=Fraction("3.32"),
        caption="A big grey cartoon rabbit yawns with its arms out, then lowers one and lays the other paw "
        "on its head.",
    ),
    Clip(
        split="validation",
        name="city_white_towers",
        film="city",
        start_seconds=Fraction("4.8"),
        caption="Two tall office towers with white lit tops under a dark blue night sky.",
    ),
    Clip(
        split="validation",
        name="city_tall_tower",
        film="city",
        start_seconds=Fraction("5.6"),
        crop=Crop(left=240, top=60, width=480, height=270),
        caption="A tall office tower with a white lit top and rows of lit windows, seen from below at night.",
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Writes every clip and both manifests; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the sample clips and their manifests.")
    parser.add_argument(
        "--bunny",
        type=Path,
        required=True,
        help="excerpt of Big Buck Bunny, 1280x720, 25 frames/s, with sound",
    )
    parser.add_argument(
        "--city", type=Path, required=True, help="cityCC0.mpg, 720x405, 25 frames/s, no sound"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for clips and manifests")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    films = {"bunny": options.bunny, "city": options.city}
    try:
        for clip in CLIPS:
            write_clip(clip, source=films[clip.film], target=options.output / clip.path)
    except (SampleError, OSError) as error:
        logger.error("%s", error)  # noqa: TRY400  the message says all; a traceback would hide it
        return 1
    for split in ("train", "validation"):
        write_manifest(options.output / f"{split}.csv", [clip for clip in CLIPS if clip.split == split])
    return 0


def write_clip(clip: Clip, *, source: Path, target: Path) -> None:
    """Cuts, crops, scales and encodes one clip as H.264, with AAC where the film has sound.

    Raises:
        SampleError: The film has another frame rate or size, or ends before the clip does.
        OSError: The film cannot be opened or the clip cannot be written.
    """
    frames = _read_frames(clip, source)
    sound = _read_sound(clip, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w") as container:
        video_stream = container.add_stream(
            "libx264", rate=_FRAME_RATE, options={"crf": str(_CRF), "preset": "slow"}
        )
        video_stream.width, video_stream.height, video_stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        audio_stream = None
        if sound is not None:
            audio_stream = container.add_stream("aac", rate=sound.sample_rate, layout=sound.layout.name)
            audio_stream.bit_rate = _AUDIO_BITS_PER_SECOND
        for frame in [*frames, None]:
            container.mux(video_stream.encode(frame))
        if audio_stream is not None:
            for piece in (sound, None):
                container.mux(audio_stream.encode(piece))
    logger.info(
        "clip=%s frames=%d sound=%s bytes=%d",
        clip.path,
        len(frames),
        sound is not None,
        target.stat().st_size,
    )


def write_manifest(path: Path, clips: list[Clip]) -> None:
    """Writes the columns `video` (relative to the manifest's folder) and `caption`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "caption"])
        writer.writerows([clip.path, clip.caption] for clip in clips)


def _read_frames(clip: Clip, source: Path) -> list[av.VideoFrame]:
    first = int(clip.start_seconds * _FRAME_RATE)
    frames = []
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        if stream.average_rate != _FRAME_RATE:
            raise SampleError(
                f"{source}: must have {_FRAME_RATE} frames/s, got {stream.average_rate}. Give the original "
                "film."
            )
        size = (stream.width, stream.height)
        if size != _FILM_SIZES[clip.film]:
            raise SampleError(
                f"{source}: must be {_FILM_SIZES[clip.film]} pixels, got {size}. Give the original film."
            )
        graph = _picture_filter(stream, clip.crop)
        # Counted, not sought: an MPEG program stream has no index and its times do not begin at 0.
        for index, decoded in enumerate(container.decode(stream)):
            if index >= first + _NUM_FRAMES:
                break
            if index >= first:
                frames.append(_filtered(graph, decoded, index - first))
    if len(frames) < _NUM_FRAMES:
        got = f"{clip.name} needs {first + _NUM_FRAMES} frames, got {first + len(frames)} or fewer"
        raise SampleError(f"{source}: {got}. Give the original film.")
    return frames


def _picture_filter(stream: av.VideoStream, crop: Crop | None) -> av.filter.Graph:
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=stream)]
    if crop is not None:
        nodes.append(graph.add("crop", f"{crop.width}:{crop.height}:{crop.left}:{crop.top}"))
    nodes += [
        graph.add("scale", f"{_WIDTH}:{_HEIGHT}:flags=bicubic+accurate_rnd+bitexact"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _filtered(graph: av.filter.Graph, decoded: av.VideoFrame, index: int) -> av.VideoFrame:
    graph.push(decoded)
    frame = graph.pull()
    assert isinstance(frame, av.VideoFrame)
    frame.pts, frame.time_base = index, Fraction(1, _FRAME_RATE)
    frame.pict_type = av.video.frame.PictureType.NONE  # else x264 repeats the source's key frames
    return frame


def _read_sound(clip: Clip, source: Path) -> av.AudioFrame | None:
    with av.open(str(source)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        # The film has six channels; the mix keeps what was in all of them.
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
        pieces = [
            piece.to_ndarray()
            for decoded in container.decode(stream)
            for piece in resampler.resample(decoded)
        ]
    wave_CN: npt.NDArray[np.float32] = np.concatenate(pieces, axis=1)
    first = int(clip.start_seconds * rate)
    num_samples = _NUM_FRAMES * rate // _FRAME_RATE
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(wave_CN[:, first : first + num_samples]), format="fltp", layout="stereo"
    )
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame


if __name__ == "__main__":
    sys.exit(guarded(main, program="tools/make_samples.py"))
