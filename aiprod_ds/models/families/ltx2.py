"""LTX-2: video and sound together, each with its own noise level, both placed in seconds.

Owns the conventions of `LTX2VideoTransformer3DModel`, as diffusers' `LTX2Pipeline` uses it. The text
connectors between a text encoder and the transformer are not part of it: `prompt_embeds` and
`audio_prompt_embeds` are what comes out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.families.facts import PIPELINE_PREFIX, PublishedNames, SoundFacts
from aiprod_ds.models.families.flops import attention_flops, linear_flops
from aiprod_ds.models.families.inputs import frame_rates, latent_tokens, prompt, require, same_width_out
from aiprod_ds.models.families.tokens import TokenGrid, Tokens

_RATE_KEYS = "audio_sampling_rate / audio_hop_length / audio_scale_factor"
_PUBLISHED = (
    (r"\bav_cross_attn_(video|audio)_scale_shift\b", r"av_ca_\1_scale_shift_adaln_single"),
    (r"\bav_cross_attn_(?:video|audio)_(a2v|v2a)_gate\b", r"av_ca_\1_gate_adaln_single"),
    (r"\b(video|audio)_a2v_cross_attn_scale_shift_table\b", r"scale_shift_table_a2v_ca_\1"),
    (r"\b(audio_)?proj_in\b", r"\1patchify_proj"),
    (r"\b(audio_)?time_embed\b", r"\1adaln_single"),
    (r"\b(audio_)?prompt_adaln\b", r"\1prompt_adaln_single"),  # of 2.3
    (r"\bnorm_(q|k)\b", r"\1_norm"),
)
_NAMES = PublishedNames(prefix=PIPELINE_PREFIX, rules=_PUBLISHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LTX2:
    """A `Family`.

    The class predicts eps - x0 of both modalities for timesteps of `timestep_scale` * s. A token of sound is
    one latent moment with all its bands: of LTX-2's own audio VAE [B,8,T,16], or of a waveform VAE such as
    Oobleck [B,C,T]. For the latter the transformer's configuration must say how long a latent lasts:
    `audio_hop_length` its samples, `audio_sampling_rate`, `audio_scale_factor` 1.

    What one modality is told about the other (`sigma`) is its sample's level, the highest of its tokens.
    Source: diffusers 0.42.1, pipelines/ltx2/pipeline_ltx2.py, whose default `use_cross_timestep=True` is used
    for all versions of the model.

    Attributes:
        patch: Latent frames, rows and columns per token of video.
        token_width: Values per token of video.
        text_width: Of the prompt's embeddings for video.
        timestep_scale: What the class calls `timestep_scale_multiplier`.
        sound: Where its `text_width` equals that of video, `prompt_embeds` serves both when there is no
            `audio_prompt_embeds`.
    """

    patch: tuple[int, int, int]
    token_width: int
    text_width: int
    timestep_scale: float
    sound: SoundFacts

    name: ClassVar[str] = "ltx2"
    transformer_class: ClassVar[str] = "LTX2VideoTransformer3DModel"
    pipeline_class: ClassVar[str] = "LTX2Pipeline"
    modalities: ClassVar[tuple[str, ...]] = ("video", "audio")
    has_token_timesteps: ClassVar[bool] = True
    text_tokens: ClassVar[int] = 1024
    lora_targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*",)
    published: ClassVar[PublishedNames | None] = _NAMES

    @classmethod
    def of(cls, transformer: nn.Module, strides: ModelStrides) -> LTX2:
        """Returns the description of `transformer`.

        Raises:
            ConfigError: If it has other output than input channels, or positions for a VAE of other strides.
        """
        config: Any = transformer.config
        same_width_out(cls.name, channels_in=config.in_channels, channels_out=config.out_channels)
        same_width_out(cls.name, channels_in=config.audio_in_channels, channels_out=config.audio_out_channels)
        wanted = [strides.temporal, strides.spatial, strides.spatial]
        if list(config.vae_scale_factors) != wanted:
            raise ConfigError(
                "model.config.vae_scale_factors: must be the strides of the VAE in time, height and width "
                f"({wanted}), got "
                f"{list(config.vae_scale_factors)}. Positions in seconds and pixels depend on them."
            )
        has_projection = config.use_prompt_embeddings
        sound = SoundFacts(
            token_width=config.audio_in_channels,
            text_width=config.caption_channels if has_projection else config.audio_cross_attention_dim,
            latents_per_second=config.audio_sampling_rate
            / config.audio_hop_length
            / config.audio_scale_factor,
            rate_keys=_RATE_KEYS,
        )
        return cls(
            patch=(config.patch_size_t, config.patch_size, config.patch_size),
            token_width=config.in_channels,
            text_width=config.caption_channels if has_projection else config.cross_attention_dim,
            timestep_scale=float(config.timestep_scale_multiplier),
            sound=sound,
        )

    @staticmethod
    def tiny_config() -> dict[str, Any]:
        """Returns constructor arguments for tests on a CPU; sound as [B,2,T,4]."""
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        }

    def tokens(self, tensors: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Cuts `latents` and `audio_latents` into tokens."""
        bands = tuple(require(tensors, "audio_latents", family=self.name).shape[3:])
        return {
            "video": latent_tokens(
                tensors, "video", patch=self.patch, token_width=self.token_width, family=self.name
            ),
            "audio": latent_tokens(
                tensors, "audio", patch=(1, *bands), token_width=self.sound.token_width, family=self.name
            ),
        }

    def forward(
        self,
        transformer: nn.Module,
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, TokenGrid],
    ) -> dict[str, Tensor]:
        """Returns the predicted velocities; arguments as `Family.forward` says."""
        dtype = noisy["video"].dtype
        _, frames, height, width = grids["video"].latent_shape
        rates = frame_rates(tensors, num_axes=3, family=self.name)
        audio_text = "audio_prompt_embeds" if "audio_prompt_embeds" in tensors else "prompt_embeds"
        text_BSD = prompt(tensors, "prompt_embeds", width=self.text_width, family=self.name)
        audio_text_BSD = prompt(tensors, audio_text, width=self.sound.text_width, family=self.name)
        mask_BS = tensors.get("prompt_attention_mask")
        scaled = {modality: levels * self.timestep_scale for modality, levels in timesteps.items()}
        video, audio = transformer(
            hidden_states=noisy["video"],
            audio_hidden_states=noisy["audio"],
            encoder_hidden_states=text_BSD.to(dtype),
            audio_encoder_hidden_states=audio_text_BSD.to(dtype),
            timestep=scaled["video"],
            audio_timestep=scaled["audio"],
            sigma=scaled["video"].amax(dim=1),
            audio_sigma=scaled["audio"].amax(dim=1),
            encoder_attention_mask=mask_BS,
            audio_encoder_attention_mask=mask_BS,
            num_frames=frames,
            height=height,
            width=width,
            video_coords=video_bounds(cast("Any", transformer).rope, (frames, height, width), rates),
            audio_num_frames=grids["audio"].sizes[0],
            use_cross_timestep=True,
            return_dict=False,
        )
        return {"video": video, "audio": audio}

    def repeated_blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer blocks."""
        return list(cast("nn.ModuleList", transformer.transformer_blocks))

    def flops_per_update(
        self, transformer: nn.Module, *, batch_size: int, num_tokens: Mapping[str, int]
    ) -> float:
        """Returns both streams' 6*N*B*S + 12*L*B*S^2*D, and 12*L*B*S*S'*D' for each of the two attentions
        between them.

        Arguments as `Family.flops_per_update` says. D' is the width of sound.
        """
        config: Any = transformer.config
        width = {
            "video": config.num_attention_heads * config.attention_head_dim,
            "audio": config.audio_num_attention_heads * config.audio_attention_head_dim,
        }
        pairs = [(query, key) for query in self.modalities for key in self.modalities]
        attention = sum(
            attention_flops(
                num_blocks=config.num_layers,
                batch_size=batch_size,
                num_queries=num_tokens[query],
                num_keys=num_tokens[key],
                width=width["video"] if query == key == "video" else width["audio"],
            )
            for query, key in pairs
        )
        return attention + sum(
            linear_flops(
                _parameters(transformer, modality), batch_size=batch_size, num_tokens=num_tokens[modality]
            )
            for modality in self.modalities
        )

    def original_name(self, module_name: str) -> str:
        """Returns the publication's name of a module, out of the table of its single file."""
        return _NAMES.layer_of(module_name)


