"""AudioQuality: worked numbers, closed-form SI-SDR, lengths, merging over ranks."""

import math

import pytest
import torch

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.audio_quality import AudioQuality

RATE_HZ = 16000


def _waves(batch=2, channels=2, samples=4096):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, channels, samples, generator=generator) - 0.5 for _ in range(2)]


def _measured(*pairs, **kwargs):
    quality = AudioQuality(sample_rate_hz=RATE_HZ)
    for original, reconstruction in pairs:
        quality.update(original, reconstruction, **kwargs)
    return quality


def test_worked_number_of_the_docstring():
    x, _ = _waves(batch=1)
    windows = [torch.hann_window(size) for size in (2048, 512)]
    spectra = [torch.stft(x[0], len(w), len(w) // 4, window=w, return_complex=True).abs() for w in windows]
    result = _measured((x, x / 10)).compute()

    # fp32 means of magnitudes near 10; a bin in a thousand may be near the floor.
    assert result["stft_distance"] == pytest.approx(4 + 0.9 * sum(s.mean().item() for s in spectra), rel=1e-4)
    assert result["si_sdr_db"] == 100.0


def test_an_exact_copy_is_at_distance_zero_and_at_the_ceiling():
    x, _ = _waves()
    assert _measured((x, x)).compute() == {"mel_distance": 0.0, "stft_distance": 0.0, "si_sdr_db": 100.0}


def test_si_sdr_of_orthogonal_noise_is_the_energy_ratio():
    samples = torch.arange(16000) / 16000
    x = torch.sin(2 * math.pi * 100 * samples).view(1, 1, -1)
    noise = 0.1 * torch.sin(2 * math.pi * 200 * samples).view(1, 1, -1)

    # Whole periods: orthogonal up to fp32 rounding of the sines.
    assert _measured((x, x + noise)).compute()["si_sdr_db"] == pytest.approx(20.0, abs=1e-3)


def test_distances_grow_with_the_error():
    x, noise = _waves()
    near, far = (_measured((x, x + scale * noise)).compute() for scale in (0.1, 0.5))

    assert 0 < near["mel_distance"] < far["mel_distance"]
    assert 0 < near["stft_distance"] < far["stft_distance"]
    assert near["si_sdr_db"] > far["si_sdr_db"]


def test_mel_distance_agrees_with_torchaudio():
    from torchaudio.transforms import MelSpectrogram

    x, y = _waves(batch=1)
    expected = 0.0
    for size, bands in ((2048, 150), (512, 80)):
        mel = MelSpectrogram(
            RATE_HZ, size, hop_length=size // 4, n_mels=bands, power=1.0, norm="slaney", mel_scale="slaney"
        )
        a, b = mel(x[0]), mel(y[0])
        logs = [value.clamp(min=1e-5).pow(2).log10() for value in (a, b)]
        expected += ((a - b).abs().mean() + (logs[0] - logs[1]).abs().mean()).item()

    # fp32 on both sides.
    assert _measured((x, y)).compute()["mel_distance"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_a_silent_original_is_named_and_left_out_of_every_mean(level):
    """Also one with an offset, which nobody hears."""
    x, y = _waves(batch=1)
    silence = torch.full_like(x, level)
    quality = AudioQuality(sample_rate_hz=RATE_HZ)
    quality.update(silence, y, names=["silent.wav"])

    assert quality.compute() == {}
    quality.update(x, y, names=["speech.wav"])
    assert quality.compute() == _measured((x, y)).compute()
    assert {(entry.clip, entry.reason) for entry in quality.not_judged} == {("silent.wav", "digital silence")}
    assert {entry.measure for entry in quality.not_judged} == {"mel_distance", "stft_distance", "si_sdr_db"}


def test_a_sound_under_half_a_window_has_a_ratio_and_no_distances():
    x, y = _waves(batch=1)
    quality = _measured((x, y), num_samples=[1024])

    assert set(quality.compute()) == {"si_sdr_db"}
    assert [(entry.measure, entry.reason) for entry in quality.not_judged] == [
        ("mel_distance", "under 1025 samples"),
        ("stft_distance", "under 1025 samples"),
    ]
    assert set(_measured((x, y), num_samples=[1025]).compute()) == {
        "mel_distance",
        "stft_distance",
        "si_sdr_db",
    }


def test_a_silent_reconstruction_is_the_worst_and_not_left_out():
    """torchmetrics gives it 0 dB, above a reconstruction that is only noise."""
    x, noise = _waves(batch=1)
    silent, other = _measured((x, torch.zeros_like(x))), _measured((x, noise))

    assert silent.not_judged == ()
    assert silent.compute()["si_sdr_db"] == -100.0 < other.compute()["si_sdr_db"] < 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_and_is_not_left_out(value):
    x, y = _waves(batch=1)
    y[0, 1, 2000] = value
    quality = _measured((x, y))

    assert quality.not_judged == ()
    assert all(math.isnan(found) for found in quality.compute().values())


def test_a_mean_stands_over_the_clips_that_an_opinion_could_judge():
    x, y = _waves(batch=3)
    opinions = iter([2.0, "under 1 s", 4.0])
    quality = AudioQuality(sample_rate_hz=RATE_HZ, opinion=lambda *_: next(opinions))
    quality.update(x, y, names=["a", "b", "c"])

    assert quality.compute()["visqol"] == 3.0
    assert [(entry.clip, entry.measure) for entry in quality.not_judged] == [("b", "visqol")]


def test_merged_ranks_equal_one_process():
    x, y = _waves(batch=3)
    merged = AudioQuality(sample_rate_hz=RATE_HZ)
    merged.merge(_measured((x[:1], y[:1])).state() + _measured((x[1:], y[1:])).state())

    # fp64 sums in another order.
    assert merged.compute() == pytest.approx(_measured((x, y)).compute(), rel=1e-12)


def test_padding_and_surplus_samples_have_no_effect():
    x, y = _waves()
    expected = _measured((x[:1, :, :2000], y[:1, :, :2000]), (x[1:], y[1:])).compute()
    x[0, :, 2000:], y[0, :, 2000:] = 5.0, math.nan
    surplus = torch.cat([y, torch.ones(2, 2, 64)], dim=2)

    assert _measured((x, surplus), num_samples=[2000, 4096]).compute() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_clips_are_measured_in_fp32(dtype):
    x, y = (wave.to(dtype) for wave in _waves())
    assert _measured((x, y)).compute() == _measured((x.float(), y.float())).compute()


def test_errors():
    x, y = _waves()
    with pytest.raises(DataError, match="needs at least one clip"):
        AudioQuality(sample_rate_hz=RATE_HZ).compute()
    with pytest.raises(DataError, match="at least as long"):
        _measured((x, y[..., :-1]))
    with pytest.raises(DataError, match=r"2 lengths from 1 to 4096, got \[0, 4096\]"):
        _measured((x, y), num_samples=[0, 4096])


@pytest.mark.parametrize("sample_rate_hz", [16000, 24000, 44100, 48000])
def test_bands_without_a_bin_raise_no_warning(sample_rate_hz):
    x, y = _waves()
    quality = AudioQuality(sample_rate_hz=sample_rate_hz)
    quality.update(x, y)

    assert math.isfinite(quality.compute()["mel_distance"])
