"""Each VAE loss against its formula: terms of positive weight, taken by hand and added from left to right."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from aiprod_ds.config.losses import AudioVAELossConfig, VideoVAELossConfig
from aiprod_ds.losses import AudioVAELoss, SpectralLoss, VideoVAELoss
from aiprod_ds.losses.haar import haar_l1
from aiprod_ds.losses.kl import gaussian_kl
from aiprod_ds.losses.mel import MelLoss
from aiprod_ds.losses.mel_vae import MelVAELoss

RATE_HZ = 16000


class _PixelLoss(torch.nn.Module):
    """Stands where the perceptual network does, without weights to download."""

    def forward(self, y, x, *, frame_seeds=None):
        assert frame_seeds == [3]
        return (y - x).square().mean()


def _leaves(data_shape, latent_shape):
    """Reconstruction, target, mean and logvar."""
    generator = torch.Generator().manual_seed(0)
    shapes = (data_shape, data_shape, latent_shape, latent_shape)
    y, *others = (torch.randn(shape, generator=generator) / 4 for shape in shapes)
    return [tensor.requires_grad_(tensor is not others[0]) for tensor in (y, *others)]


def _video(weights):
    y, x, mean, logvar = leaves = _leaves((1, 3, 4, 8, 8), (1, 2, 1, 2, 2))
    config = VideoVAELossConfig(
        perceptual_weight=weights[0], kl_weight=weights[1], haar_weight=weights[2], kl_reduction="mean"
    )
    by_hand = {
        "loss/reconstruction_l1": (1.0, lambda: (y - x).abs().mean()),
        "loss/perceptual": (weights[0], lambda: (y - x).square().mean()),
        "loss/kl": (weights[1], lambda: gaussian_kl(mean, logvar, reduction="mean")),
        "loss/haar": (weights[2], lambda: haar_l1(y, x)),
    }
    return leaves, lambda: VideoVAELoss(config, _PixelLoss())(*leaves, frame_seeds=[3]), by_hand


def _audio(weights):
    y, x, mean, logvar = leaves = _leaves((2, 1, 1024), (2, 3, 4))
    lengths = torch.tensor([1024, 1024])
    config = AudioVAELossConfig(
        waveform_weight=weights[0], spectral_weight=1.0, kl_weight=weights[1], mel_weight=weights[2]
    )
    by_hand = {
        "loss/waveform_l1": (weights[0], lambda: torch.mean((y - x).abs().sum(dim=(1, 2)) / lengths)),
        "loss/spectral": (1.0, lambda: SpectralLoss(config.spectral)(y, x)),
        "loss/kl": (weights[1], lambda: gaussian_kl(mean, logvar, reduction="per_position")),
        "loss/mel": (weights[2], lambda: MelLoss(config.mel, sample_rate_hz=RATE_HZ)(y, x)),
    }
    return leaves, lambda: AudioVAELoss(config, sample_rate_hz=RATE_HZ)(*leaves), by_hand


def _mel(weights):
    y, x, mean, logvar = leaves = _leaves((2, 1, 6, 4), (2, 3, 2, 2))
    by_hand = {
        "loss/mel": (1.5, lambda: (y - x).abs().mean()),
        "loss/kl": (weights[1], lambda: gaussian_kl(mean, logvar, reduction="per_position")),
    }
    return leaves, lambda: MelVAELoss(mel_weight=1.5, kl_weight=weights[1])(*leaves), by_hand


LOSSES = {"video": _video, "audio": _audio, "mel": _mel}
WEIGHTS = [(0.3, 0.7, 0.9), (0.0, 0.7, 0.9), (0.3, 0.0, 0.9), (0.3, 0.7, 0.0), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(name, weights):
    leaves, loss, by_hand = LOSSES[name](weights)
    values = {term: (weight, value()) for term, (weight, value) in by_hand.items()}
    total = sum((weight * value for weight, value in values.values() if weight > 0), torch.zeros(()))
    expected = torch.autograd.grad(total, _trained(leaves), allow_unused=True)

    terms = loss()
    found = torch.autograd.grad(terms.total, _trained(leaves), allow_unused=True)

    # Bit for bit: the same operations in the same order; 0 + x is x.
    assert torch.equal(terms.total, total)
    assert list(terms.terms)[: len(values) + 1] == ["loss/total", *values]
    assert all(torch.equal(terms.terms[term], value) for term, (_, value) in values.items())
    for gradient, by_formula in zip(found, expected, strict=True):
        assert (gradient is None and by_formula is None) or torch.equal(gradient, by_formula)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_only_terms_of_positive_weight_keep_tensors_for_the_backward_pass(name, weights):
    _, loss, by_hand = LOSSES[name](weights)

    kept = _num_kept(loss)

    assert kept == _num_kept(lambda: [value() for weight, value in by_hand.values() if weight > 0])


def _trained(leaves):
    return [leaf for leaf in leaves if leaf.requires_grad]


def _num_kept(compute):
    kept = []
    with saved_tensors_hooks(kept.append, lambda _: None):
        compute()
    return len(kept)
