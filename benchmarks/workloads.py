"""The models whose training is compared: LTX-Video's transformer, its VAE and Oobleck, full, tiny and narrow.

Called by `training_speed.py` and `host_time.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workload import Choices, Run, Shape, Workload

from aiprod_ds.config.losses import AudioVAELossConfig, VideoVAELossConfig
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.losses import AudioVAELoss, VideoVAELoss
from aiprod_ds.models.audio_vae import AudioVAE
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.tiny import tiny_ltx_vae, tiny_oobleck

_STRIDES = ModelStrides(spatial=32, temporal=8)
_FPS, _SAMPLE_RATE_HZ = 24.0, 44_100


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer(Workload):
    """LTX-Video: a velocity is predicted and compared.

    Attributes:
        text_tokens: Of a prompt; none is masked.
    """

    trainer: str = "diffusion"
    source: str = "LTXVideoTransformer3DModel"
    text_tokens: int = 128

    def own_settings(self, values: dict[str, Any], choices: Choices) -> dict[str, Any]:
        """See `Workload`."""
        vae = {
            "source": "AutoencoderKLLTXVideo",
            "spatial_stride": _STRIDES.spatial,
            "temporal_stride": _STRIDES.temporal,
        }
        evaluation = {**values["evaluation"], "noise_levels": [0.5]}
        adapters: dict[str, Any] = {}
        if choices.lora_rank is not None:
            adapters = {"training_mode": "lora", "lora": {"rank": choices.lora_rank}}
        return {**values, "vae": vae, "evaluation": evaluation, **adapters}

    def clip(self, shape: Shape, seed: int) -> dict[str, Tensor]:
        """See `Workload`."""
        generator = torch.Generator().manual_seed(seed)
        channels, width = self._widths()
        frames, side = self._latents(shape)
        sizes = {
            "latents": (channels, frames, side, side),
            "prompt_embeds": (self.text_tokens, width),
        }
        return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}

    def module(self, device: str, choices: Choices) -> nn.Module:
        """See `Workload`."""
        return self._with_adapters(self.model(device), choices).to(choices.dtype)

    def inputs(self, shape: Shape, device: str, choices: Choices) -> dict[str, Any]:
        """Returns the transformer's arguments, and as `velocity` what it is to answer."""
        generator = torch.Generator().manual_seed(0)
        channels, width = self._widths()
        frames, side = self._latents(shape)
        tokens = shape.batch, frames * side * side, channels
        noisy, velocity = (torch.randn(tokens, generator=generator) for _ in range(2))
        prompt = torch.randn(shape.batch, self.text_tokens, width, generator=generator)
        timestep = 1000.0 * torch.rand(shape.batch, 1, generator=generator)
        return {
            "hidden_states": noisy.to(device, choices.dtype),
            "encoder_hidden_states": prompt.to(device, choices.dtype),
            "timestep": timestep.to(device),
            "encoder_attention_mask": None,
            "num_frames": frames,
            "height": side,
            "width": side,
            "rope_interpolation_scale": (_STRIDES.temporal / _FPS, _STRIDES.spatial, _STRIDES.spatial),
            "return_dict": False,
            "velocity": velocity.to(device),
        }

    def loss(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        """See `Workload`."""
        arguments = {name: value for name, value in inputs.items() if name != "velocity"}
        error: Tensor = run(**arguments)[0].float() - inputs["velocity"]
        return error.square().mean()

    def num_tokens(self, shape: Shape) -> int:
        """See `Workload`."""
        frames, side = self._latents(shape)
        return frames * side * side

    def flops_per_update(self, shape: Shape, choices: Choices) -> float:
        """Returns `Family.flops_per_update`."""
        model = self.model("meta")
        family = LTXVideo.of(model, _STRIDES)
        model = self._with_adapters(model, choices)
        tokens = {"video": self.num_tokens(shape)}
        return family.flops_per_update(model, batch_size=shape.batch, num_tokens=tokens)

    def _with_adapters(self, model: nn.Module, choices: Choices) -> nn.Module:
        if choices.lora_rank is not None:
            from aiprod_ds.models.lora import add_lora  # imports peft, which takes seconds

            config = LoraConfig(rank=choices.lora_rank)
            add_lora(model, config, allowed=LTXVideo.lora_targets, seed=0)
        return model

    def _widths(self) -> tuple[int, int]:
        """Returns the channels of a latent and of a prompt's embedding; the defaults are diffusers'."""
        return self.config.get("in_channels", 128), self.config.get("caption_channels", 4096)

    @staticmethod
    def _latents(shape: Shape) -> tuple[int, int]:
        return _STRIDES.latents(shape.length), shape.size // _STRIDES.spatial


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoAutoencoder(Workload):
    """LTX-Video's VAE: clips are reconstructed, without the perceptual loss, whose network is another model.

    The bare loop takes the posterior's mean, where the trainer draws.
    """

    trainer: str = "video_vae"
    source: str = "AutoencoderKLLTXVideo"

    def own_settings(self, values: dict[str, Any], choices: Choices) -> dict[str, Any]:
        """See `Workload`."""
        _refuse_adapters(self, choices)
        return {**values, "loss": {"perceptual_weight": 0.0}}

    def clip(self, shape: Shape, seed: int) -> Tensor:
        """See `Workload`."""
        size = (3, shape.length, shape.size, shape.size)
        return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def module(self, device: str, choices: Choices) -> nn.Module:
        """See `Workload`."""
        _refuse_adapters(self, choices)
        return VideoVAE(self.model(device)).to(choices.dtype)

    def inputs(self, shape: Shape, device: str, choices: Choices) -> dict[str, Any]:
        """Returns the clips in fp32 and in the type of the weights, and the loss."""
        clips = torch.stack([self.clip(shape, seed) for seed in range(shape.batch)]).to(device)
        loss = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0), None)
        return {"clips": clips, "cast": clips.to(choices.dtype), "loss": loss}

    def loss(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        """See `Workload`."""
        return _reconstruction_loss(run, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioAutoencoder(Workload):
    """Oobleck: waveforms are reconstructed, with all terms of the default loss.

    The bare loop takes the posterior's mean, where the trainer draws.
    """

    trainer: str = "audio_vae"
    source: str = "AutoencoderOobleck"

    def own_settings(self, values: dict[str, Any], choices: Choices) -> dict[str, Any]:
        """See `Workload`."""
        _refuse_adapters(self, choices)
        return values

    def clip(self, shape: Shape, seed: int) -> Tensor:
        """See `Workload`."""
        return torch.rand(2, shape.length, generator=torch.Generator().manual_seed(seed)) - 0.5

    def module(self, device: str, choices: Choices) -> nn.Module:
        """See `Workload`."""
        _refuse_adapters(self, choices)
        return AudioVAE(self.model(device)).to(choices.dtype)

    def inputs(self, shape: Shape, device: str, choices: Choices) -> dict[str, Any]:
        """Returns the clips in fp32 and in the type of the weights, and the loss."""
        clips = torch.stack([self.clip(shape, seed) for seed in range(shape.batch)]).to(device)
        loss = AudioVAELoss(AudioVAELossConfig(), sample_rate_hz=_SAMPLE_RATE_HZ).to(device)
        return {"clips": clips, "cast": clips.to(choices.dtype), "loss": loss}

    def loss(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        """See `Workload`."""
        return _reconstruction_loss(run, inputs)


def _reconstruction_loss(run: Run, inputs: Mapping[str, Any]) -> Tensor:
    reconstruction, mean, logvar = run(inputs["cast"])
    total: Tensor = inputs["loss"](reconstruction, inputs["clips"], mean, logvar).total
    return total


def _refuse_adapters(workload: Workload, choices: Choices) -> None:
    if choices.lora_rank is not None:
        raise SystemExit(f"--lora: has no effect for {workload.source}. Leave it out.")


WORKLOADS: dict[str, Workload] = {
    "ltx": Transformer(
        shapes={
            "low": Shape(length=9, size=256, batch=16),
            "medium": Shape(length=17, size=512, batch=8),
            "high": Shape(length=49, size=1024, batch=4),
        }
    ),
    "video-vae": VideoAutoencoder(
        shapes={
            "low": Shape(length=9, size=256, batch=4),
            "medium": Shape(length=17, size=512, batch=2),
        }
    ),
    "oobleck": AudioAutoencoder(shapes={"low": Shape(length=65_536, size=0, batch=8)}),
}
TINY_WORKLOADS: dict[str, Workload] = {
    "ltx": Transformer(
        config=LTXVideo.tiny_config(),
        shapes={
            "low": Shape(length=9, size=64, batch=4),
            "medium": Shape(length=17, size=64, batch=2),
            "high": Shape(length=17, size=96, batch=2),
        },
    ),
    "video-vae": VideoAutoencoder(
        config=tiny_ltx_vae(width=16, latent_channels=8, patch_size=4, scaling=(True, False, False)),
        shapes={
            "low": Shape(length=9, size=64, batch=2),
            "medium": Shape(length=17, size=64, batch=2),
        },
    ),
    "oobleck": AudioAutoencoder(
        config=tiny_oobleck(width=16, latent_channels=8),
        shapes={"low": Shape(length=4096, size=0, batch=2)},
    ),
}
NARROW = Transformer(
    config={**LTXVideo.tiny_config(), "num_layers": 28},
    shapes={"low": Shape(length=9, size=64, batch=2)},
    text_tokens=8,
)
"""As many parameters and blocks as LTX-Video 2B, so small that computing costs next to nothing."""
