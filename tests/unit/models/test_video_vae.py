"""Strides found without memory, and a posterior whose noise belongs to the clip and not to its batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.posterior import LOGVAR_RANGE, split_posterior
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import VideoVAE, video_strides
from aiprod_ds.testing.tiny import tiny_ltx_vae

UNKNOWN = ModelConfig(source="unused")


class PairVAE(nn.Module):
    """Causal in time (first frame alone, then pairs) with stride 2 in time and 4 in space; encode returns
    (mean, logvar)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(3, 8, kernel_size=(3, 4, 4), stride=(2, 4, 4))
        self.up = nn.ConvTranspose3d(4, 3, kernel_size=(2, 4, 4), stride=(2, 4, 4))

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.down(F.pad(video_BCTHW, (0, 0, 0, 0, 2, 0))).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> SimpleNamespace:
        decoded: Tensor = self.up(latent)
        return SimpleNamespace(sample=decoded[:, :, 1:])


class Declaring(nn.Module):
    """Cannot be measured on the meta device, because it reads a value; says its strides itself, rightly or
    not."""

    def __init__(self, **declared: int) -> None:
        super().__init__()
        self.config = declared

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        return video_BCTHW if video_BCTHW.sum().item() > 0 else -video_BCTHW

    def decode(self, latent: Tensor) -> Tensor:
        return latent


class Identity(Declaring):
    """A deterministic autoencoder of stride 1."""

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        return video_BCTHW


@pytest.fixture
def wrapped() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(PairVAE())


@pytest.fixture
def video_BCTHW() -> Tensor:  # noqa: N802  # the suffix states the shape
    return torch.rand(4, 3, 5, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_tiny_ltx_vae_divides_space_by_8_and_time_by_4() -> None:
    # 8 = patch 2 x two halvings; 4 = two halvings
    vae = build_model(
        ModelConfig(source="AutoencoderKLLTXVideo", config=tiny_ltx_vae()), seed=0, device="meta"
    )
    assert video_strides(vae, UNKNOWN) == ModelStrides(spatial=8, temporal=4)


def test_a_custom_module_is_measured_and_left_as_it_was() -> None:
    vae = PairVAE().train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    assert video_strides(vae, UNKNOWN) == ModelStrides(spatial=4, temporal=2)
    assert vae.training
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_the_configuration_has_the_last_word() -> None:
    both = ModelConfig(source="unused", spatial_stride=16, temporal_stride=8)
    assert video_strides(PairVAE(), both) == ModelStrides(spatial=16, temporal=8)
    one = ModelConfig(source="unused", spatial_stride=16)
    assert video_strides(PairVAE(), one) == ModelStrides(spatial=16, temporal=2)


def test_what_cannot_be_measured_is_taken_as_declared() -> None:
    vae = Declaring(spatial_compression_ratio=32, scale_factor_temporal=8)
    assert video_strides(vae, UNKNOWN) == ModelStrides(spatial=32, temporal=8)


def test_what_can_be_measured_is_not_taken_as_declared() -> None:
    vae = Identity(spatial_compression_ratio=32, temporal_compression_ratio=8)
    assert video_strides(vae, UNKNOWN) == ModelStrides(spatial=1, temporal=1)


def test_strides_that_nobody_knows_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"Set model\.spatial_stride and model\.temporal_stride"):
        video_strides(Declaring(), UNKNOWN)


def test_noise_belongs_to_the_clip_and_not_to_its_batch(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    seeds = [11, 12, 13, 14]
    together = wrapped(video_BCTHW, seeds)[0]
    alone = torch.cat([wrapped(video_BCTHW[[i]], [seeds[i]])[0] for i in range(4)])
    order = [2, 0, 3, 1]
    shuffled = wrapped(video_BCTHW[order], [seeds[i] for i in order])[0]
    # A convolution may add in another order for another batch: a few ulp of numbers around 1; noise itself
    # moves them by 0.1.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(together[order], shuffled, rtol=0, atol=1e-6)
    assert (together - wrapped(video_BCTHW, [1, 2, 3, 4])[0]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-2


def test_the_draw_is_mean_plus_deviation_times_seeded_noise(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    reconstruction, mean, logvar = wrapped(video_BCTHW, [5, 5, 6, 7])
    noise = [
        torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6, 7)
    ]
    latent = mean + torch.exp(logvar / 2) * torch.stack(noise)
    torch.testing.assert_close(reconstruction, wrapped.vae.decode(latent).sample)


def test_drawing_leaves_the_global_random_state_alone(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    before = torch.get_rng_state()
    wrapped(video_BCTHW, [1, 2, 3, 4])
    assert torch.equal(before, torch.get_rng_state())


def test_without_seeds_the_mode_is_decoded(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    reconstruction, mean, _ = wrapped(video_BCTHW)
    assert torch.equal(reconstruction, wrapped.vae.decode(mean).sample)


def test_logvar_is_clamped_before_it_overflows(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    with torch.no_grad():
        wrapped.vae.down.bias[4:] = torch.tensor([1e4, -1e4, 0.0, 0.0])
    reconstruction, _, logvar = wrapped(video_BCTHW, [1, 2, 3, 4])
    assert (logvar.amin(), logvar.amax()) == LOGVAR_RANGE
    assert reconstruction.isfinite().all()


def test_a_deterministic_autoencoder_has_no_logvar(video_BCTHW: Tensor) -> None:
    reconstruction, mean, logvar = VideoVAE(Identity())(video_BCTHW, [1, 2, 3, 4])
    assert logvar is None
    assert torch.equal(reconstruction, video_BCTHW)
    assert torch.equal(mean, video_BCTHW)


def test_as_many_seeds_as_clips_are_needed(wrapped: VideoVAE, video_BCTHW: Tensor) -> None:
    with pytest.raises(EngineError, match=r"one seed per sample \(4\), got 3"):
        wrapped(video_BCTHW, [1, 2, 3])


def test_a_reconstruction_of_another_shape_is_refused(wrapped: VideoVAE) -> None:
    with pytest.raises(EngineError, match=r"input's shape \(1, 3, 4, 8, 8\), got \(1, 3, 3, 8, 8\)"):
        wrapped(torch.zeros(1, 3, 4, 8, 8), [1])


def test_a_model_without_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="must offer encode and decode, got Linear without encode"):
        VideoVAE(nn.Linear(1, 1))


@pytest.mark.parametrize("encoded", ["text", (torch.zeros(1),) * 3, SimpleNamespace(sample=torch.zeros(1))])
def test_an_encoding_of_another_kind_is_refused(encoded: Any) -> None:
    with pytest.raises(ConfigError, match=r"encode must return latent_dist, \(mean, logvar\) or a tensor"):
        split_posterior(encoded)
