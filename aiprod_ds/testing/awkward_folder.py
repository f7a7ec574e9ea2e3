"""One folder as people have it: forty files that a trainer can get wrong, and what must become of each.

Owns the folder and the truth about it. Every film that can be trained on shows `corners` upright when it is
read right; a squeezed, turned, uncropped or otherwise misread one shows other colors somewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from aiprod_ds.decode.container_crop import Crop
from aiprod_ds.testing.awkward import (
    BLUE,
    GREEN,
    GREY,
    RED,
    Coding,
    Pixels,
    corners,
    write_animation,
    write_codes,
    write_film,
)
from aiprod_ds.testing.container_crops import with_clap, with_pixel_crop

Color = tuple[int, int, int]
Quarters = tuple[Color, Color, Color, Color]

BACKGROUND: Color = (200, 180, 40)
"""What `data.alpha_background` must be for the folder's colors to be true."""
CORNERS: Quarters = (RED, GREEN, BLUE, GREY)

_FRAMES = 12
_HEIGHT, _WIDTH = 48, 64
_H264 = Coding(codec="libx264", pixel_format="yuv420p", options={"crf": "10"})
_RGB = Coding(codec="libx264rgb", pixel_format="rgb24", options={"qp": "0"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What a file of the folder is, if it is trained on.

    Attributes:
        size: Height and width as displayed.
        quarters: RGB at the middle of each quarter from the top left by rows, 0..255; what a codec makes of
            strong colors may differ by some ten steps.
    """

    size: tuple[int, int] = (_HEIGHT, _WIDTH)
    quarters: Quarters = CORNERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What must become of the folder's files, each in one of three, by path.

    Attributes:
        clips: Trained on.
        unreadable: Named as unreadable, with a part of the reason.
        ignored: Passed over, with the reason.
    """

    clips: dict[str, Clip]
    unreadable: dict[str, str]
    ignored: dict[str, str]


def write_awkward_folder(folder: Path) -> Truth:
    """Draws the files into `folder`, which is made, and returns what must become of them."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = _film(folder / "plain.mp4").read_bytes()
    clips = {"plain.mp4": Clip()}
    for write in (_shapes, _turns, _crops, _codings, _lights, _transparent, _animations, _named):
        clips |= write(folder)
    return Truth(clips=clips, unreadable=_unreadable(folder, plain), ignored=_ignored(folder, plain))


def _film(path: Path, picture: Pixels | None = None, coding: Coding = _H264) -> Path:
    return write_film(path, [corners(_HEIGHT, _WIDTH) if picture is None else picture] * _FRAMES, coding)


def _with(coding: Coding, **changes: object) -> Coding:
    fields = {name: getattr(coding, name) for name in coding.__dataclass_fields__}
    return Coding(**(fields | changes))


def _shapes(folder: Path) -> dict[str, Clip]:
    pal = corners(48, 90)  # 64:45 is that of wide PAL
    _film(folder / "pal.mp4", pal, _with(_H264, pixel_aspect=Fraction(64, 45)))
    _film(folder / "anamorphic.mkv", corners(48, 48), _with(_H264, pixel_aspect=Fraction(2)))
    _film(folder / "tall.mp4", corners(96, 48))
    return {
        "pal.mp4": Clip(size=(48, 128)),
        "anamorphic.mkv": Clip(size=(48, 96)),
        "tall.mp4": Clip(size=(96, 48)),
    }


def _turns(folder: Path) -> dict[str, Clip]:
    # FFmpeg turns what is stored counterclockwise by so much, so the stored picture lies the other way.
    upright = corners(_HEIGHT, _WIDTH)
    for degrees in (90, 180, 270):
        stored = np.ascontiguousarray(np.rot90(upright, k=-degrees // 90))
        _film(folder / f"turned {degrees}.mp4", stored, _with(_H264, turn=(degrees, False, False)))
    mirrored = np.ascontiguousarray(upright[:, ::-1])
    _film(folder / "selfie.mov", mirrored, _with(_H264, turn=(0, True, False)))
    squeezed = np.ascontiguousarray(np.rot90(corners(48, 48), k=-1))
    coding = _with(_H264, turn=(90, False, False), pixel_aspect=Fraction(2))
    _film(folder / "turned and squeezed.mp4", squeezed, coding)
    exif = Image.Exif()
    exif[274] = 6  # the stored picture is to be turned clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(folder / "photo.jpg", exif=exif, quality=95)
    names = [f"turned {degrees}.mp4" for degrees in (90, 180, 270)]
    return {
        **dict.fromkeys([*names, "selfie.mov", "photo.jpg"], Clip()),
        "turned and squeezed.mp4": Clip(size=(96, 48)),
    }


def _crops(folder: Path) -> dict[str, Clip]:
    size, crop = (64, 96), Crop(top=4, bottom=12, left=8, right=24)
    picture = np.zeros((*size, 3), dtype=np.uint8)
    picture[4:52, 8:72] = corners(_HEIGHT, _WIDTH)
    writers: dict[str, Callable[[bytes, tuple[int, int], Crop], bytes]] = {
        "cropped.mp4": with_clap,
        "cropped.mkv": with_pixel_crop,
    }
    for name, writer in writers.items():
        path = _film(folder / name, picture, _H264 if name.endswith("mp4") else _RGB)
        path.write_bytes(writer(path.read_bytes(), size, crop))
    return dict.fromkeys(writers, Clip())


def _codings(folder: Path) -> dict[str, Clip]:
    codings = {
        "woven.mp4": _with(_H264, options={"crf": "10", "x264-params": "tff=1"}),
        "deep.mp4": Coding(
            codec="libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none"}
        ),
        "web.webm": Coding(codec="libvpx-vp9", pixel_format="yuv420p", options={"crf": "20", "b:v": "0"}),
        "full range.mp4": _with(_H264, tags={"color_range": 2}),
        "broadcast.mp4": _with(_H264, tags={"color_range": 1, "colorspace": 5}),
        "disc.mpg": Coding(codec="mpeg2video", pixel_format="yuv420p", options={"qscale": "2"}),
    }
    for name, coding in codings.items():
        _film(folder / name, coding=coding)
    _write_variable(folder / "variable.mkv")
    return dict.fromkeys([*codings, "variable.mkv"], Clip())


def _write_variable(path: Path) -> None:
    """Half of the frames last 20 ms, the others 100."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=50, options={"crf": "10"})
        assert isinstance(stream, av.VideoStream), "a video codec"
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(_FRAMES):
            frame = av.VideoFrame.from_ndarray(corners(_HEIGHT, _WIDTH), format="rgb24")
            late = max(0, index - _FRAMES // 2)
            frame.pts, frame.time_base = 20 * (index - late) + 100 * late, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _lights(folder: Path) -> dict[str, Clip]:
    # Codes of grey by BT.2100, and what BT.2390's curve makes of them for SDR: reference white (203 cd/m2) is
    # rolled off to 159 of it, and 0.903 is its code by a gamma of 2.4; the peak of 1000 becomes white.
    greys = {
        "bright pq.mp4": (16, (0.0, 0.5807, 0.7518, 0.5807)),
        "bright hlg.mp4": (18, (0.0, 0.75, 1.0, 0.75)),
    }
    for name, (transfer, codes) in greys.items():
        luma = np.empty((_HEIGHT, _WIDTH))
        rows, columns = (
            (slice(0, _HEIGHT // 2), slice(_HEIGHT // 2, None)),
            (slice(0, _WIDTH // 2), slice(_WIDTH // 2, None)),
        )
        for code, (down, across) in zip(codes, [(a, b) for a in rows for b in columns], strict=True):
            luma[down, across] = 64 + 876 * code
        planes = np.stack([luma, np.full_like(luma, 512), np.full_like(luma, 512)])
        tags = {"color_range": 1, "color_trc": transfer, "color_primaries": 9, "colorspace": 9}
        coding = Coding(codec="libx264", pixel_format="yuv444p10le", options={"qp": "0"}, tags=tags)
        write_codes(folder / name, np.round(planes).astype(np.uint16), coding, frames=_FRAMES)
    black, white, reference = (0, 0, 0), (255, 255, 255), (230, 230, 230)
    return dict.fromkeys(greys, Clip(quarters=(black, reference, white, reference)))


def _transparent(folder: Path) -> dict[str, Clip]:
    picture = np.zeros((_HEIGHT, _WIDTH, 4), dtype=np.uint8)
    picture[..., :3], picture[: _HEIGHT // 2, :, 3] = corners(_HEIGHT, _WIDTH), 255
    _film(
        folder / "seal.webm",
        picture,
        Coding(codec="libvpx-vp9", pixel_format="yuva420p", options={"crf": "10", "b:v": "0"}),
    )
    _film(folder / "animated.png", picture, Coding(codec="apng", pixel_format="rgba", format="apng"))
    Image.fromarray(picture).save(folder / "logo.png")
    write_animation(folder / "sticker.webp", [picture] * _FRAMES)
    quarters = (RED, GREEN, BACKGROUND, BACKGROUND)
    return dict.fromkeys(["seal.webm", "animated.png", "logo.png", "sticker.webp"], Clip(quarters=quarters))


def _animations(folder: Path) -> dict[str, Clip]:
    write_animation(folder / "loop.gif", [corners(_HEIGHT, _WIDTH)] * _FRAMES)
    return {"loop.gif": Clip()}


def _named(folder: Path) -> dict[str, Clip]:
    names = ["-rf.mp4", "100%, \"quoted\" & 'more'.mp4", "two\nlines.mp4", "été/映画.mp4", "LOUD.MP4"]
    for index, name in enumerate(names):
        # Each a film of its own: copies would be found.
        _film(folder / name, coding=_with(_H264, options={"crf": str(11 + index)}))
    return dict.fromkeys(names, Clip())


def _unreadable(folder: Path, plain: bytes) -> dict[str, str]:
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(plain[:-400])
    (folder / "no index.mp4").write_bytes(plain[: plain.index(b"moov") - 4])
    (folder / "page.mp4").write_text("<!DOCTYPE html><title>Not found</title>")
    (folder / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "reserved.mp4").write_bytes(bytes(4096))
    return {
        "empty.mp4": "is empty",
        "cut.mp4": "is incomplete",
        "no index.mp4": "is incomplete: it has no index",
        "page.mp4": "is no media: it is text",
        "pointer.mp4": "is no media: it is a Git LFS pointer",
        "reserved.mp4": "is incomplete: it begins with zeros",
    }


def _ignored(folder: Path, plain: bytes) -> dict[str, str]:
    (folder / ".trash").mkdir(exist_ok=True)
    for name in ("._plain.mp4", ".trash/old.mp4"):
        (folder / name).write_bytes(plain)
    (folder / "loading.mp4.part").write_bytes(plain[:500])
    (folder / "phone.heic").write_bytes(b"0")
    (folder / "notes.txt").write_text("no media, and not named as such")
    return {
        "._plain.mp4": "hidden",
        ".trash/old.mp4": "hidden",
        "loading.mp4.part": "not whole yet",
        "phone.heic": "of a kind that is not read, convert it",
    }
