"""The losses of both VAEs with moving weights, free bits, and without a posterior."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiprod_ds.config.losses import AudioVAELossConfig, SpectralConfig, VideoVAELossConfig
from aiprod_ds.losses import AudioVAELoss, LossTerms, VideoVAELoss
from aiprod_ds.losses.mel_vae import MelVAELoss

MEAN, LOGVAR = torch.full((2, 3, 4), 0.1), torch.zeros(2, 3, 4)  # 0.005 nats in every element
FREE = 0.25


def _video(*, free_bits: float = 0.0, logvar: Any = LOGVAR, weights: Any = None) -> LossTerms:
    config = VideoVAELossConfig(
        perceptual_weight=0.0, kl_weight=2.0, kl_reduction="mean", kl_free_bits=free_bits
    )
    clip_BCTHW = torch.zeros(2, 3, 2, 4, 4)
    terms: LossTerms = VideoVAELoss(config, None)(clip_BCTHW + 0.5, clip_BCTHW, MEAN, logvar, weights=weights)
    return terms


def _audio(*, free_bits: float = 0.0, logvar: Any = LOGVAR, weights: Any = None) -> LossTerms:
    config = AudioVAELossConfig(
        waveform_weight=1.0,
        spectral_weight=0.0,
        kl_weight=2.0 / 3,
        kl_free_bits=free_bits,
        spectral=SpectralConfig(fft_sizes=(64,)),
    )
    wave_BCN = torch.zeros(2, 1, 128)
    terms: LossTerms = AudioVAELoss(config)(
        wave_BCN + 0.5, wave_BCN, MEAN, logvar, weights=weights, num_samples=None
    )
    return terms


def _mel(*, free_bits: float = 0.0, logvar: Any = LOGVAR, weights: Any = None) -> LossTerms:
    kl_weight = (weights or {"kl_weight": 2.0 / 3})["kl_weight"]
    loss = MelVAELoss(mel_weight=1.0, kl_weight=kl_weight, kl_free_bits=free_bits)
    mel_BCTM = torch.zeros(2, 1, 4, 8)
    terms: LossTerms = loss(mel_BCTM + 0.5, mel_BCTM, MEAN, logvar)
    return terms


EACH = pytest.mark.parametrize("loss", [_video, _audio, _mel])


@EACH
def test_without_a_posterior_the_reconstruction_alone_is_trained(loss: Any) -> None:
    terms = loss(logvar=None)
    assert float(terms.total) == 0.5
    assert {name for name in terms.terms if name.startswith("latent/")} == {"latent/mean", "latent/std"}
    assert "loss/kl" not in terms.terms


@EACH
def test_free_bits_are_trained_and_the_divergence_is_told(loss: Any) -> None:
    plain, floored = loss(), loss(free_bits=FREE)
    assert float(floored.terms["loss/kl"]) == float(plain.terms["loss/kl"])
    assert "loss/kl_free_bits" not in plain.terms
    # 2.0 times the mean over elements, in each of the three by its own reduction and weight
    assert float(plain.total) == pytest.approx(0.5 + 2.0 * 0.005, rel=1e-5)
    assert float(floored.total) == pytest.approx(0.5 + 2.0 * FREE, rel=1e-6)


@EACH
def test_a_weight_that_moves_takes_the_place_of_the_configured_one(loss: Any) -> None:
    assert float(loss(weights={"kl_weight": 0.0}).total) == 0.5
    scale = 1.0 if loss is _video else 1 / 3
    assert float(loss(weights={"kl_weight": 20.0 * scale}).total) == pytest.approx(0.6, rel=1e-5)


def test_padded_sounds_have_no_divergence_without_a_posterior_either() -> None:
    config = AudioVAELossConfig(spectral=SpectralConfig(fft_sizes=(64,)))
    wave_BCN = torch.zeros(2, 1, 128)
    terms = AudioVAELoss(config)(wave_BCN, wave_BCN, MEAN, None, num_samples=[128, 64])
    assert "loss/kl" not in terms.terms
    assert float(terms.terms["latent/mean"]) == pytest.approx(0.1)
