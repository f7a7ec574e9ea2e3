"""What the losses of all trainers may be told: weights that a phase may override, and the terms behind them.

Owns the schema; the formulas are in `aiprod_ds.losses`. Field names are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)


class LossConfig(StrictModel):
    """A weighted sum of terms."""

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name: every `*_weight`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}


FFTSize = Annotated[int, Field(ge=4, multiple_of=4)]  # the hop is a quarter of it


class PatchDiscriminatorConfig(StrictModel):
    """A PatchGAN: see `aiprod_ds.models.discriminators.patch`."""

    channels: PositiveInt = 64
    """Channels of the first layer; each further one has twice as many, at most 8 times."""
    layers: Annotated[int, Field(ge=1, le=6)] = 3
    """Layers that halve height and width; frames must have a side of at least 2 to this power."""


class STFTDiscriminatorConfig(StrictModel):
    """A discriminator for each window: see `aiprod_ds.models.discriminators.spectrum`."""

    fft_sizes: tuple[FFTSize, ...] = Field(default=(2048, 1024, 512, 256, 128), min_length=1, strict=False)
    """Windows in samples, multiples of 4; each hops by a quarter of itself."""
    channels: PositiveInt = 32
    """Channels of every layer."""


class PeriodDiscriminatorConfig(StrictModel):
    """A discriminator for each period: see `aiprod_ds.models.discriminators.period`."""

    periods: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(2, 3, 5, 7, 11), min_length=1, strict=False
    )
    """Distances in samples."""
    channels: PositiveInt = 32
    """Channels of the first layer; the widest has 32 times as many."""


class DiscriminatorOptimizerConfig(StrictModel):
    """AdamW of the discriminator."""

    learning_rate: PositiveFloat | None = None
    """Of every update. null: that of the model, with the warm-up and the schedule of the phase."""
    betas: tuple[Fraction, Fraction] = Field(default=(0.5, 0.9), strict=False)
    """Decay of the first and of the second moment, per update."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of kernels; times the learning rate in each update."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Global L2 norm to which a longer gradient is scaled down. null: no clipping."""


class AdversarialConfig(StrictModel):
    """A discriminator that is trained against the reconstructions, by an engine of its own.

    It starts at `start_update` or with `start_phase`, else with the run. The model feels it
    `warmup_updates` later, at first with a part of the weights.
    """

    objective: Literal["hinge", "lsgan"] = "hinge"
    """Hinge losses, or squared distances to 1 and 0."""
    start_update: NonNegativeInt | None = None
    """Updates of the run before the discriminator is trained. Not beside `start_phase`."""
    start_phase: str | None = None
    """Name of the phase in which it begins to be trained. null: by `start_update`."""
    warmup_updates: NonNegativeInt = 0
    """Updates in which the discriminator alone is trained, before the model is trained against it."""
    ramp_updates: NonNegativeInt = 0
    """Updates over which both weights then rise linearly to their values."""
    adaptive: Literal["last_layer", "output", "off"] = "last_layer"
    """Multiplies `adversarial_weight` by the gradient of the other terms over that of this one: at the
    weight of the decoder's last layer, or at its output. `off`: by 1."""
    max_adaptive: PositiveFloat = 1e4
    """The most that this factor may be."""
    last_layer: str | None = None
    """Name of the decoder's last layer in the model, `decoder.conv_out` for one. null: the convolution or
    linear layer that runs last."""
    lecam_weight: NonNegativeFloat = 0.0
    """Weight, for the discriminator, of the distance of its answers to the running means of those to the
    other side."""
    lecam_decay: Fraction = 0.999
    """What such a mean keeps of itself in an update; no effect without `lecam_weight`, so refused there."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight, for the discriminator, of half its squared gradient at the data."""
    r1_every_updates: PositiveInt = 16
    """It is computed in one update of so many, with so many times the weight; no effect without `r1_weight`,
    so refused there."""
    optimizer: DiscriminatorOptimizerConfig = DiscriminatorOptimizerConfig()
    """How the discriminator is trained."""

    @rule
    def _keys_without_effect(self) -> Iterator[str]:
        if self.start_update is not None and self.start_phase is not None:
            yield (
                f"start_update: has no effect beside start_phase, got {self.start_update}. Remove one of the "
                "two."
            )
        for key, owner, is_there in (
            ("lecam_decay", "lecam_weight", self.lecam_weight > 0),
            ("r1_every_updates", "r1_weight", self.r1_weight > 0),
            ("last_layer", "adaptive: last_layer", self.adaptive == "last_layer"),
            ("max_adaptive", "adaptive", self.adaptive != "off"),
        ):
            value = getattr(self, key)
            if not is_there and value != type(self).model_fields[key].default:
                yield f"{key}: has no effect without {owner}, got {value}. Remove it."

    def _missing_discriminator(self, members: tuple[str, str]) -> Iterator[str]:
        if all(getattr(self, member) is None for member in members):
            yield (
                f"{members[0]}: this or {members[1]} must be a discriminator, got null for both. Set one, or "
                "remove `adversarial`."
            )


