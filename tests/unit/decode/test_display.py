"""Pixels as displayed: shape of pixels, turns, fields, transparency and range, each on drawn films against
FFmpeg's own filters, Pillow or a closed form."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.filter import Graph
from PIL import Image, ImageOps

from aiprod_ds.data.dataset import ClipRequest, VideoClipDataset
from aiprod_ds.data.manifest import scan
from aiprod_ds.decode.fit import fit_clip
from aiprod_ds.decode.orientation import Orientation
from aiprod_ds.decode.probe import probe
from aiprod_ds.decode.video import decode_clip
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import (
    Coding,
    Pixels,
    corners,
    fields,
    half_transparent,
    ramp,
    write_animation,
    write_film,
)

_PAL = Fraction(64, 45)


def _decoded(path: Path, num_frames: int = 1, background: tuple[int, int, int] = (0, 0, 0)) -> Pixels:
    return decode_clip(
        path, start_seconds=0.0, num_frames=num_frames, frame_rate_hz=None, background=background
    )


def _trained(folder: Path, height: int, width: int) -> torch.Tensor:
    request = ClipRequest(sample_index=0, epoch=0, frames=1, height=height, width=width, augment=False)
    return VideoClipDataset(scan(folder), seed=0)[request]["video"]


_LOSSLESS = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"qp": "0"}}


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.ts"])
@pytest.mark.parametrize(("aspect", "width"), [(_PAL, 128), (Fraction(2), 180), (Fraction(10, 11), 82)])
def test_pixels_that_are_not_square_are_stretched(
    tmp_path: Path, name: str, aspect: Fraction, width: int
) -> None:
    write_film(tmp_path / name, [ramp(36, 90)] * 3, Coding(**_LOSSLESS, pixel_aspect=aspect))
    (record,) = scan(tmp_path).records
    assert (record.height, record.width) == (36, width)
    assert record.pixel_aspect == pytest.approx(float(aspect))
    # Oracle: a ramp stays the same ramp when stretched, with W columns in place of 90.
    video_CTHW = _trained(tmp_path, 36, width)
    expected = 40 + 160 * (np.arange(width) + 0.5) / width
    found = (video_CTHW[0, 0, 18].numpy() + 1) * 127.5
    # Tolerance: rounding in the drawing. The first and last columns have a neighbour on one side only.
    assert np.abs(found - expected)[3:-3].max() < 1


def test_stretching_and_scaling_are_one_resampling(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (36, 90, 3), dtype=np.uint8)
    write_film(tmp_path / "pal.mp4", [noise] * 2, Coding(**_LOSSLESS, pixel_aspect=_PAL))
    found_CTHW = _trained(tmp_path, 18, 64)
    # Oracle: torch's own resampling from the stored pixels to half of the displayed size.
    stored = torch.from_numpy(noise).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = torch.nn.functional.interpolate(
        stored, size=(18, 64), mode="bilinear", antialias=True, align_corners=False
    )
    torch.testing.assert_close(found_CTHW[:, 0], expected[0].clamp(-1, 1), rtol=0, atol=1e-6)


def test_the_displayed_aspect_decides_what_is_cropped() -> None:
    # A square clip that is displayed twice as wide: at 8x8, half of its columns are cut off, not of its rows.
    clip = torch.linspace(-1, 1, 8).expand(3, 1, 8, 8).contiguous()
    video = fit_clip(clip, height=8, width=8, seed=None, flip=False, displayed=(8, 16))
    assert video.shape == (3, 1, 8, 8)
    # Stretched to 16 columns a step is half as high; the middle 8 of them reach from -4/7 to 4/7 of the way.
    assert video[0, 0, 0, 0] == pytest.approx(-0.5, abs=0.01)
    assert video[0, 0, 0, -1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrors", [(False, False), (True, False), (False, True)])
def test_turns_and_mirrors_compose_with_the_shape_of_pixels(
    tmp_path: Path, degrees: int, mirrors: tuple[bool, bool]
) -> None:
    stored = corners(32, 48)
    coding = Coding(**_LOSSLESS, pixel_aspect=Fraction(2), turn=(degrees, *mirrors))
    path = write_film(tmp_path / "turned.mp4", [stored] * 2, coding)
    # Oracle: numpy; FFmpeg turns counterclockwise first, then mirrors across and down.
    expected = np.rot90(stored, k=degrees // 90)
    expected = expected[:, ::-1] if mirrors[0] else expected
    expected = expected[::-1] if mirrors[1] else expected
    np.testing.assert_array_equal(_decoded(path)[0], expected)
    record = probe(path)
    assert (record.height, record.width) == ((32, 96) if degrees % 180 == 0 else (96, 32))
    turned = np.rot90(stored[:, ::-1] if record.is_mirrored else stored, k=record.rotation_degrees // 90)
    np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_lies_as_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(corners(32, 48))
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"image.{suffix}", exif=exif, **options)
    # Oracle: Pillow, which decodes and turns by itself.
    with Image.open(tmp_path / f"image.{suffix}") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    found = _decoded(tmp_path / f"image.{suffix}")[0].astype(int)
    assert found.shape == expected.shape
    # JPEG's colours are smeared over the edges of the quarters; decoders differ by a few elsewhere.
    assert np.median(np.abs(found - expected)) <= 1
    assert np.abs(found - expected).mean() < 4
    (record,) = scan(tmp_path).records
    assert (record.height, record.width) == expected.shape[:2]


def test_the_eight_orientations_are_eight() -> None:
    picture = corners(4, 6)
    all_eight = {
        Orientation(*(bool(bits >> place & 1) for place in range(3))).upright(picture).tobytes()
        for bits in range(8)
    }
    assert len(all_eight) == 8


_INTERLACED = [
    ("tff.mkv", "libx264", "yuv420p", {"x264-params": "tff=1:keyint=6"}),
    ("bff.mp4", "libx264", "yuv420p", {"x264-params": "bff=1:keyint=6"}),
    ("tff.mpg", "mpeg2video", "yuv420p", {"flags": "+ilme+ildct", "qscale": "2"}),
    ("intra.mov", "prores_ks", "yuv422p10le", {"flags": "+ildct", "field_order": "tt"}),
]


@pytest.mark.parametrize(("name", "codec", "pixel_format", "options"), _INTERLACED)
@pytest.mark.parametrize("rate", [None, 25.0])
def test_fields_become_frames_wherever_decoding_starts(
    tmp_path: Path, name: str, codec: str, pixel_format: str, options: dict[str, str], rate: float | None
) -> None:
    coding = Coding(codec=codec, pixel_format=pixel_format, options=options)
    is_top_first = not name.startswith("bff")
    pictures = [fields(index, 48, 96, is_top_first=is_top_first) for index in range(24)]
    path = write_film(tmp_path / name, pictures, coding)
    # Oracle: FFmpeg's filter over the whole film in one go, bit for bit.
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert all(frame.interlaced_frame for frame in frames)
        graph = Graph()
        nodes = (graph.add_buffer(template=stream, time_base=stream.time_base), graph.add("bwdif", "mode=0"))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        expected = []
        for frame in [*frames, None]:
            graph.vpush(frame)
            while True:
                try:
                    expected.append(graph.vpull().to_ndarray(format="rgb24"))
                except (BlockingIOError, EOFError):
                    break
    assert len(expected) == 24
    assert probe(path).is_interlaced
    for start in range(22):
        found = decode_clip(path, start_seconds=start / 25, num_frames=3, frame_rate_hz=rate)
        np.testing.assert_array_equal(found, expected[start : start + 3], err_msg=f"start {start}")
    # What was woven differs from row to row; what is displayed does not, but for the bar's slanting ends.
    woven = frames[10].to_ndarray(format="rgb24").astype(int)
    assert (
        np.abs(np.diff(expected[10].astype(int), axis=0)).mean() < np.abs(np.diff(woven, axis=0)).mean() / 3
    )


def test_a_film_of_whole_frames_is_not_touched(tmp_path: Path) -> None:
    path = write_film(tmp_path / "plain.mkv", [fields(index, 48, 96) for index in range(4)], Coding())
    np.testing.assert_array_equal(_decoded(path, 4), [fields(index, 48, 96) for index in range(4)])
    assert not probe(path).is_interlaced


_TRANSPARENT = [
    ("a.webm", Coding(codec="libvpx-vp9", pixel_format="yuva420p", options={"auto-alt-ref": "0"})),
    ("b.webm", Coding(codec="libvpx", pixel_format="yuva420p", options={"auto-alt-ref": "0"})),
    ("c.mov", Coding(codec="prores_ks", pixel_format="yuva444p10le", options={"profile": "4444"})),
    ("d.mov", Coding(codec="qtrle", pixel_format="argb")),
    ("e.png", Coding(codec="apng", pixel_format="rgba", format="apng")),
    ("f.mkv", Coding(pixel_format="bgra")),
]


@pytest.mark.parametrize(("name", "coding"), _TRANSPARENT)
def test_what_is_transparent_shows_the_background(tmp_path: Path, name: str, coding: Coding) -> None:
    path = write_film(tmp_path / name, [half_transparent(32, 48)] * 4, coding)
    _check_transparent(path)


def test_transparent_frames_are_exact_wherever_decoding_starts(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 4), dtype=np.uint8)
    coding = Coding(
        codec="libvpx-vp9", pixel_format="yuva420p", options={"auto-alt-ref": "0", "g": "6", "crf": "30"}
    )
    path = write_film(tmp_path / "film.webm", list(noise), coding)
    whole = _decoded(path, 24)
    assert np.abs(whole[0].astype(int) - whole[1]).mean() > 10, "the frames differ"
    for start in (1, 5, 6, 13, 21):
        part = decode_clip(path, start_seconds=start / 25, num_frames=3, frame_rate_hz=25.0)
        np.testing.assert_array_equal(part, whole[start : start + 3])


@pytest.mark.parametrize("name", ["a.gif", "b.webp", "c.png", "d.webp", "e.gif"])
def test_what_is_transparent_in_images_shows_the_background(tmp_path: Path, name: str) -> None:
    picture = half_transparent(32, 48)
    if name in ("a.gif", "b.webp"):
        # Two pictures that differ, or Pillow writes one.
        other = picture.copy()
        other[:4, -4:, :3] = 255
        write_animation(tmp_path / name, [picture, other])
    else:
        image = Image.fromarray(picture)
        (image.quantize() if name == "c.png" else image).save(tmp_path / name, lossless=True)
    _check_transparent(tmp_path / name)


def _check_transparent(path: Path) -> None:
    # The colour below alpha 0 is red, or what the encoder made of it; none of it may show.
    assert probe(path).has_alpha
    black, green = _decoded(path)[0], _decoded(path, background=(0, 255, 0))[0]
    np.testing.assert_array_equal(black[:, :20], np.zeros((32, 20, 3)))
    np.testing.assert_array_equal(green[:, :20], np.broadcast_to(np.uint8([0, 255, 0]), (32, 20, 3)))
    # Tolerance: limited range and lossy codecs.
    assert np.abs(green[8:-8, 30:-8].astype(int) - [255, 0, 0]).max() <= 6


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    picture = np.full((8, 8, 4), (255, 100, 0, 51), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    # 51 / 255 = 0.2: 0.2 * (255, 100, 0) + 0.8 * (0, 255, 100) = (51, 224, 80).
    np.testing.assert_array_equal(
        _decoded(tmp_path / "a.png", background=(0, 255, 100))[0, 0, 0], [51, 224, 80]
    )


def test_an_opaque_picture_with_alpha_stays_as_it_is(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    picture[..., 3] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_decoded(tmp_path / "a.png", background=(9, 9, 9))[0], picture[..., :3])
    assert not probe(tmp_path / "a.png").has_alpha


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animated_images_are_films(tmp_path: Path, suffix: str) -> None:
    shades = [20 + 20 * index for index in range(8)]
    pictures = [np.full((16, 24, 3), shade, dtype=np.uint8) for shade in shades]
    path = write_animation(tmp_path / f"film.{suffix}", pictures, milliseconds=50)
    (record,) = scan(tmp_path).records
    assert (record.frames, record.height, record.width) == (8, 16, 24)
    assert record.fps == pytest.approx(20.0)
    frames = decode_clip(path, start_seconds=0.1, num_frames=3, frame_rate_hz=20.0)
    assert [int(frame[0, 0, 0]) for frame in frames] == shades[2:5]


@pytest.mark.parametrize(("tag", "expected"), [(1, (0, 255, 130)), (2, (16, 235, 128)), (0, (0, 255, 130))])
def test_the_range_that_a_film_states_is_used(
    tmp_path: Path, tag: int, expected: tuple[int, int, int]
) -> None:
    # Y codes 16, 235 and 128 without colour. Closed form: limited range is (Y - 16) 255 / 219, full is Y.
    frame = av.VideoFrame(48, 16, "yuv420p")
    luma = np.repeat(np.uint8([16, 235, 128]), 16)[None].repeat(16, axis=0)
    for plane, value in zip(frame.planes, (luma, 128, 128), strict=True):
        rows = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
        rows[:, : plane.width] = value
        plane.update(rows.tobytes())
    frame.color_range, frame.pts, frame.time_base = tag, 0, Fraction(1, 25)
    path = tmp_path / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 16, "yuv420p"
        stream.codec_context.color_range = tag
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = _decoded(path)[0, 8, [8, 24, 40]]
    assert np.abs(found.astype(int) - np.array(expected)[:, None]).max() <= 1


def test_frames_of_two_sizes_are_named(tmp_path: Path) -> None:
    for name, height in (("a.ts", 32), ("b.ts", 48)):
        coding = Coding(codec="mpeg2video", pixel_format="yuv420p")
        write_film(tmp_path / name, [ramp(height, 64)] * 6, coding)
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(DataError, match=r"joined\.ts: must have one size, got frames of 64x32 and 64x48"):
        _decoded(joined, 10)
