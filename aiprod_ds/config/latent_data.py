"""Where the latents of a diffusion run come from, and how often its captions are left out."""

from __future__ import annotations

from pydantic import Field

from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.config.schema import Fraction


class LatentDataConfig(ClipDataConfig):
    """Latents and prompt embeddings that `aiprod-ds encode` or ltx-trainer wrote."""

    train: str = Field(min_length=1)
    """A folder with `latents/`, or one with `.precomputed/` in it, or the CSV, JSON or JSONL manifest beside `.precomputed/`, of
    which only the rows' clips count; relative to the working folder."""
    validation: str | None = None
    """Held-out latents, in the same forms. null: `holdout_fraction` of the training clips."""
    num_workers: int = Field(default=2, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process. No effect on the result."""
    max_unreadable_fraction: Fraction = 0.05
    """Share of clips that may be damaged or lack a partner file; above it the run stops before training."""
    caption_dropout: Fraction = 0.1
    """Share of training clips whose caption is replaced by the empty one, for classifier-free guidance. Above 0 it needs
    `empty_prompt.safetensors` beside the latents, which `aiprod-ds encode` writes."""
