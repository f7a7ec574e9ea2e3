"""What low-rank adapters may be told. The adapters themselves are in `aiprod_ds.models.lora`. Field names are the YAML keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aiprod_ds.config.schema import PositiveFloat, PositiveInt, StrictModel


class LoraConfig(StrictModel):
    """Low-rank adapters beside frozen Linear layers: W x + alpha / rank * B A x."""

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat | None = None
    """Strength of the adapters, divided by the rank. null: the rank, so that the factor is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, strict=False)
    """Linear layers that get an adapter: names, ends of names (`attn1.to_q`) or patterns with `*`, `?` and `[]` (`attn*.to_?`).
    Each must match a layer of the model's repeated blocks."""

    @property
    def scale(self) -> float:
        """The factor alpha / rank. Worked number: alpha 16 and rank 32 make 0.5."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoraFileConfig(StrictModel):
    """A trained LoRA. Its forms are in docs/tools.md; reading it is `aiprod_ds.models.lora_files`."""

    path: str = Field(min_length=1)
    """A PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), or one safetensors file with the keys of ComfyUI or
    diffusers."""
    alpha: PositiveFloat | None = None
    """What a layer's rank divides to give the adapter's strength. Required by a file that does not say it, and only by it."""
