"""AudioVAELoss and MelLoss: worked numbers, weights, padding, formats."""

import pytest
import torch

from aiprod_ds.config.losses import AudioVAELossConfig, MelConfig, SpectralConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.losses import AudioVAELoss
from aiprod_ds.losses.mel import MelLoss

RATE_HZ = 16000


def _waves(channels=1, samples=2048, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, samples)
    return [(torch.rand(shape, generator=generator) - 0.5).to(dtype) for _ in range(2)]


def _posterior(batch=2, positions=4):
    return torch.full((batch, 3, positions), 2.0), torch.zeros(batch, 3, positions)


def test_worked_number_of_the_docstring():
    silence = torch.zeros(1, 1, 1024)
    click = silence.clone()
    click[..., 512] = 1.0
    config = AudioVAELossConfig(spectral=SpectralConfig(fft_sizes=(256,)))

    terms = AudioVAELoss(config)(click, silence, *_posterior(batch=1))

    # fp32 logs and means of about 2000 numbers.
    expected = {
        "loss/total": 1.645318,
        "loss/waveform_l1": 1 / 1024,
        "loss/spectral": 1.644620,
        "loss/kl": 6.0,
        "latent/mean": 2.0,
        "latent/std": 0.0,
        "latent/collapsed_share": 0.0,
    }
    assert {name: value.item() for name, value in terms.terms.items()} == pytest.approx(expected, abs=5e-6)
    assert terms.total.item() == terms.terms["loss/total"].item()


def test_terms_of_weight_zero_are_measured_and_not_trained():
    y, x = _waves()
    mean, logvar = _posterior()
    y.requires_grad_()
    mean.requires_grad_()

    terms = AudioVAELoss(AudioVAELossConfig(kl_weight=0.0, spectral_weight=0.0), sample_rate_hz=RATE_HZ)(
        y, x, mean, logvar
    )
    terms.total.backward()

    assert terms.total.item() == pytest.approx(0.1 * (y - x).abs().mean().item(), rel=1e-5)
    assert all(terms.terms[f"loss/{name}"].item() > 0 for name in ("kl", "spectral", "mel"))
    assert mean.grad is None


def test_a_padded_clip_counts_as_if_it_stood_alone():
    y, x = _waves()
    generator = torch.Generator().manual_seed(1)
    mean, logvar = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 1, 4, generator=generator)
    # 1024 of 2048 samples own 2 of 4 latent positions.
    lengths, positions = [2048, 1024], [4, 2]
    loss = AudioVAELoss(AudioVAELossConfig(mel_weight=1.0, kl_weight=1.0), sample_rate_hz=RATE_HZ)
    together = loss(y, x, mean, logvar, num_samples=lengths).terms
    alone = [
        loss(y[i : i + 1, :, :n], x[i : i + 1, :, :n], mean[i : i + 1, :, :p], logvar[i : i + 1, :, :p]).terms
        for i, (n, p) in enumerate(zip(lengths, positions, strict=True))
    ]

    for name in ("loss/total", "loss/waveform_l1", "loss/spectral", "loss/kl", "loss/mel"):
        # fp32 sums in another order.
        assert together[name].item() == pytest.approx((alone[0][name] + alone[1][name]).item() / 2, rel=1e-5)


def test_padding_has_no_effect():
    y, x = _waves()
    mean, logvar = _posterior()
    loss = AudioVAELoss(AudioVAELossConfig(), sample_rate_hz=RATE_HZ)
    before = loss(y, x, mean, logvar, num_samples=[1000, 2048]).terms
    y[0, :, 1000:], x[0, :, 1000:], mean[0, :, 2:] = 9.0, -9.0, 100.0
    after = loss(y, x, mean, logvar, num_samples=[1000, 2048]).terms

    assert {name: value.item() for name, value in before.items()} == {
        name: value.item() for name, value in after.items()
    }


