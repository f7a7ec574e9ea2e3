"""Whole clips through classes of diffusers that take tiles or pictures: the numbers of their own code."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.posterior import split_posterior
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.video_vae import VideoVAE, video_strides
from aiprod_ds.testing.tiny import tiny_allegro, tiny_cosmos

PICTURES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"norm_num_groups": 4, "block_out_channels": (8,)},
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "upsampling_scaling_factor": 2,
    },
}


def _clip(frames: int, size: int = 16, clips: int = 2) -> Tensor:
    return torch.rand(clips, 3, frames, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _strides(vae: nn.Module) -> ModelStrides:
    return video_strides(vae, ModelConfig(source="unused"))


def _built(source: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, source)(**settings).eval()


def test_a_clip_of_allegro_is_its_one_tile() -> None:
    """Bit for bit: its own code puts the one tile into zeros and runs the same layers."""
    whole = _built("AutoencoderKLAllegro", tiny_allegro())
    tiled = copy.deepcopy(whole)
    tiled.use_tiling, tiled.kernel = True, (8, 16, 16)
    VideoVAE(whole)
    clip_BCTHW = _clip(8, clips=1)
    with torch.no_grad():
        mean = tiled.encode(clip_BCTHW).latent_dist.mean
        assert torch.equal(whole.encode(clip_BCTHW).latent_dist.mean, mean)
        # its own decode gives frames before channels
        assert torch.equal(whole.decode(mean).sample, tiled.decode(mean).sample.transpose(1, 2))


def test_allegro_takes_batches_and_groups_of_frames() -> None:
    vae = _built("AutoencoderKLAllegro", tiny_allegro())
    assert _strides(vae) == ModelStrides(spatial=2, temporal=2, is_causal=False)
    assert _strides(vae).rule == "2 * k frames"
    output_BCTHW, mean, logvar = VideoVAE(vae)(_clip(6))
    assert output_BCTHW.shape == (2, 3, 6, 16, 16)
    assert mean.shape == (2, 4, 3, 8, 8)
    assert logvar is not None


def test_tiles_that_were_asked_for_stay() -> None:
    vae = _built("AutoencoderKLAllegro", tiny_allegro())
    vae.use_tiling = True
    VideoVAE(vae)
    assert "_encode" not in vars(vae)


def test_cosmos_has_no_posterior() -> None:
    vae = _built("AutoencoderKLCosmos", tiny_cosmos())
    assert _strides(vae) == ModelStrides(spatial=2, temporal=2)
    output_BCTHW, mean, logvar = VideoVAE(vae)(_clip(5), [1, 2])
    assert output_BCTHW.shape == (2, 3, 5, 16, 16)
    assert mean.shape == (2, 4, 3, 8, 8)
    assert logvar is None


@pytest.mark.parametrize("source", sorted(PICTURES))
def test_a_model_of_pictures_gets_every_frame(source: str) -> None:
    vae = _built(source, PICTURES[source])
    assert _strides(vae).temporal == 1
    clip_BCTHW = _clip(3)
    with torch.no_grad():
        expected, _ = split_posterior(vae.encode(clip_BCTHW[:, :, 1]))
        decoded = vae.decode(expected).sample
        output_BCTHW, mean, logvar = VideoVAE(vae)(clip_BCTHW)
    # Batches of other sizes may be summed in another order.
    torch.testing.assert_close(mean[:, :, 1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output_BCTHW[:, :, 1], decoded, rtol=1e-5, atol=1e-5)
    assert (logvar is None) == (source != "AutoencoderKL")


def test_a_copy_calls_itself() -> None:
    vae = _built("AutoencoderDC", PICTURES["AutoencoderDC"])
    module = VideoVAE(vae)
    blank = on_meta(module)
    assert blank(_clip(3).to("meta"))[1].is_meta


def test_models_of_clips_stay_as_they_are() -> None:
    vae = _built("AutoencoderKLCosmos", tiny_cosmos())
    VideoVAE(vae)
    assert not {"encode", "decode", "_encode", "_decode"} & set(vars(vae))
