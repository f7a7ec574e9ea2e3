"""How clips are sampled from a diffusion transformer and decoded: in previews during training, and by `aiprod-ds sample`.

Owns the schema; the formulas are in `aiprod_ds.models.sampling`. Field names are the YAML keys.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aiprod_ds.config.encode import Precision
from aiprod_ds.config.run import ModelConfig
from aiprod_ds.config.schema import PositiveFloat, PositiveInt, StrictModel


class PreviewConfig(StrictModel):
    """Sampling by Euler's method with classifier-free guidance, and decoding."""

    num_forwards: PositiveInt = 30
    """Intervals between noise and clip; each takes one forward pass, two with guidance."""
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """How far the prompt leads away from the empty one: v_empty + scale * (v_prompt - v_empty). 1: no guidance, and half the
    time; above 1 the embeddings of the empty prompt are needed."""
    time_shift: PositiveFloat = 3.0
    """Above 1, more intervals lie near the noise: s' = shift * s / (1 + (shift - 1) * s). 1: evenly spaced."""
    decode_precision: Precision = "bf16"
    """Of the VAEs and the vocoder when they decode."""
    vocoder: ModelConfig | None = None
    """Makes sound of the mel spectrograms of LTX-2's audio VAE, e.g. `diffusers.pipelines.ltx2.vocoder:LTX2Vocoder`. null: their
    sound is approximated without a network. Not for VAEs of waveforms."""