def video_bounds(rope: Any, sizes: Sequence[int], rates_B11: Tensor) -> Tensor:
    """Returns where each token of video begins and ends, fp32 [B, 3, tokens, 2], in seconds and pixels.

    What `rope.prepare_video_coords` returns, bit for bit (diffusers 0.42.1, models/transformers/
    transformer_ltx2.py:873). That one copies constants from the host, for which every forward pass waits and
    which a CUDA graph cannot hold.

    Args:
        rope: The transformer's.
        sizes: Latent frames, rows and columns.
        rates_B11: Frames per second, on the device.
    """
    steps = (rope.patch_size_t, rope.patch_size, rope.patch_size)
    bounds = []
    for size, step, scale in zip(sizes, steps, rope.scale_factors, strict=True):
        begins = torch.arange(0, size, step, dtype=torch.float32, device=rates_B11.device)
        bounds.append(torch.stack([begins, begins + step], dim=-1) * scale)
    # The first latent is one frame, those after it `scale` frames.
    times = (bounds[0] + rope.causal_offset - rope.scale_factors[0]).clamp(min=0)
    shape = [len(axis) for axis in bounds]
    time_N2, *space_N2 = (
        axis.view([-1 if place == own else 1 for place in range(3)] + [2]).expand([*shape, 2]).flatten(0, 2)
        for own, axis in enumerate([times, *bounds[1:]])
    )
    batch_size = len(rates_B11)
    return torch.stack(
        [time_N2 / rates_B11, *(axis.expand(batch_size, -1, -1) for axis in space_N2)],
        dim=1,
    )


def _parameters(transformer: nn.Module, modality: str) -> Iterator[nn.Parameter]:
    """Yields the parameters that run over the tokens of `modality`."""
    for name, parameter in transformer.named_parameters():
        if _modality(name) == modality:
            yield parameter


def _modality(name: str) -> str:
    # Between the modalities, queries and outputs belong to the first one named "to", keys and values to the
    # other.
    is_key_or_value = ".to_k." in name or ".to_v." in name or ".norm_k." in name
    if ".audio_to_video_attn." in name:
        return "audio" if is_key_or_value else "video"
    if ".video_to_audio_attn." in name:
        return "video" if is_key_or_value else "audio"
    return "audio" if "audio_" in name else "video"
