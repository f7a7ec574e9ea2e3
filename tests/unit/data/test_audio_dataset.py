"""Clips of sounds: the place as a function of seed, sample and epoch; silence, loudness and the user's own
tensors.

Sounds are ramps, so the first sample of a clip names its place.
"""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.functional import loudness

from aiprod_ds.config.data import AudioDataConfig
from aiprod_ds.data.audio_dataset import AudioClipDataset, TensorAudioDataset, usable_sounds
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.loudness import level_db, loudness_lufs, normalized
from aiprod_ds.data.manifest import scan
from aiprod_ds.decode.resampling import resample_window
from aiprod_ds.errors import DataError

_RATE = 8_000
_SAMPLES = 20_000


def _config(**changes: Any) -> AudioDataConfig:
    return AudioDataConfig(**{"train": "unused", "sample_rate_hz": _RATE, "channels": 1, **changes})


def _request(**changes: Any) -> ClipRequest:
    return ClipRequest(
        **{
            "sample_index": 0,
            "epoch": 0,
            "frames": 500,
            "height": 1,
            "width": 1,
            "frame_rate_hz": _RATE,
            **changes,
        }
    )


def _ramp(samples: int = _SAMPLES) -> Tensor:
    return torch.arange(samples, dtype=torch.float32) / 32_768


def _place(wave_CN: Tensor) -> int:
    return round(float(wave_CN[0, 0]) * 32_768)


