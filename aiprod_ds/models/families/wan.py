"""Wan 2.1 and 2.2, text to video: the transformer cuts its own patches, positions are counted and not
measured.

Owns the conventions of `WanTransformer3DModel`, as diffusers' `WanPipeline` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.families.facts import PublishedNames
from aiprod_ds.models.families.flops import single_stream_flops
from aiprod_ds.models.families.inputs import latent_tokens, prompt, same_width_out
from aiprod_ds.models.families.tokens import TokenGrid, Tokens, latents_of, tokens_of

_TIMESTEP_SCALE = 1000.0  # the scheduler's num_train_timesteps
_TEXT_TOKENS = 512  # `max_sequence_length` of WanPipeline.__call__
_PUBLISHED = (
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.add_(k|v)_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm(2|3)\.", lambda match: f".norm{5 - int(match[1])}."),
)
_NAMES = PublishedNames(prefix="", rules=_PUBLISHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan:
    """A `Family`.

    The class predicts eps - x0 for a timestep of 1000 * s, one per sample or (as Wan 2.2 TI2V is used) one
    per token. It has no mask for the text: the pipeline gives it 512 tokens whose padding is 0, so the same
    is done here. The frame rate has no effect.

    Source: diffusers 0.42.1, pipelines/wan/pipeline_wan.py.

    Attributes:
        patch: Latent frames, rows and columns per token.
        token_width: Values per token.
        text_width: Of the prompt's embeddings.
    """

    patch: tuple[int, int, int]
    token_width: int
    text_width: int

    name: ClassVar[str] = "wan"
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    pipeline_class: ClassVar[str] = "WanPipeline"
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    sound: ClassVar[None] = None
    has_token_timesteps: ClassVar[bool] = True
    text_tokens: ClassVar[int] = 512
    lora_targets: ClassVar[tuple[str, ...]] = ("blocks.*",)
    published: ClassVar[PublishedNames | None] = _NAMES

    @classmethod
    def of(cls, transformer: nn.Module, strides: ModelStrides) -> Wan:  # noqa: ARG003  # positions are counted, not measured
        """Returns the description of `transformer`.

        Raises:
            ConfigError: If it is an image-to-video variant.
        """
        config: Any = transformer.config
        same_width_out(cls.name, channels_in=config.in_channels, channels_out=config.out_channels)
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise ConfigError(
                f"model: the family {cls.name!r} trains text-to-video transformers, got one with an image "
                "encoder's inputs "
                f"(image_dim {config.image_dim}, added_kv_proj_dim {config.added_kv_proj_dim}). Use a "
                "text-to-video variant."
            )
        frames, height, width = config.patch_size
        token_width = config.in_channels * frames * height * width
        return cls(patch=(frames, height, width), token_width=token_width, text_width=config.text_dim)

    @staticmethod
    def tiny_config() -> dict[str, Any]:
        """Returns constructor arguments for tests on a CPU."""
        return {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        }

    def tokens(self, tensors: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Cuts `latents` into tokens."""
        return {
            "video": latent_tokens(
                tensors, "video", patch=self.patch, token_width=self.token_width, family=self.name
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
        video_BLD, levels = noisy["video"], timesteps["video"]
        (velocity,) = transformer(
            hidden_states=latents_of(video_BLD, grids["video"]),
            timestep=(levels.squeeze(1) if levels.shape[1] == 1 else levels) * _TIMESTEP_SCALE,
            encoder_hidden_states=self._text(tensors).to(video_BLD.dtype),
            return_dict=False,
        )
        return {"video": tokens_of(velocity, self.patch).values}

    def repeated_blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer blocks."""
        return list(cast("nn.ModuleList", transformer.blocks))

    def flops_per_update(
        self, transformer: nn.Module, *, batch_size: int, num_tokens: Mapping[str, int]
    ) -> float:
        """Returns 6*N*B*S + 12*L*B*S^2*D; arguments as `Family.flops_per_update` says."""
        return single_stream_flops(transformer, batch_size=batch_size, num_tokens=num_tokens["video"])

    def original_name(self, module_name: str) -> str:
        """Returns the publication's name of a module, out of the table of its single file."""
        return _NAMES.layer_of(module_name)

    def _text(self, tensors: Mapping[str, Tensor]) -> Tensor:
        embeds_BSD = prompt(tensors, "prompt_embeds", width=self.text_width, family=self.name)
        mask_BS = tensors.get("prompt_attention_mask")
        if mask_BS is not None:
            embeds_BSD = embeds_BSD.masked_fill(~mask_BS.bool().unsqueeze(2), 0.0)
        return F.pad(embeds_BSD, (0, 0, 0, max(_TEXT_TOKENS - embeds_BSD.shape[1], 0)))
