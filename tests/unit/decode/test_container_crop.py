"""Cropping that a container states, in files whose headers get it by hand: FFmpeg's muxers write none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from aiprod_ds.data.dataset import ClipRequest, VideoClipDataset
from aiprod_ds.data.manifest import scan
from aiprod_ds.decode.container_crop import Crop, container_crop
from aiprod_ds.decode.video import decode_clip
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import Coding, corners, write_film
from aiprod_ds.testing.container_crops import with_clap, with_pixel_crop

_LOSSLESS = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"qp": "0"}}
_HEIGHT, _WIDTH = _SIZE = (40, 64)
_CROP = Crop(top=2, bottom=6, left=8, right=4)


def _picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8)
    noise[: _HEIGHT // 2] = corners(_HEIGHT // 2, _WIDTH)
    return noise


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("turn", [0, 90])
def test_what_a_container_crops_is_not_trained_on(tmp_path: Path, suffix: str, turn: int) -> None:
    coding = Coding(**_LOSSLESS, pixel_aspect=Fraction(2), turn=(turn, False, False))
    path = write_film(tmp_path / f"film.{suffix}", [_picture()] * 4, coding)
    assert container_crop(path) == Crop()
    patch = with_clap if suffix == "mp4" else with_pixel_crop
    path.write_bytes(patch(path.read_bytes(), _SIZE, _CROP))
    assert container_crop(path) == _CROP
    (record,) = scan(tmp_path).records
    assert record.crop == tuple(_CROP)
    assert (record.height, record.width) == ((32, 104) if turn == 0 else (104, 32))
    frames = decode_clip(path, start_seconds=0.04, num_frames=2, frame_rate_hz=None, crop=record.crop)
    expected = np.rot90(_picture()[2:34, 8:60], k=turn // 90)
    np.testing.assert_array_equal(frames, [expected] * 2)
    # Through the dataset, at the displayed size: nothing is cropped a second time.
    request = ClipRequest(
        sample_index=0, epoch=0, frames=1, height=record.height, width=record.width, augment=False
    )
    video_CTHW = VideoClipDataset(scan(tmp_path), seed=0)[request]["video"]
    corner = (video_CTHW[:, 0, 0, 0].numpy() + 1) * 127.5
    np.testing.assert_allclose(corner, expected[0, 0], atol=1)


def test_the_cache_keeps_the_crop(tmp_path: Path) -> None:
    path = write_film(tmp_path / "clips" / "film.mp4", [_picture()] * 2, Coding(**_LOSSLESS))
    path.write_bytes(with_clap(path.read_bytes(), _SIZE, _CROP))
    first = scan(tmp_path / "clips", cache=tmp_path / "cache.json")
    assert scan(tmp_path / "clips", cache=tmp_path / "cache.json") == first
    assert first.records[0].crop == tuple(_CROP)


def test_a_crop_of_everything_is_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [_picture()] * 2, Coding(**_LOSSLESS))
    path.write_bytes(with_clap(path.read_bytes(), _SIZE, Crop(left=60, right=4)))
    (unreadable,) = scan(tmp_path).unreadable
    assert unreadable.reason == "crops all of its pictures of 64x40"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1a\x45\xdf\xa3",
        b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff",
        b"\0\0\0\x08moov",
        b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\0moov",
    ],
)
def test_headers_that_end_early_crop_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "film").write_bytes(content)
    assert container_crop(tmp_path / "film") == Crop()


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [_picture()] * 2, Coding(**_LOSSLESS))
    film = with_clap(path.read_bytes(), _SIZE, _CROP)
    at = film.index(b"clap")
    path.write_bytes(film[: at + 8] + bytes(4) + film[at + 12 :])  # a width over 0
    with pytest.raises(ValueError, match="its header is damaged"):
        container_crop(path)
    assert "cannot be decoded: its header is damaged" in scan(tmp_path).unreadable[0].reason


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a decodable video"):
        decode_clip(tmp_path / "gone.mkv", start_seconds=0, num_frames=1, frame_rate_hz=None)
