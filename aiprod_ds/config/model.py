"""Where the network of a run comes from, and the low-rank adapters that may stand beside its weights.

Owns the schema; building is `aiprod_ds.models.registry`, adapters are `aiprod_ds.models.lora`. Field names
are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    CodePath,
    FreeMapping,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)


class ModelConfig(StrictModel):
    """Where the network comes from: random weights from `config`, or trained ones from `pretrained`."""

    source: CodePath = Field(min_length=1)
    """A diffusers class name (`AutoencoderKLLTXVideo`), or the import path (`my_package.models:MyVAE`) of a
    class of `torch.nn.Module` or of a function whose return annotation is one; see `trust_code`."""
    config: FreeMapping = Field(default_factory=dict)
    """Keyword arguments of the constructor; the weights are random. No effect beside `pretrained`, so refused
    there."""
    pretrained: str | None = None
    """A local folder or a hub name for the class's `from_pretrained`."""
    subfolder: str | None = None
    """Folder inside `pretrained` that holds this model, e.g. `transformer` or `vae` of a pipeline. null:
    `pretrained` itself."""
    spatial_stride: PositiveInt | None = None
    """Pixels that become one latent; height and width must be multiples of it. null: measured on the model.
    Not for sound."""
    temporal_stride: PositiveInt | None = None
    """Frames that become one latent; the model takes 1 + stride * k frames. Of sound: samples, and multiples
    of it. null: measured on the model."""

    @rule
    def _one_origin(self) -> Iterator[str]:
        if self.pretrained is not None and self.config:
            yield "config: has no effect when pretrained is set, got both. Remove one of the two."
        if self.pretrained is None and self.subfolder is not None:
            yield f"subfolder: has no effect without pretrained, got {self.subfolder!r}. Remove it."


class LoraConfig(StrictModel):
    """Low-rank adapters beside frozen Linear layers: W x + alpha / rank * B A x."""

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat | None = None
    """Strength of the adapters, divided by the rank. null: the rank, so that the factor is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, strict=False)
    """Linear layers that get an adapter: names, ends of names (`attn1.to_q`) or patterns with `*`, `?` and
    `[]` (`attn*.to_?`). Each must match a layer of the model's repeated blocks."""

    @property
    def scale(self) -> float:
        """The factor alpha / rank. Worked number: alpha 16 and rank 32 make 0.5."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoraFileConfig(StrictModel):
    """A trained LoRA. Its forms are in docs/tools.md; reading it is `aiprod_ds.models.lora_files`."""

    path: str = Field(min_length=1)
    """A PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), or one safetensors file with the
    keys of any common writer."""
    alpha: PositiveFloat | Literal["rank"] | None = None
    """What a layer's rank divides to give the adapter's strength; `rank` is each layer's own, so that the
    strength is 1. Required by a file that does not say it, and only by it."""