class VideoAdversarialConfig(AdversarialConfig):
    """Discriminators of video."""

    patch_3d: PatchDiscriminatorConfig | None = PatchDiscriminatorConfig()
    """Judges patches of space and time. null: there is none."""
    frame_2d: PatchDiscriminatorConfig | None = None
    """Judges patches of each frame. null: there is none."""

    @rule
    def _one_is_there(self) -> Iterator[str]:
        yield from self._missing_discriminator(("patch_3d", "frame_2d"))


class AudioAdversarialConfig(AdversarialConfig):
    """Discriminators of sound."""

    stft: STFTDiscriminatorConfig | None = STFTDiscriminatorConfig()
    """Judge spectrograms. null: there is none."""
    period: PeriodDiscriminatorConfig | None = PeriodDiscriminatorConfig()
    """Judge samples a period apart. null: there is none."""

    @rule
    def _one_is_there(self) -> Iterator[str]:
        yield from self._missing_discriminator(("stft", "period"))


class ReconstructionLossConfig(LossConfig):
    """A loss that may have a discriminator; what derives from it says of which kind."""

    adversarial_weight: NonNegativeFloat = 0.0
    """Weight of the reconstruction's score with the discriminator, before the factor of
    `adversarial.adaptive`. Needs `adversarial`."""
    feature_matching_weight: NonNegativeFloat = 0.0
    """Weight of the L1 distance between the discriminator's features of clip and reconstruction. Needs
    `adversarial`."""

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name; those of the discriminator only if there is
        one."""
        known = super().weights()
        if getattr(self, "adversarial", None) is None:
            known = {name: value for name, value in known.items() if name not in _AGAINST_DISCRIMINATOR}
        return known

    @rule
    def _weights_have_a_discriminator(self) -> Iterator[str]:
        for name in _AGAINST_DISCRIMINATOR:
            if getattr(self, name) > 0 and getattr(self, "adversarial", None) is None:
                yield (
                    f"{name}: has no effect without adversarial, got {getattr(self, name)}. Add "
                    "`adversarial: {}` or remove it."
                )


_AGAINST_DISCRIMINATOR = ("adversarial_weight", "feature_matching_weight")


class PerceptualConfig(StrictModel):
    """VGG16 feature distance; see `aiprod_ds.losses.perceptual.PerceptualLoss`."""

    mode: Literal["lpips", "vgg", "l2"] = "lpips"
    """`lpips`: unit-normalised features with learned heads; `vgg`: plain feature distance; `l2`: no network,
    the mean squared error in its place."""
    weights: str | None = None
    """A local copy of torchvision's VGG16 file; its hash is checked. null: the torch hub cache, else a
    download."""
    fallback: Literal["error", "l2"] = "error"
    """What happens when there are no weights: `l2` takes the mean squared error in their place, and the
    report says so."""
    frames_per_clip: NonNegativeInt = 0
    """Frames of each clip that the network looks at, chosen at random; 0 takes all."""

    @rule
    def _network_settings_have_an_effect(self) -> Iterator[str]:
        for key in ("weights", "fallback", "frames_per_clip"):
            if self.mode == "l2" and getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: has no effect with mode: l2, got {getattr(self, key)!r}. Remove it."


class VideoVAELossConfig(ReconstructionLossConfig):
    """The terms of the loss and their weights; a term of weight 0 is measured where it can be, not
    trained."""

    reconstruction: Literal["l1", "mse"] = "l1"
    """Mean absolute or mean squared error; its weight is 1."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of the VGG16 distance. 0 in every phase: the network is not loaded and the term not measured."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the posterior's divergence from the unit normal. Its default has no effect, and any other
    value is refused, where there is no posterior or nothing is trained that it depends on."""
    kl_reduction: Literal["per_input_element", "mean"] = "per_input_element"
    """The sum over a clip's latents divided by its input elements, or the mean over latents."""
    kl_free_bits: NonNegativeFloat = 0.0
    """Nats of divergence that each channel of a clip's latents has without being pressed further; the mean
    over positions counts."""
    haar_weight: NonNegativeFloat = 0.0
    """Weight of the L1 distance between one-level 3-D Haar sub-bands."""
    frame_difference_weight: NonNegativeFloat = 0.0
    """Weight of the L1 distance between the differences of neighbouring frames. Where it is 0 the term is not
    measured either."""
    flicker_weight: NonNegativeFloat = 0.0
    """Weight of the L1 distance between how much patches of 8x8 pixels change from frame to frame. Where it
    is 0 the term is not measured either."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The network behind `perceptual_weight`."""
    adversarial: VideoAdversarialConfig | None = None
    """The discriminator. null: there is none."""


