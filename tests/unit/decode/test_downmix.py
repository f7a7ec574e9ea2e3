"""Layouts of many channels as mono and stereo, against the matrix worked out by hand and FFmpeg's own."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from aiprod_ds.data.manifest import scan
from aiprod_ds.decode.audio import decode_audio
from aiprod_ds.decode.downmix import check_layout, with_channels
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import write_sound

_RATE = 48_000
_FIVE_ONE = ("FL", "FR", "FC", "LFE", "BL", "BR")


def _tones(channels: int, samples: int = 4800) -> np.ndarray:
    seconds = np.arange(samples) / _RATE
    return np.stack(
        [0.1 * (place + 1) * np.sin(2 * np.pi * 200 * (place + 1) * seconds) for place in range(channels)]
    ).astype(np.float32)


def _decoded(path: Path, channels: int, samples: int = 4800) -> np.ndarray:
    return decode_audio(
        path, start_sample=0, num_samples=samples, sample_rate_hz=_RATE, channels=channels
    ).numpy()


def test_the_worked_number_of_the_docstring() -> None:
    wave_CN = torch.tensor([[0.5], [0.0], [0.5], [0.9], [0.0], [0.0]])
    stereo = with_channels(wave_CN, 2, _FIVE_ONE)
    torch.testing.assert_close(stereo, torch.tensor([[0.35355], [0.14645]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        with_channels(wave_CN, 1, _FIVE_ONE), torch.tensor([[0.25]]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "codec", "layout"),
    [
        ("a.wav", "pcm_f32le", "5.1"),
        ("b.flac", "flac", "5.1"),
        ("c.flac", "flac", "5.1(side)"),
        ("d.wav", "pcm_f32le", "7.1"),
        ("e.wav", "pcm_f32le", "quad"),
        ("f.wav", "pcm_f32le", "3.0"),
        ("g.wav", "pcm_f32le", "4.0"),
        ("h.wav", "pcm_f32le", "6.1"),
    ],
)
def test_layouts_are_mixed_as_ffmpeg_mixes_them_and_normalised(
    tmp_path: Path, name: str, codec: str, layout: str
) -> None:
    channels = len(av.AudioLayout(layout).channels)
    path = write_sound(tmp_path / name, _tones(channels), codec=codec, layout=layout, rate_hz=_RATE)
    # Oracle: libswresample to stereo in floats, where it uses BS.775's weights and does not normalise.
    converter = av.AudioResampler(format="fltp", layout="stereo", rate=_RATE)
    packed = np.ascontiguousarray(_tones(channels).T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = _RATE, 0, Fraction(1, _RATE)
    pieces = [piece.to_ndarray() for piece in [*converter.resample(frame), *converter.resample(None)]]
    mixed = np.concatenate(pieces, axis=1)
    found = _decoded(path, 2)
    factor = float((found * mixed).sum() / (mixed * mixed).sum())
    # 16 bits of FLAC.
    np.testing.assert_allclose(found, factor * mixed, rtol=0, atol=1e-4)
    full = {"FL": 1.0, "FC": 0.5**0.5, "SL": 0.5**0.5, "BL": 0.5**0.5, "BC": 0.5}
    names = [channel.name for channel in av.AudioLayout(layout).channels]
    assert factor == pytest.approx(1 / sum(full.get(item, 0.0) for item in names), rel=1e-3)
    np.testing.assert_allclose(_decoded(path, 1)[0], found.mean(axis=0), rtol=0, atol=1e-6)


def test_full_scale_everywhere_is_not_clipped() -> None:
    stereo = with_channels(torch.ones(6, 10), 2, _FIVE_ONE)
    torch.testing.assert_close(stereo, torch.ones(2, 10))


def test_surround_in_aac_keeps_its_places(tmp_path: Path) -> None:
    # Only the front right sounds; AAC stores channels in another order than FFmpeg names them.
    tones = _tones(6, _RATE)
    tones[[0, 2, 3, 4, 5]] = 0
    path = write_sound(tmp_path / "a.m4a", tones, codec="aac", layout="5.1", rate_hz=_RATE)
    found = _decoded(path, 2, _RATE // 2)[:, _RATE // 4 :]  # after the codec has settled
    assert np.abs(found[1]).max() == pytest.approx(0.2 / (1 + 2 * 0.5**0.5), rel=0.05)
    assert np.abs(found[0]).max() < 0.01


@pytest.mark.parametrize(("channels", "is_known"), [(3, False), (4, False), (6, True), (8, True)])
def test_channels_without_names(tmp_path: Path, channels: int, is_known: bool) -> None:
    samples = np.zeros((800, channels), dtype="<i2")
    samples[:, 1] = 16384
    with wave.open(str(tmp_path / "plain.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(samples.tobytes())
    manifest = scan(tmp_path, medium="sound")
    if not is_known:
        (unreadable,) = manifest.unreadable
        assert unreadable.reason == (
            f"it must be mono or stereo, or name its channels, got {channels} channels. Mix it down to stereo"
        )
        return
    (record,) = manifest.records
    assert record.audio_channels == channels
    found = _decoded(tmp_path / "plain.wav", 2, 800)
    weights = 1 + 0.5**0.5 * (2 if channels == 6 else 3)
    np.testing.assert_allclose(found[:, 0], [0, 0.5 / weights], atol=1e-4)


def test_channels_without_a_place_are_named() -> None:
    with pytest.raises(
        DataError, match=r"got 4 channels, among them AMBI0, AMBI1, AMBI2, AMBI3\. Mix it down"
    ):
        check_layout(4, ("AMBI0", "AMBI1", "AMBI2", "AMBI3"))
    with pytest.raises(DataError, match=r"got 6 channels\. Mix"):
        check_layout(6, None)
    check_layout(2, ("DL", "DR"))