def test_latent_positions_follow_the_padded_reconstruction():
    # The codec padded 1500 samples to 2048, 4 positions of 512: 1500 own ceil(1500 / 512) = 3 of them.
    y, x = _waves(batch=1)
    mean, logvar = _posterior(batch=1)
    mean[..., 3] = 100.0

    assert (
        AudioVAELoss(AudioVAELossConfig())(y, x[..., :1500], mean, logvar, num_samples=[1500])
        .terms["loss/kl"]
        .item()
        == 6.0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    y, x = _waves(channels=2, dtype=dtype)
    mean, logvar = (tensor.to(dtype) for tensor in _posterior())
    loss = AudioVAELoss(AudioVAELossConfig(mel_weight=1.0), sample_rate_hz=RATE_HZ)
    expected = loss(y.float(), x.float(), mean.float(), logvar.float()).terms
    y.requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(y, x, mean, logvar)
    terms.total.backward()

    assert {value.dtype for value in terms.terms.values()} == {torch.float32}
    assert {name: value.item() for name, value in terms.terms.items()} == {
        name: v.item() for name, v in expected.items()
    }
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_silence_gives_finite_gradients(dtype):
    y = torch.zeros(1, 2, 2048, dtype=dtype, requires_grad=True)
    mean, logvar = _posterior(batch=1)
    loss = AudioVAELoss(AudioVAELossConfig(mel_weight=15.0), sample_rate_hz=RATE_HZ)

    terms = loss(y, torch.zeros(1, 2, 2048, dtype=dtype), mean, logvar)
    terms.total.backward()

    assert terms.terms["loss/spectral"].item() == 0.0
    assert terms.terms["loss/mel"].item() == 0.0
    assert torch.isfinite(y.grad).all()


def test_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.rand(1, 1, 48, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, logvar = (torch.randn(1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    config = AudioVAELossConfig(
        mel_weight=1.0,
        spectral=SpectralConfig(fft_sizes=(16,)),
        mel=MelConfig(fft_sizes=(16,), num_bands=(3,)),
    )
    loss = AudioVAELoss(config, sample_rate_hz=RATE_HZ)

    assert torch.autograd.gradcheck(
        lambda y, m, v: loss(y, x, m, v).total,
        (y.requires_grad_(), mean.requires_grad_(), logvar.requires_grad_()),
    )


def test_mel_worked_number_of_the_docstring():
    x, _ = _waves(samples=8192)

    # Noise of amplitude 0.05 stays above the floor of 1e-5 in every band.
    assert MelLoss(MelConfig(), sample_rate_hz=RATE_HZ)(x, 0.1 * x).item() == pytest.approx(7.0, rel=1e-4)


def test_mel_agrees_with_torchaudio():
    from torchaudio.transforms import MelScale, Spectrogram

    y, x = _waves()
    config = MelConfig(fft_sizes=(1024,), num_bands=(20,))
    spectrogram = Spectrogram(1024, hop_length=256, power=1.0, pad_mode="constant")
    to_mel = MelScale(20, RATE_HZ, n_stft=513, norm="slaney", mel_scale="slaney")
    logs = [to_mel(spectrogram(wave)).clamp(min=1e-5).log10() for wave in (y, x)]

    # Ours adds 1e-8 to the power of every bin.
    assert MelLoss(config, sample_rate_hz=RATE_HZ)(y, x).item() == pytest.approx(
        (logs[0] - logs[1]).abs().mean().item(), rel=1e-4
    )


def test_mel_filters_stay_in_full_precision():
    y, x = _waves()
    loss = MelLoss(MelConfig(), sample_rate_hz=RATE_HZ)
    before = loss(y, x)

    assert torch.equal(loss.half()(y, x), before)
    assert loss.state_dict() == {}


def test_configuration_rules():
    with pytest.raises(ConfigError, match=r"mel_weight: must be 0 without a sample rate, got 1\.0"):
        AudioVAELoss(AudioVAELossConfig(mel_weight=1.0))
    with pytest.raises(
        ConfigError, match="num_bands: must have one number for each of the 1 fft_sizes, got 2"
    ):
        MelConfig(fft_sizes=(512,), num_bands=(3, 4))
    with pytest.raises(ConfigError, match="must exceed 0, got 0 for all"):
        AudioVAELossConfig(waveform_weight=0.0, spectral_weight=0.0)
    assert AudioVAELossConfig().weights() == {
        "waveform_weight": 0.1,
        "spectral_weight": 1.0,
        "kl_weight": 1e-4,
        "mel_weight": 0.0,
    }
