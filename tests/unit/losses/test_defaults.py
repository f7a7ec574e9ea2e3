"""Losses made as their readers would make them: by themselves, with the defaults that they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiprod_ds.config.losses import PerceptualConfig, SpectralConfig, VideoVAELossConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses import AudioVAELoss, PerceptualLoss, SpectralLoss, VideoVAELoss, vgg


@pytest.fixture
def without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(vgg, "WEIGHTS_URL", (tmp_path / "nothing.pth").as_uri())


def test_losses_of_sound_need_nothing() -> None:
    target = torch.sin(torch.arange(4096) * 0.1).view(1, 1, -1)
    posterior = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    assert SpectralLoss()(target, target).item() == 0.0
    assert SpectralLoss().config == SpectralConfig()
    terms = AudioVAELoss()(target * 0.5, target, *posterior)
    assert terms.total.item() > 0
    assert {"loss/waveform_l1", "loss/spectral", "loss/kl"} <= set(terms.terms)


@pytest.mark.usefixtures("without_weights")
def test_without_weights_the_default_says_how_to_get_them_or_to_do_without() -> None:
    for made in (PerceptualLoss, VideoVAELoss):
        with pytest.raises(DataError) as caught:
            made()
        assert "needs VGG16 weights; not configured" in str(caught.value)
        assert "set perceptual.weights to a local copy of vgg16-397923af.pth" in str(caught.value)
        assert 'PerceptualLoss(mode="l2")' in str(caught.value)


@pytest.mark.usefixtures("without_weights")
def test_the_mean_squared_error_in_its_place_needs_no_weights() -> None:
    target = torch.linspace(-1, 1, 3 * 2 * 4 * 4).view(1, 3, 2, 4, 4)
    perceptual = PerceptualLoss(mode="l2")
    assert perceptual.active_mode == "l2"
    assert perceptual(target + 0.5, target).item() == pytest.approx(0.25)
    posterior = torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 2, 1, 2, 2)
    for loss in (
        VideoVAELoss(perceptual=perceptual),
        VideoVAELoss(VideoVAELossConfig(perceptual=PerceptualConfig(mode="l2"))),
    ):
        # mean|0.5| + 1.0 * 0.5^2; the posterior is the unit normal, so its divergence is 0
        assert loss(target + 0.5, target, *posterior).total.item() == pytest.approx(0.75)


@pytest.mark.usefixtures("without_weights")
def test_without_its_weight_the_network_is_not_looked_for() -> None:
    assert VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0)).perceptual is None
    with pytest.raises(ConfigError, match=r"loss\.perceptual_weight: must be 0 without a perceptual network"):
        VideoVAELoss(perceptual=None)


def test_a_mode_beside_a_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode has no effect beside config, got 'l2'"):
        PerceptualLoss(PerceptualConfig(), mode="l2")
    with pytest.raises(ConfigError, match="mode: must be 'lpips', 'vgg' or 'l2', got 'l3'"):
        PerceptualLoss(mode="l3")  # type: ignore[arg-type]