def _save(path: Path, wave_CN: Tensor, rate_hz: int = _RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(wave_CN.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((wave_CN * 32_768).round().T.numpy().astype("<i2").tobytes())


@pytest.fixture
def files(tmp_path: Path) -> AudioClipDataset:
    _save(tmp_path / "ramp.wav", _ramp()[None])
    return AudioClipDataset(scan(tmp_path, medium="sound"), seed=7, config=_config())


def test_a_file_answers_requests_as_a_function_of_seed_sample_and_epoch(
    files: AudioClipDataset, tmp_path: Path
) -> None:
    clip = files[_request(epoch=3)]["audio"]
    assert clip.shape == (1, 500)
    assert clip.dtype == torch.float32
    again = AudioClipDataset(scan(tmp_path, medium="sound"), seed=7, config=_config())
    assert torch.equal(clip, again[_request(epoch=3)]["audio"])
    other = AudioClipDataset(scan(tmp_path, medium="sound"), seed=8, config=_config())
    assert not torch.equal(clip, other[_request(epoch=3)]["audio"])
    places = [_place(files[_request(epoch=epoch)]["audio"]) for epoch in range(16)]
    assert len(set(places)) > 12
    assert min(places) < _SAMPLES / 3
    assert max(places) > _SAMPLES / 3
    assert all(0 <= place <= _SAMPLES - 500 for place in places)


def test_without_augmentation_the_middle_is_taken(files: AudioClipDataset) -> None:
    for epoch in range(3):
        assert _place(files[_request(epoch=epoch, augment=False)]["audio"]) == (_SAMPLES - 500) // 2


def test_a_clip_may_be_as_long_as_the_sound_and_no_longer(files: AudioClipDataset) -> None:
    assert torch.equal(files[_request(frames=_SAMPLES)]["audio"][0], _ramp())
    message = r"ramp.wav: must have 20001 samples at 8000 Hz, got 20000. Ask for shorter clips"
    with pytest.raises(DataError, match=message):
        files[_request(frames=_SAMPLES + 1)]


def test_facts_count_samples_at_the_configured_rate(tmp_path: Path) -> None:
    _save(tmp_path / "a.wav", _ramp()[None].expand(2, -1))
    dataset = AudioClipDataset(
        scan(tmp_path, medium="sound"), seed=0, config=_config(sample_rate_hz=44_100, channels=2)
    )
    (facts,) = dataset.lengths()
    assert (facts.name, facts.frames, facts.seconds) == ("a.wav", 110_250, 2.5)
    assert (facts.height, facts.width, len(dataset)) == (1, 1, 1)
    for epoch in range(4):
        clip = dataset[_request(frames=110_250 - epoch, frame_rate_hz=44_100, epoch=epoch)]["audio"]
        assert clip.shape == (2, 110_250 - epoch)


def test_sounds_that_cannot_become_clips_are_listed(tmp_path: Path) -> None:
    _save(tmp_path / "good.wav", _ramp()[None])
    _save(tmp_path / "odd.wav", _ramp()[None], rate_hz=44_101)
    _save(tmp_path / "quiet.wav", torch.full((1, 1000), 0.0009))
    (tmp_path / "noise.wav").write_bytes(b"noise" * 50)
    manifest = usable_sounds(
        scan(tmp_path, medium="sound"), _config(sample_rate_hz=44_100, silence_threshold_db=-60)
    )
    assert [record.path for record in manifest.records] == ["good.wav"]
    reasons = {item.path: item.reason for item in manifest.unreadable}
    assert sorted(reasons) == ["noise.wav", "odd.wav", "quiet.wav"]
    assert "must be a simple ratio to data.sample_rate_hz (44100), got 44101 Hz" in reasons["odd.wav"]
    assert (
        "nowhere as loud as data.silence_threshold_db (-60 dB), its peak is 0.000885" in reasons["quiet.wav"]
    )
    assert len(usable_sounds(scan(tmp_path, medium="sound"), _config(sample_rate_hz=44_100)).records) == 2


def _mostly_silent() -> Tensor:
    sound = torch.zeros(_SAMPLES)
    sound[4_000:8_000] = 0.5
    return sound


def test_quiet_clips_are_drawn_again_and_always_the_same_way() -> None:
    # A fifth of the sound is loud, so of 40 single draws most are silent; 8 draws miss it in 0.8 ** 8 = 17 %
    # of the cases.
    request = {"frames": 200}
    plain = TensorAudioDataset([_mostly_silent()], seed=0, config=_config())
    loud = TensorAudioDataset([_mostly_silent()], seed=0, config=_config(silence_threshold_db=-20))
    silent = [not plain[_request(epoch=epoch, **request)]["audio"].any() for epoch in range(40)]
    assert sum(silent) > 20
    filtered = [loud[_request(epoch=epoch, **request)]["audio"] for epoch in range(40)]
    assert sum(not clip.any() for clip in filtered) < 16
    for epoch in range(40):
        assert torch.equal(filtered[epoch], loud[_request(epoch=epoch, **request)]["audio"])
        if not silent[epoch]:
            assert torch.equal(filtered[epoch], plain[_request(epoch=epoch, **request)]["audio"]), (
                "the first draw was loud enough"
            )
    assert not loud[_request(augment=False, **request)]["audio"].any(), "held-out clips stay in the middle"


def test_if_all_draws_are_quiet_the_loudest_is_kept() -> None:
    ramp = _ramp() / 100
    plain = TensorAudioDataset([ramp], seed=0, config=_config())
    loudest = TensorAudioDataset([ramp], seed=0, config=_config(silence_threshold_db=0))
    pairs = [
        (plain[_request(epoch=epoch)]["audio"], loudest[_request(epoch=epoch)]["audio"]) for epoch in range(8)
    ]
    assert all(float(kept[0, 0]) >= float(first[0, 0]) for first, kept in pairs)
    assert any(not torch.equal(first, kept) for first, kept in pairs)


def test_loudness_is_brought_to_the_target() -> None:
    noise = 0.02 * torch.randn(_SAMPLES, generator=torch.Generator().manual_seed(0))
    dataset = TensorAudioDataset([noise], seed=0, config=_config(loudness_lufs=-30.0))
    for augment in (True, False):
        clip = dataset[_request(frames=4000, augment=augment)]["audio"]
        assert loudness_lufs(clip, sample_rate_hz=_RATE) == pytest.approx(-30.0, abs=1e-4)


@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000])
def test_loudness_is_that_of_the_standard(rate_hz: int) -> None:
    # Oracle: torchaudio's gated measure of steady noise, where gates close nowhere. Its filters are those of
    # other analogue forms away from 48 kHz; the difference was at most 0.13 LU.
    noise_CN = 0.1 * torch.randn(2, 4 * rate_hz, generator=torch.Generator().manual_seed(0))
    assert loudness_lufs(noise_CN, sample_rate_hz=rate_hz) == pytest.approx(
        float(loudness(noise_CN, rate_hz)), abs=0.2
    )


@pytest.mark.parametrize("num_samples", [48_000, 47_999])
def test_loudness_of_a_sine_is_the_worked_number(num_samples: int) -> None:
    # BS.1770 calibrates 997 Hz at full scale in one channel to -3.01; a channel of the same adds 3.01.
    sine_CN = torch.sin(2 * math.pi * 997 * torch.arange(num_samples, dtype=torch.float64) / 48_000).float()[
        None
    ]
    assert loudness_lufs(sine_CN, sample_rate_hz=48_000) == pytest.approx(-3.01, abs=0.01)
    assert loudness_lufs(sine_CN.expand(2, -1), sample_rate_hz=48_000) == pytest.approx(0.0, abs=0.01)
    assert level_db(sine_CN) == pytest.approx(-3.01, abs=0.01)


