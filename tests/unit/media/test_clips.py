"""Written clips, read again by a decoder: frames, rate, duration, sound and quality; and the contact
sheet."""

from __future__ import annotations

import io
import logging
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aiprod_ds.media.clips import make_clip, save_contact_sheet
from aiprod_ds.media.mp4 import Pixels, Sound, encode_mp4
from aiprod_ds.media.pictures import to_pixels


def _video(frames: int, height: int, width: int) -> Tensor:
    """Soft colours that move, [3,T,H,W]: what a codec can keep."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij"
    )
    return torch.stack([torch.sin(x + 2 * t), torch.cos(y - t), torch.sin(x + y)]) * 0.8


def _tone(seconds: float, rate_hz: int, *, channels: int, pitch_hz: float = 440.0) -> Sound:
    wave = 0.5 * torch.sin(2 * math.pi * pitch_hz * torch.arange(round(seconds * rate_hz)) / rate_hz)
    return Sound(samples=wave.expand(channels, -1), sample_rate_hz=rate_hz)


def _frames(mp4: bytes) -> Pixels:
    with av.open(io.BytesIO(mp4)) as film:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])


def _psnr_db(found: Pixels, expected: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - expected) ** 2)))


@pytest.mark.parametrize(
    ("rate_hz", "expected"),
    [(24.0, Fraction(24)), (24000 / 1001, Fraction(24000, 1001)), (12.5, Fraction(25, 2))],
)
def test_frames_size_and_rate_are_kept(rate_hz: float, expected: Fraction) -> None:
    frames_THWC = to_pixels(_video(9, 96, 128))
    mp4 = encode_mp4(frames_THWC, frame_rate_hz=rate_hz)
    with av.open(io.BytesIO(mp4)) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == expected
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / rate_hz, abs=1e-3)
        assert not film.streams.audio
    found = _frames(mp4)
    assert found.shape == frames_THWC.shape
    # 4:2:0 halves the resolution of colour; measured 42 dB on these soft pictures.
    assert _psnr_db(found, frames_THWC) > 38


def test_an_odd_size_gets_its_last_row_and_column_twice() -> None:
    frames_THWC = to_pixels(_video(3, 33, 47))
    found = _frames(encode_mp4(frames_THWC, frame_rate_hz=24.0))
    assert found.shape == (3, 34, 48, 3)
    assert _psnr_db(found[:, :33, :47], frames_THWC) > 35
    assert _psnr_db(found[:, 33:, :47], frames_THWC[:, 32:]) > 30


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("rate_hz", "written_hz"), [(16_000, 16_000), (44_100, 44_100), (15_000, 48_000)])
def test_sound_is_there_as_long_and_as_high(channels: int, rate_hz: int, written_hz: int) -> None:
    mp4 = encode_mp4(
        to_pixels(_video(24, 32, 32)), frame_rate_hz=24.0, sound=_tone(1.0, rate_hz, channels=channels)
    )
    with av.open(io.BytesIO(mp4)) as film:
        stream = film.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", written_hz, channels)
        wave_CN = np.concatenate([frame.to_ndarray() for frame in film.decode(audio=0)], axis=1)
    # AAC writes frames of 1024 samples.
    assert wave_CN.shape[1] / written_hz == pytest.approx(1.0, abs=2 * 1024 / written_hz)
    middle = wave_CN[0, written_hz // 4 : 3 * written_hz // 4]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / math.sqrt(2), rel=0.05)
    loudest_hz = np.abs(np.fft.rfft(middle)).argmax() * written_hz / len(middle)
    assert loudest_hz == pytest.approx(440.0, abs=2.0)  # half a second resolves 2 Hz
    assert len(_frames(mp4)) == 24


def test_sound_that_is_not_finite_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    sound = Sound(samples=torch.tensor([[0.0, float("nan")]]), sample_rate_hz=16_000)
    with caplog.at_level(logging.WARNING):
        mp4 = encode_mp4(to_pixels(_video(2, 32, 32)), frame_rate_hz=24.0, sound=sound)
    assert "sound_not_written reason=samples_not_finite" in caplog.text
    with av.open(io.BytesIO(mp4)) as film:
        assert not film.streams.audio
    assert len(_frames(mp4)) == 2


@pytest.mark.parametrize("shape", [(3, 100), (100,), (2, 0)])
def test_sound_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sound: must be \[1 or 2, N\] with N above 0, got"):
        encode_mp4(
            to_pixels(_video(1, 32, 32)),
            frame_rate_hz=24.0,
            sound=Sound(samples=torch.zeros(shape), sample_rate_hz=16_000),
        )


def test_a_small_clip_is_enlarged_and_five_stills_are_spread_over_it() -> None:
    video_CTHW = _video(9, 16, 24)
    clip = make_clip(video_CTHW, frame_rate_hz=24.0)
    assert _frames(clip.mp4).shape == (9, 160, 240, 3)
    assert clip.stills.shape == (5, 160, 240, 3)
    assert np.array_equal(clip.stills[:, 5::10, 5::10], to_pixels(video_CTHW)[[0, 2, 4, 6, 8]])
    assert len(make_clip(_video(1, 16, 24), frame_rate_hz=24.0).stills) == 1


def test_the_contact_sheet_has_a_row_of_stills_for_each_clip(tmp_path: Path) -> None:
    clips = [make_clip(torch.full((3, 5, 160, 160), level), frame_rate_hz=24.0) for level in (-1.0, 0.0)]
    save_contact_sheet(
        clips,
        ["dark", "a caption that is much too long for one line " * 10],
        tmp_path / "a.png",
        title="grey",
    )
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (40 + 2 * (24 + 160 + 18), 5 * 166 - 6 + 36, 3)
    for row, level in enumerate((0, 128)):
        top = 40 + 24 + row * 202
        for left in range(18, 800, 166):
            assert (sheet[top : top + 160, left : left + 160] == level).all()
    assert (sheet[40:64, 18:300] < 200).any(), "a caption stands over its row"
    assert (sheet[:, -18:] == 255).all(), "the long caption is cut"


def test_wide_stills_are_scaled_down_on_the_sheet(tmp_path: Path) -> None:
    save_contact_sheet(
        [make_clip(_video(2, 512, 768), frame_rate_hz=24.0)], ["wide"], tmp_path / "a.png", title="one"
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 390 - 6 + 36, 40 + 24 + 256 + 18)
