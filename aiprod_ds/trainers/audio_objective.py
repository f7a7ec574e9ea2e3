"""What an audio model is trained and measured on: the waveform, or the log-mel spectrogram of models that
know no waveform.

Owns the choice between the two and their losses, measures and examples; `audio_vae.py` is the same for both.
Shapes: B batch, C channels, N samples, T frames, M mel bands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from aiprod_ds.config.losses import AudioVAELossConfig, MelConfig, SpectralConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.losses import AudioVAELoss, LossTerms
from aiprod_ds.losses.mel_vae import MelVAELoss
from aiprod_ds.media.sounds import save_mels, save_spectrograms, save_wav
from aiprod_ds.metrics.audio_quality import SHORTEST_MEASURED, AudioQuality
from aiprod_ds.metrics.evaluations import Medium, NotJudged
from aiprod_ds.metrics.listening import Visqol
from aiprod_ds.metrics.mel_quality import MelQuality
from aiprod_ds.models.audio_vae import AudioVAE
from aiprod_ds.models.mel_vae import MelVAE
from aiprod_ds.train.unit import Examples
from aiprod_ds.trainers.measures import share_text

_LOG = logging.getLogger(__name__)
_NOTHING_JUDGED = "no clip could be judged"


class Objective(Protocol):
    """What differs between waveforms and spectrograms."""

    def input_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Returns in which type the module wants the waveform."""

    def target(self, wave_BCN: Tensor) -> Tensor:
        """Returns what the module's output is compared with, fp32."""

    def loss(
        self,
        phase: PhasePlan,
        output: Tensor,
        target: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        *,
        weights: Mapping[str, float],
    ) -> LossTerms:
        """Returns the terms of one micro-batch of `phase` with the weights of its update."""

    def new_quality(self) -> AudioQuality | MelQuality:
        """Returns an empty accumulator of measures."""

    def headline(
        self, metrics: Mapping[str, float], clips: Sequence[str], not_judged: Sequence[NotJudged]
    ) -> str:
        """Returns the measures to print over examples, and of how many clips they are the mean if not of
        all."""

    def examples(
        self, originals: Sequence[Tensor], outputs: Sequence[Tensor], *, sources: Sequence[str]
    ) -> Examples:
        """Returns what is shown of clips [1, ...], whose names are the first of `sources`."""


def choose_objective(
    module: AudioVAE | MelVAE,
    config: AudioVAELossConfig,
    plan: RunPlan,
    *,
    sample_rate_hz: int,
    opinion: Visqol | None = None,
) -> Objective:
    """Returns the objective of the module's kind; `opinion` is measured of waveforms only."""
    if isinstance(module, MelVAE):
        return _MelObjective(module=module, sample_rate_hz=sample_rate_hz, kl_free_bits=config.kl_free_bits)
    # Without a weight in any phase the mel term is not measured: its transforms cost as much as those of the
    # spectral term.
    has_mel = any(phase.loss_weights["mel_weight"] > 0 for phase in plan.phases)
    rate_hz = sample_rate_hz if has_mel else None
    losses = {
        phase.index: AudioVAELoss(config.model_copy(update=dict(phase.loss_weights)), sample_rate_hz=rate_hz)
        for phase in plan.phases
    }
    return _WaveObjective(losses=losses, sample_rate_hz=sample_rate_hz, opinion=opinion)


