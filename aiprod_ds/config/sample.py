"""What `aiprod-ds sample` may be told: which trained model, with which encoders and VAEs, makes which clips.

Owns the schema and its reader. Field names are the YAML keys; what needs the models is checked in `aiprod_ds.encode.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.encode import Precision, TextEncoderConfig
from aiprod_ds.config.merge import apply_overrides, read_document
from aiprod_ds.config.phase import PhaseDuration, PhaseResolution
from aiprod_ds.config.preview import PreviewConfig
from aiprod_ds.config.run import ModelConfig
from aiprod_ds.config.schema import NonNegativeInt, StrictModel
from aiprod_ds.config.validation import validated


class SampleConfig(StrictModel):
    """Everything that `aiprod-ds sample` needs."""

    output_dir: str = Field(min_length=1)
    """Where the clips go, relative to the working folder; `--output-dir` replaces it. Clips of an earlier run are replaced."""
    seed: NonNegativeInt = 0
    """Of the noise of every clip, and of random weights."""
    model: ModelConfig
    """The transformer; `pretrained` names a diffusers folder, such as `export/` of a run."""
    lora: str | None = None
    """A folder with a LoRA adapter in PEFT's layout that was trained on `model`. null: none."""
    precision: Precision = "bf16"
    """Of the transformer."""
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

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.duration.frame_rate_hz is None:
            yield "duration.frame_rate_hz: must be given, because the clips have no rate of their own, got nothing. Add it."
        if self.sampling.guidance_scale == 1 and self.empty_prompt:
            yield "empty_prompt: has no effect with sampling.guidance_scale: 1, got text. Remove it or raise the scale."

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


def load_sample_config(path: Path, overrides: Sequence[str] = (), output_dir: str | None = None) -> SampleConfig:
    """Returns the validated configuration of `path`; arguments and messages are those of `loader.load_config`.

    Args:
        path: A YAML file, which may have a `base`.
        overrides: `seed=4` and the like.
        output_dir: Replaces the key of that name.

    Raises:
        ConfigError: With one problem for every rule that is broken.
    """
    document = read_document(path)
    problems = apply_overrides(document, overrides)
    if output_dir is not None:
        document.replace(("output_dir",), output_dir, "--output-dir")
    return validated(document, SampleConfig, problems)