class SpectralConfig(StrictModel):
    """STFT distance at several resolutions; `fft_sizes: [1024]` gives the single-resolution form (hop
    256)."""

    fft_sizes: tuple[FFTSize, ...] = Field(
        default=(2048, 1024, 512, 256, 128, 64, 32), min_length=1, strict=False
    )
    """Windows in samples, multiples of 4; each hops by a quarter of itself."""
    log: Literal["log", "log1p"] = "log"
    """How magnitudes m are compared beside themselves: log(m + `log_epsilon`) or log(1 + m)."""
    log_epsilon: PositiveFloat = 1e-5
    """What keeps silence from an infinite logarithm; no effect with `log: log1p`, so refused there."""
    sum_difference: bool = True
    """Compares the sum and the difference of stereo channels beside left and right."""

    @rule
    def _log_epsilon_has_effect(self) -> Iterator[str]:
        if self.log == "log1p" and self.log_epsilon != type(self).model_fields["log_epsilon"].default:
            yield (
                f"log_epsilon: has no effect with log1p, got {self.log_epsilon}. Remove it or set log to log."
            )


class MelConfig(StrictModel):
    """Log-mel distance at several resolutions, one number of bands for each FFT size."""

    fft_sizes: tuple[FFTSize, ...] = Field(
        default=(32, 64, 128, 256, 512, 1024, 2048), min_length=1, strict=False
    )
    """Windows in samples, multiples of 4; each hops by a quarter of itself."""
    num_bands: tuple[PositiveInt, ...] = Field(
        default=(5, 10, 20, 40, 80, 160, 320), min_length=1, strict=False
    )
    """Mel bands of each window, as many numbers as `fft_sizes`."""

    @rule
    def _one_number_for_each_size(self) -> Iterator[str]:
        if len(self.num_bands) != len(self.fft_sizes):
            yield (
                f"num_bands: must have one number for each of the {len(self.fft_sizes)} fft_sizes, got "
                f"{len(self.num_bands)}. "
                "Add or remove some."
            )