def objective_problems(config: AudioVAELossConfig, plan: RunPlan, *, is_mel: bool) -> Iterator[str]:
    """Yields what cannot be trained or measured, as `dotted.path: rule, got X. Fix.`"""
    trained = ("mel_weight",) if is_mel else ("waveform_weight", "spectral_weight", "mel_weight")
    for phase in plan.phases:
        where = f"curriculum.phases[{phase.index}].loss"
        weights = phase.loss_weights
        ends = [ramp.updates for ramp in phase.loss_ramps.values()]
        moments = [phase.weights_at(position) for position in (0, max(ends, default=0))]
        if not all(any(moment[name] > 0 for name in trained) for moment in moments):
            yield (
                f"{where}: one of {', '.join(trained)} must exceed 0 in this phase, got 0 for all. Raise "
                "one of them."
            )
        for name in ("waveform_weight", "spectral_weight") if is_mel else ():
            if weights[name] > 0:
                yield (
                    f"{where}: {name} has no effect on a model of mel spectrograms, got {weights[name]}. "
                    f"Set loss.{name} to 0."
                )
    if is_mel and (config.mel, config.spectral) != (MelConfig(), SpectralConfig()):
        yield (
            "loss.mel: neither this nor loss.spectral has an effect on a model of mel spectrograms, got "
            "values. Remove them."
        )
    last = plan.phases[-1].buckets[0]
    if not is_mel and last.frames < SHORTEST_MEASURED:
        yield (
            f"curriculum.phases[{len(plan.phases) - 1}].duration: must give at least {SHORTEST_MEASURED} "
            "samples in the last "
            f"phase, in whose shape held-out clips are measured, got {last.frames}. Lengthen its clips."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveObjective:
    losses: Mapping[int, AudioVAELoss]
    sample_rate_hz: int
    opinion: Visqol | None

    def input_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        return compute_dtype

    def target(self, wave_BCN: Tensor) -> Tensor:
        return wave_BCN

    def loss(
        self,
        phase: PhasePlan,
        output: Tensor,
        target: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        *,
        weights: Mapping[str, float],
    ) -> LossTerms:
        terms: LossTerms = self.losses[phase.index](output, target, mean, logvar, weights=weights)
        return terms

    def new_quality(self) -> AudioQuality:
        return AudioQuality(sample_rate_hz=self.sample_rate_hz, opinion=self.opinion)

    def headline(
        self, metrics: Mapping[str, float], clips: Sequence[str], not_judged: Sequence[NotJudged]
    ) -> str:
        if "mel_distance" not in metrics:
            return _NOTHING_JUDGED
        share = share_text("mel_distance", clips, not_judged)
        return f"SI-SDR {metrics['si_sdr_db']:.1f} dB, mel distance {metrics['mel_distance']:.2f}{share}"

    def examples(
        self, originals: Sequence[Tensor], outputs: Sequence[Tensor], *, sources: Sequence[str]
    ) -> Examples:
        return _WaveExamples(
            original=torch.cat(list(originals)),
            output=torch.cat(list(outputs)),
            rate_hz=self.sample_rate_hz,
            sources=tuple(sources),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MelObjective:
    module: MelVAE
    sample_rate_hz: int
    kl_free_bits: float

    def input_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        del compute_dtype  # the front end wants fp32 whatever the model computes in
        return torch.float32

    def target(self, wave_BCN: Tensor) -> Tensor:
        return self.module.mel(wave_BCN)

    def loss(
        self,
        phase: PhasePlan,
        output: Tensor,
        target: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        *,
        weights: Mapping[str, float],
    ) -> LossTerms:
        del phase  # nothing but weights differs between phases
        loss = MelVAELoss(
            mel_weight=weights["mel_weight"], kl_weight=weights["kl_weight"], kl_free_bits=self.kl_free_bits
        )
        terms: LossTerms = loss(output, target, mean, logvar)
        return terms

    def new_quality(self) -> MelQuality:
        return MelQuality()

    def headline(
        self, metrics: Mapping[str, float], clips: Sequence[str], not_judged: Sequence[NotJudged]
    ) -> str:
        if "log_mel_l1" not in metrics:
            return _NOTHING_JUDGED
        return f"log-mel error {metrics['log_mel_l1']:.3f}{share_text('log_mel_l1', clips, not_judged)}"

    def examples(
        self, originals: Sequence[Tensor], outputs: Sequence[Tensor], *, sources: Sequence[str]
    ) -> Examples:
        del sources  # the one picture has all clips
        return _MelExamples(original=torch.cat(list(originals)), output=torch.cat(list(outputs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveExamples:
    """Clips [N, C, L]."""

    original: Tensor
    output: Tensor
    rate_hz: int
    sources: tuple[str, ...]

    def save(self, folder: Path, name: str, *, title: str, moment: str) -> tuple[Medium, ...]:
        save_spectrograms(
            self.original, self.output, folder / f"{name}.png", sample_rate_hz=self.rate_hz, title=title
        )
        media = [_sheet(folder, name, title)]
        for prefix, waves_NCL in (("original", self.original), (name, self.output)):
            for number, wave_CL in enumerate(waves_NCL, start=1):
                path = folder / f"{prefix}_clip_{number}.wav"
                if not bool(wave_CL.isfinite().all()):
                    _LOG.warning("sound_not_written path=%s reason=samples_not_finite", path)
                    continue
                save_wav(wave_CL, path, sample_rate_hz=self.rate_hz)
                is_original = prefix == "original"
                media.append(
                    Medium(
                        path=f"{folder.name}/{path.name}",
                        kind="sound",
                        role="original" if is_original else "reconstruction",
                        caption=f"clip {number}, {'original' if is_original else moment}",
                        clip=number,
                        source=self.sources[number - 1],
                    )
                )
        return tuple(media)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MelExamples:
    """Clips [N, C, T, M]."""

    original: Tensor
    output: Tensor

    def save(self, folder: Path, name: str, *, title: str, moment: str) -> tuple[Medium, ...]:  # noqa: ARG002  no clip of its own
        save_mels(self.original, self.output, folder / f"{name}.png", title=title)
        return (_sheet(folder, name, title),)


def _sheet(folder: Path, name: str, title: str) -> Medium:
    return Medium(path=f"{folder.name}/{name}.png", kind="picture", role="sheet", caption=title)
