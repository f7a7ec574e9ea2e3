"""What `aiprod-ds sample` may be told: which trained model, with which encoders and VAEs, makes which clips;
and how clips are sampled, there and in the previews of a training run.

Owns the schema; `load` reads the file. Field names are the YAML keys; what needs the models is checked in
`aiprod_ds.encode.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, model_validator

from aiprod_ds.config.encode import Precision, TextEncoderConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.phase import PhaseDuration, PhaseResolution
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import PositiveFloat, PositiveInt, Seed, StrictModel


class PreviewConfig(StrictModel):
    """Sampling by Euler's method with classifier-free guidance, and decoding."""

    num_forwards: PositiveInt = 30
    """Intervals between noise and clip; each takes one forward pass, two with guidance."""
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """How far the prompt leads away from the empty one: v_empty + scale * (v_prompt - v_empty). 1: no
    guidance, and half the time; above 1 the embeddings of the empty prompt are needed."""
    time_shift: PositiveFloat = 3.0
    """Above 1, more intervals lie near the noise: s' = shift * s / (1 + (shift - 1) * s). 1: evenly
    spaced."""
    decode_precision: Precision = "bf16"
    """Of the VAEs and the vocoder when they decode."""
    vocoder: ModelConfig | None = None
    """Makes sound of the mel spectrograms of LTX-2's audio VAE, e.g.
    `diffusers.pipelines.ltx2.vocoder:LTX2Vocoder`. null: their sound is approximated without a network. Not
    for VAEs of waveforms."""


class PreviewPrompt(StrictModel):
    """One clip to sample during training; YAML may write the prompt alone."""

    prompt: str = Field(min_length=1)
    """What the clip shall show."""
    first_frame: str | None = None
    """A picture that the clip begins with, relative to the working folder; scaled and cropped to the clip's
    size. Only for families whose tokens may have noise levels of their own. null: none."""
    sound: str | None = None
    """A sound that the clip is to have, relative to the working folder: its beginning, with silence where it
    ends early. Only for families that make sound. null: none, the model makes it."""
    resolution: PhaseResolution | None = None
    """Frame size; text such as `512x768` is height x width. null: that of the last phase."""
    duration: PhaseDuration | None = None
    """Length; frames that the VAE cannot make are rounded up. null: that of the last phase."""
    seed: Seed | None = None
    """Draws the noise. null: the run's seed and the prompt's place in the list do."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"prompt": value} if isinstance(value, str) else value


class TrainingPreviewConfig(PreviewConfig):
    """When clips are sampled during training, from which prompts, and how."""

    every_updates: PositiveInt | None = None
    """Updates between two previews inside phases, counted over the whole run. null: before training, at the
    ends of phases and when a file `EVALUATE` asks for it."""
    prompts: tuple[PreviewPrompt, ...] = Field(default=(), strict=False)
    """Own prompts, one clip of each, before those of the first `evaluation.num_pictures` held-out clips."""
    prompts_file: str | None = None
    """More of them: a text file with one prompt a line, or a YAML file with a list as `prompts` has it.
    Relative to the working folder."""
    text: TextEncoderConfig | None = None
    """The encoder of own prompts, as the latents' captions were encoded; it is loaded once, before training,
    and the embeddings stay in the run folder."""

    @rule
    def _prompts_need_an_encoder(self) -> Iterator[str]:
        has_prompts = bool(self.prompts) or self.prompts_file is not None
        if has_prompts and self.text is None:
            yield (
                "text: must be given for own prompts, got nothing. Copy the section text of what encoded the "
                "captions."
            )
        if self.text is not None and not has_prompts:
            yield (
                "text: has no effect without prompts or prompts_file, got a value. Remove it or add prompts."
            )


class SampleConfig(StrictModel):
    """Everything that `aiprod-ds sample` needs."""

    output_dir: str = Field(min_length=1)
    """Where the clips go, relative to the working folder; `--output-dir` replaces it. Clips of an earlier run
    are replaced."""
    seed: Seed = 0
    """Draws the noise of every clip, and the weights of a network without `pretrained`."""
    model: ModelConfig
    """The transformer; `pretrained` names a diffusers folder, such as `export/` of a run."""
    lora: str | None = None
    """A folder with a LoRA adapter in PEFT's layout that was trained on `model`. null: none."""
    precision: Precision = "bf16"
    """Type of the transformer's weights and computation."""
    vae: ModelConfig
    """The video VAE whose latents the transformer was trained on."""
    audio_vae: ModelConfig | None = None
    """The audio VAE, for a transformer that makes sound, and only for such."""
    text: TextEncoderConfig
    """The encoder of the prompts, as in training."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, strict=False)
    """One clip is made of each."""
    empty_prompt: str = ""
    """The text that guidance leads away from, the same for all clips."""
    resolution: PhaseResolution
    """Frame size; text such as `512x768` is height x width."""
    duration: PhaseDuration
    """Length, with `frame_rate_hz`; frames that the VAE cannot make are rounded up."""
    sampling: PreviewConfig = PreviewConfig()
    """How clips are sampled and decoded."""

    @rule
    def _problems(self) -> Iterator[str]:
        if self.duration.frame_rate_hz is None:
            yield (
                "duration.frame_rate_hz: must be given, because the clips have no rate of their own, got "
                "nothing. Add it."
            )
        if self.sampling.guidance_scale == 1 and self.empty_prompt:
            yield (
                "empty_prompt: has no effect with sampling.guidance_scale: 1, got text. Remove it or raise "
                "the scale."
            )

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second of the clips."""
        assert self.duration.frame_rate_hz is not None, "the schema demands it"
        return self.duration.frame_rate_hz

    @property
    def requested_frames(self) -> int:
        """Frames of the clips before they are rounded up: `frames`, or seconds times the rate, rounded."""
        seconds = self.duration.seconds
        return self.duration.frames or max(1, round((seconds or 0.0) * self.frame_rate_hz))
