"""The held-out measures of a run: which there are, what they need, and what they say over all ranks.

Owns the check of everything that measures need from outside (weights, networks, packages), so that it is
found before training; formulas are in `aiprod_ds.metrics`, the clips come from `evaluation.py`. Called by the
trainers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from torch import Tensor

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.losses import PerceptualConfig
from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import ConfigError, DataError, PlanError
from aiprod_ds.losses import PerceptualLoss
from aiprod_ds.losses.vgg import MIN_SIZE, local_weights
from aiprod_ds.metrics.evaluations import EVERY_MEASURE, NotJudged
from aiprod_ds.metrics.listening import VISQOL_SECONDS, Visqol, has_visqol
from aiprod_ds.metrics.metric_names import Better, find_measure
from aiprod_ds.metrics.quality import VideoQuality
from aiprod_ds.metrics.video_features import VideoFeatures, load_features
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.evaluation import over_ranks

_LOG = logging.getLogger(__name__)
_LPIPS_KEY, _FVD_KEY = "evaluation.measures.lpips", "evaluation.measures.fvd"
_FEWEST_CLIPS = 2  # one has no covariance
_CLIPS_PER_FEATURE = 2  # below it, the bias of rFVD is a large part of its value


class Judging(Protocol):
    """An accumulator of measures that says which clips it could not judge."""

    @property
    def not_judged(self) -> tuple[NotJudged, ...]:
        """Those of this rank."""

    def state(self) -> Tensor:
        """Returns the sums so far."""

    def merge(self, state: Tensor) -> None:
        """Adds the sums of another accumulator."""

    def compute(self) -> dict[str, float]:
        """Returns what could be judged."""


def judged(
    engine: Engine, own: Judging, empty: Judging, *, clips: Sequence[str]
) -> tuple[dict[str, float], tuple[NotJudged, ...]]:
    """Returns the measures over all ranks, and what they leave out in the order of `clips`; nothing without
    a clip. Collective."""
    if not clips:
        return {}, ()
    metrics = over_ranks(engine, own, empty).compute()
    places = {clip: place for place, clip in enumerate(clips)}
    found = chain.from_iterable(dist.gather_objects(own.not_judged))
    return metrics, tuple(sorted(found, key=lambda entry: (places[entry.clip], entry.measure)))


def passed_over(data: ClipData, bucket: BucketPlan, *, max_clips: int) -> tuple[NotJudged, ...]:
    """Returns the held-out clips that would have been measured, were they as long as the bucket."""
    fitting = data.held_out(bucket)
    measured = fitting[:max_clips]
    end = measured[-1] if len(measured) == max_clips else len(data.validation_clips)
    return tuple(
        NotJudged(
            clip=data.validation_clips[index].name,
            measure=EVERY_MEASURE,
            reason=f"under {bucket.length_text}",
        )
        for index in range(end)
        if index not in set(fitting)
    )


def share_text(measure: str, clips: Sequence[str], not_judged: Sequence[NotJudged]) -> str:
    """Returns ` (1 of 5 clips)` for a measure that left some out, else nothing."""
    left_out = sum(entry.measure == measure and entry.clip in clips for entry in not_judged)
    return f" ({len(clips) - left_out} of {len(clips)} clips)" if left_out else ""


def require_known_measure(config: RunConfig, known: Sequence[str], source: str) -> None:
    """Checks `checkpoint.keep_best` against what the trainer measures.

    Args:
        config: Of the run.
        known: Names of the measures; empty where nobody knows them.
        source: How messages name the configuration.

    Raises:
        PlanError: If the measure does not exist, or the rule would keep the worst.
    """
    rule = config.checkpoint.keep_best
    if rule is None or not known:
        return
    where = f"{source}: checkpoint.keep_best"
    if rule.metric not in known:
        hint = suggestion(rule.metric, known)
        raise PlanError(f"{where}.metric: must be one of {', '.join(known)}, got {rule.metric!r}. {hint}")
    better = find_measure(rule.metric).better
    if better is Better.NEAR_ONE:
        raise PlanError(
            f"{where}.metric: must be best at its lowest or its highest, got {rule.metric}, which is best at "
            "1. Take flicker_error with mode: min."
        )
    wanted = {Better.HIGHER: "max", Better.LOWER: "min"}.get(better, rule.mode)
    if rule.mode != wanted:
        raise PlanError(
            f"{where}.mode: must be {wanted} for {rule.metric}, of which {better.value} values are better, "
            f"got {rule.mode}. Correct it."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoMeasures:
    """What is measured of a video VAE beside what needs nothing.

    Attributes:
        lpips: Distance of two videos; None: not measured.
        features: Network behind rFVD; None: not measured.
    """

    lpips: Callable[[Tensor, Tensor], float] | None = None
    features: VideoFeatures | None = None

    def new_quality(self) -> VideoQuality:
        """Returns an empty accumulator."""
        return VideoQuality(self.lpips, features=self.features)

    def notes(self, num_clips: int) -> tuple[str, ...]:
        """Returns in words what is doubtful of measures on so many clips."""
        if self.features is None or num_clips >= (enough := _CLIPS_PER_FEATURE * self.features.num_features):
            return ()
        note = (
            f"rfvd: measured on {num_clips} clips; below {enough}, twice the network's features, it is "
            "biased upwards and compares at the same clips only"
        )
        return (note,)


def video_measures(
    config: VAETrainerConfig, plan: RunPlan, perceptual: PerceptualLoss | None, *, num_clips: int
) -> VideoMeasures:
    """Returns what a run measures; reads weights.

    Args:
        config: Of the run.
        plan: The phases.
        perceptual: The network of the loss, which is measured with as well where it can be.
        num_clips: That are measured.

    Raises:
        PlanError: If something is missing, or there are too few clips.
    """
    settings, bucket = config.evaluation.measures, plan.phases[-1].buckets[0]
    lpips: Callable[[Tensor, Tensor], float] | None = None
    if _is_large_enough(bucket) and settings.lpips != "off":
        if perceptual is not None and perceptual.active_mode == "lpips":
            lpips = perceptual.measure
        elif settings.lpips == "on":
            lpips = _lpips_network(config).measure
    features = None
    if settings.fvd is not None:
        if num_clips < _FEWEST_CLIPS:
            raise PlanError(
                f"data.validation: must hold {_FEWEST_CLIPS} clips of the last phase's length for "
                f"{_FVD_KEY}, got {num_clips}. Hold out more, or remove {_FVD_KEY}."
            )
        features = load_features(settings.fvd, num_frames=bucket.frames)
    measures = VideoMeasures(lpips=lpips, features=features)
    for note in measures.notes(num_clips):
        _LOG.warning("measure_is_doubtful %s", note)
    return measures


def video_measure_names(config: VAETrainerConfig, plan: RunPlan) -> tuple[str, ...]:
    """Returns what a run may measure, by name."""
    settings, bucket = config.evaluation.measures, plan.phases[-1].buckets[0]
    has_lpips = settings.lpips == "on" or (settings.lpips == "auto" and _loss_has_lpips(config, plan))
    return (
        "psnr_db",
        "ssim",
        *(("lpips_vgg",) if has_lpips and _is_large_enough(bucket) else ()),
        *(("rfvd",) if settings.fvd is not None else ()),
        *(("flicker_error", "flicker_ratio") if bucket.frames > 1 else ()),
    )


def video_measure_problems(config: VAETrainerConfig, plan: RunPlan) -> Iterator[str]:
    """Yields what measures need and is not there, as `dotted.path: rule, got X. Fix.`; reads the network of
    rFVD and tries it out."""
    settings, bucket = config.evaluation.measures, plan.phases[-1].buckets[0]
    if settings.lpips == "on":
        yield from _lpips_problems(config, plan)
    if settings.fvd is None:
        return
    if config.evaluation.max_clips < _FEWEST_CLIPS:
        yield (
            f"evaluation.max_clips: must be at least {_FEWEST_CLIPS} with {_FVD_KEY}, which compares "
            f"distributions, got {config.evaluation.max_clips}. Raise it, or remove {_FVD_KEY}."
        )
    try:
        load_features(settings.fvd, num_frames=bucket.frames)
    except ConfigError as error:
        yield str(error)


def audio_measure_problems(config: AudioVAETrainerConfig, plan: RunPlan, *, is_mel: bool) -> Iterator[str]:
    """Yields what measures need and is not there, as `dotted.path: rule, got X. Fix.`"""
    if not config.evaluation.measures.visqol:
        return
    bucket, rate_hz = plan.phases[-1].buckets[0], config.data.sample_rate_hz
    if is_mel:
        yield (
            "evaluation.measures.visqol: has no effect on a model of mel spectrograms, which makes no sound, "
            "got true. Set it to false."
        )
    elif not has_visqol():
        try:
            Visqol(sample_rate_hz=rate_hz)
        except ConfigError as error:
            yield str(error)
    elif bucket.frames < VISQOL_SECONDS * rate_hz:
        yield (
            f"curriculum.phases[{len(plan.phases) - 1}].duration: must give {VISQOL_SECONDS:g} s in the last "
            f"phase for evaluation.measures.visqol, got {bucket.frames / rate_hz:.3g} s. Lengthen its clips, "
            "or set visqol to false."
        )


def audio_measure_names(config: AudioVAETrainerConfig, *, is_mel: bool) -> tuple[str, ...]:
    """Returns what a run may measure, by name."""
    if is_mel:
        return ("log_mel_l1",)
    has_visqol_score = config.evaluation.measures.visqol
    return ("mel_distance", "stft_distance", "si_sdr_db", *(("visqol",) if has_visqol_score else ()))


def diffusion_measure_names(modalities: Sequence[str], noise_levels: Sequence[float]) -> tuple[str, ...]:
    """Returns what a run measures, by name."""
    levels = (f"{modality}_loss_at_{level:g}" for modality in modalities for level in noise_levels)
    return ("loss", *(f"{modality}_loss" for modality in modalities), *levels)


def _lpips_problems(config: VAETrainerConfig, plan: RunPlan) -> Iterator[str]:
    bucket = plan.phases[-1].buckets[0]
    if not _is_large_enough(bucket):
        yield (
            f"{_LPIPS_KEY}: must not be on for a last phase under {MIN_SIZE}x{MIN_SIZE}, got {bucket.height}x"
            f"{bucket.width}. Set it to auto, or raise the resolution."
        )
    elif not (_loss_has_lpips(config, plan) and config.loss.perceptual.fallback == "error"):
        try:
            local_weights(config.loss.perceptual.weights)
        except DataError as error:
            yield f"{_LPIPS_KEY}: {error} Or set it to auto, which measures where the loss has the network."


def _lpips_network(config: VAETrainerConfig) -> PerceptualLoss:
    try:
        weights = local_weights(config.loss.perceptual.weights)
        return PerceptualLoss(PerceptualConfig(mode="lpips", weights=str(weights)))
    except DataError as error:
        raise PlanError(f"{_LPIPS_KEY}: {error}") from error


def _loss_has_lpips(config: VAETrainerConfig, plan: RunPlan) -> bool:
    weights: Iterator[Mapping[str, float]] = (phase.loss_weights for phase in plan.phases)
    is_used = any(weight["perceptual_weight"] > 0 for weight in weights)
    return is_used and config.loss.perceptual.mode == "lpips"


def _is_large_enough(bucket: BucketPlan) -> bool:
    return min(bucket.height, bucket.width) >= MIN_SIZE
