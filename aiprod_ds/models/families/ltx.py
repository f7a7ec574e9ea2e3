"""LTX-Video: video alone, one token per latent position, time in seconds by the frame rate.

Owns the conventions of `LTXVideoTransformer3DModel`, as diffusers' `LTXPipeline` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.families.facts import PIPELINE_PREFIX, PublishedNames
from aiprod_ds.models.families.flops import single_stream_flops
from aiprod_ds.models.families.inputs import frame_rates, latent_tokens, prompt, same_width_out
from aiprod_ds.models.families.tokens import TokenGrid, Tokens

_TIMESTEP_SCALE = 1000.0  # the scheduler's num_train_timesteps
_PUBLISHED = (
    (r"\bproj_in\b", "patchify_proj"),
    (r"\btime_embed\b", "adaln_single"),
    (r"\bnorm_(q|k)\b", r"\1_norm"),
)
_NAMES = PublishedNames(prefix=PIPELINE_PREFIX, rules=_PUBLISHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LTXVideo:
    """A `Family`.

    The class predicts eps - x0 for a timestep of 1000 * s. Its rotary positions are pixels and, along time,
    latent frames times the VAE's stride over the frame rate, in seconds.

    Source: diffusers 0.42.1, pipelines/ltx/pipeline_ltx.py. Its `LTXConditionPipeline` places latent frames k
    > 0 by (stride - 1) / fps seconds earlier, since the first one is one frame of a causal VAE; that rule is
    not used here.

    Attributes:
        strides: Of the VAE.
        patch: Latent frames, rows and columns per token.
        token_width: Values per token.
        text_width: Of the prompt's embeddings.
    """

    strides: ModelStrides
    patch: tuple[int, int, int]
    token_width: int
    text_width: int

    name: ClassVar[str] = "ltx"
    transformer_class: ClassVar[str] = "LTXVideoTransformer3DModel"
    pipeline_class: ClassVar[str] = "LTXPipeline"
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    sound: ClassVar[None] = None
    has_token_timesteps: ClassVar[bool] = True
    text_tokens: ClassVar[int] = 128
    lora_targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*",)
    published: ClassVar[PublishedNames | None] = _NAMES

    @classmethod
    def of(cls, transformer: nn.Module, strides: ModelStrides) -> LTXVideo:
        """Returns the description of `transformer`.

        Raises:
            ConfigError: If it has other output than input channels.
        """
        config: Any = transformer.config
        same_width_out(cls.name, channels_in=config.in_channels, channels_out=config.out_channels)
        return cls(
            strides=strides,
            patch=(config.patch_size_t, config.patch_size, config.patch_size),
            token_width=config.in_channels,
            text_width=config.caption_channels,
        )

    @staticmethod
    def tiny_config() -> dict[str, Any]:
        """Returns constructor arguments for tests on a CPU."""
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": 16,
        }

    def tokens(self, tensors: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Cuts `latents` into tokens."""
        return {
            "video": latent_tokens(
                tensors,
                "video",
                patch=self.patch,
                token_width=self.token_width,
                family=self.name,
            )
        }

    def forward(
        self,
        transformer: nn.Module,
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, TokenGrid],
    ) -> dict[str, Tensor]:
        """Returns the predicted velocity; arguments as `Family.forward` says."""
        frames, height, width = grids["video"].sizes
        embeds = prompt(tensors, "prompt_embeds", width=self.text_width, family=self.name)
        seconds_per_frame = self.strides.temporal / frame_rates(tensors, num_axes=5, family=self.name)
        (velocity,) = transformer(
            hidden_states=noisy["video"],
            encoder_hidden_states=embeds.to(noisy["video"].dtype),
            timestep=timesteps["video"] * _TIMESTEP_SCALE,
            encoder_attention_mask=tensors.get("prompt_attention_mask"),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds_per_frame, self.strides.spatial, self.strides.spatial),
            return_dict=False,
        )
        return {"video": velocity}

    def repeated_blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer blocks."""
        return list(cast("nn.ModuleList", transformer.transformer_blocks))

    def flops_per_update(
        self, transformer: nn.Module, *, batch_size: int, num_tokens: Mapping[str, int]
    ) -> float:
        """Returns 6*N*B*S + 12*L*B*S^2*D; arguments as `Family.flops_per_update` says."""
        return single_stream_flops(transformer, batch_size=batch_size, num_tokens=num_tokens["video"])

    def original_name(self, module_name: str) -> str:
        """Returns the publication's name of a module, out of the table of its single file."""
        return _NAMES.layer_of(module_name)