def test_gains_stop_at_full_scale_and_leave_silence_alone() -> None:
    clip_CN = 0.01 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    clip_CN[0, 4000] = 0.5
    louder_CN = normalized(clip_CN, sample_rate_hz=_RATE, target_lufs=-6.0)
    assert torch.equal(louder_CN, clip_CN * 2)
    silence_CN = torch.zeros(1, 8000)
    assert torch.equal(normalized(silence_CN, sample_rate_hz=_RATE, target_lufs=-6.0), silence_CN)
    assert level_db(silence_CN) == loudness_lufs(silence_CN, sample_rate_hz=_RATE) == -math.inf
    whisper_CN = 1e-5 * torch.ones(1, 8000)
    assert torch.equal(normalized(whisper_CN, sample_rate_hz=_RATE, target_lufs=-6.0), whisper_CN)


@pytest.mark.parametrize(
    "item", [_ramp(), _ramp()[None], {"audio": _ramp()}, {"audio": _ramp()[None], "sample_rate_hz": _RATE}]
)
def test_tensors_answer_the_same_requests(item: Any, files: AudioClipDataset) -> None:
    # A ramp has nothing below 0, which looks like another range unless one is declared.
    dataset = TensorAudioDataset([item], seed=7, config=_config(), value_range=(-1.0, 1.0))
    assert len(dataset) == 1
    for epoch in range(3):
        request = _request(epoch=epoch)
        assert torch.equal(dataset[request]["audio"], files[request]["audio"]), (
            "the place is drawn from the same stream"
        )
    assert [(f.name, f.frames, f.seconds, f.height, f.width) for f in dataset.lengths()] == [
        ("dataset[0]", 20_000, 2.5, 1, 1)
    ]
    assert dataset.lengths() is dataset.lengths()


def test_tensors_are_resampled_and_given_channels() -> None:
    noise_CN = 0.1 * torch.randn(1, _SAMPLES, generator=torch.Generator().manual_seed(0))
    dataset = TensorAudioDataset(
        [{"audio": noise_CN, "sample_rate_hz": _RATE}],
        seed=0,
        config=_config(sample_rate_hz=16_000, channels=2),
    )
    # Oracle: the whole item resampled at once; another length may change the order of sums.
    whole_CN = resample_window(noise_CN, 0, 40_000, from_hz=_RATE, to_hz=16_000)
    clip_CN = dataset[_request(frames=1000, frame_rate_hz=16_000, augment=False)]["audio"]
    torch.testing.assert_close(clip_CN, whole_CN[:, 19_500:20_500].expand(2, -1), rtol=0, atol=2e-6)
    assert dataset.lengths()[0].frames == 40_000


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("sound", r"dataset\[0\]: must be a tensor or array \[N\] or \[C,N\], .* got str"),
        (torch.zeros(2, 3, 4), r"got \[2, 3, 4\] torch.float32"),
        (torch.zeros(8, dtype=torch.int32), r"got \[8\] torch.int32"),
        (torch.zeros(0), r"got \[0\] torch.float32"),
        ({"video": torch.zeros(8)}, r"got a mapping with \['video'\]"),
        (np.zeros((8, 9, 2), dtype=np.float32), r"got \[8, 9, 2\] float32"),
        (torch.zeros(1000, 2), r"sound must be \[C,N\], channels before samples, got \[1000, 2\]"),
        (
            torch.zeros(6, 1000),
            r"dataset\[0\]: it must be mono or stereo, or name its channels, got 6 channels. Mix it down",
        ),
        ({"audio": torch.zeros(1000), "sample_rate_hz": 8_001}, r"must be a simple ratio .* got 8001 Hz"),
    ],
)
def test_items_that_do_not_fit_are_named(item: Any, message: str) -> None:
    dataset = TensorAudioDataset([item], seed=0, config=_config(sample_rate_hz=_RATE))
    with pytest.raises(DataError, match=message):
        dataset.lengths()
    with pytest.raises(DataError, match=message):
        dataset[_request(frames=100)]


def test_items_with_bad_samples_or_too_few_are_named() -> None:
    bad = _ramp()
    bad[10_000] = float("nan")
    dataset = TensorAudioDataset([_ramp(), bad, _ramp(400)], seed=0, config=_config())
    with pytest.raises(DataError, match=r"dataset\[1\]: samples must be finite, got NaN or infinity"):
        dataset[_request(sample_index=1, frames=_SAMPLES)]
    with pytest.raises(DataError, match=r"dataset\[2\]: must have 500 samples at 8000 Hz, got 400\."):
        dataset[_request(sample_index=2)]