class AudioVAELossConfig(ReconstructionLossConfig):
    """Weights of the terms; a term with weight 0 is measured, not trained."""

    waveform_weight: NonNegativeFloat = 0.1
    """Weight of the mean absolute error of the samples."""
    spectral_weight: NonNegativeFloat = 1.0
    """Weight of the STFT distance."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the posterior's divergence from the unit normal, summed over channels. Its default has no
    effect, and any other value is refused, where there is no posterior or nothing is trained that it depends
    on."""
    kl_free_bits: NonNegativeFloat = 0.0
    """Nats of divergence that each channel of a clip's latents has without being pressed further; the mean
    over positions counts."""
    mel_weight: NonNegativeFloat = 0.0
    """Weight of the log-mel distance. 0 in every phase: the term is not measured either. For a model of mel
    spectrograms: the weight of their mean absolute error, beside which those of waveform and spectrum must be
    0."""
    spectral: SpectralConfig = SpectralConfig()
    """The STFT distance."""
    mel: MelConfig = MelConfig()
    """The log-mel distance."""
    adversarial: AudioAdversarialConfig | None = None
    """The discriminator. null: there is none."""

    @rule
    def _something_is_reconstructed(self) -> Iterator[str]:
        if self.waveform_weight == self.spectral_weight == self.mel_weight == 0:
            yield (
                "waveform_weight: this, spectral_weight or mel_weight must exceed 0, got 0 for all. Raise "
                "one of them."
            )


class NoiseLevelConfig(StrictModel):
    """Logit-normal noise levels whose mean shifts with the number of tokens.

    The shift is the line through (`low_tokens`, `low_shift`) and (`high_tokens`, `high_shift`), kept within
    [`min_shift`, `max_shift`]; null for either end takes that bound away. A `uniform_fraction` of the levels
    is uniform instead.
    """

    low_tokens: PositiveInt = 1024
    """Latent tokens of a clip at the line's first point."""
    low_shift: float = 0.95
    """Mean of the logit of the noise level there."""
    high_tokens: PositiveInt = 4096
    """Latent tokens at the second point; above `low_tokens`."""
    high_shift: float = 2.05
    """Mean of the logit there."""
    min_shift: float | None = 0.5
    """The mean of the logit is not below this. null: it may be."""
    max_shift: float | None = 3.0
    """The mean of the logit is not above this. null: it may be; from some 50,000 tokens on nearly every level
    is then 1."""
    standard_deviation: PositiveFloat = 1.0
    """Spread of the logit of the noise level around its mean."""
    uniform_fraction: Fraction = 0.1
    """Share of the samples whose level is drawn evenly from 0 to 1."""

    @rule
    def _the_line_and_the_bounds_are_ordered(self) -> Iterator[str]:
        if self.high_tokens <= self.low_tokens:
            yield (
                f"high_tokens: must exceed low_tokens ({self.low_tokens}), got {self.high_tokens}. Swap them."
            )
        if self.min_shift is not None and self.max_shift is not None and self.max_shift < self.min_shift:
            yield (
                f"max_shift: must not be below min_shift ({self.min_shift}), got {self.max_shift}. Swap them."
            )


class FlowConfig(LossConfig):
    """The objective of the diffusion trainer. Modalities have their own noise level unless
    `shared_noise_level` is set."""

    noise_level: NoiseLevelConfig = NoiseLevelConfig()
    """How noisy the samples are made."""
    video_weight: NonNegativeFloat = 1.0
    """Weight of the video loss."""
    audio_weight: NonNegativeFloat = 0.25
    """Weight of the audio loss, where the model makes sound."""
    shared_noise_level: bool = False
    """Whether the sound of a clip has the noise level of its pictures, instead of one of its own."""
    first_frame_probability: Fraction = 0.0
    """Share of the clips whose first latent frame is given without noise and not trained, for
    image-to-video."""

    @rule
    def _something_is_trained(self) -> Iterator[str]:
        if self.video_weight == self.audio_weight == 0:
            yield "video_weight: this or audio_weight must exceed 0, got 0 for both. Raise one of them."
