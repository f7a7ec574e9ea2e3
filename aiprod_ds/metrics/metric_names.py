"""The one table of metrics: name, unit, digits, meaning, which way is good, and how ranks are put together.

The recorder, the console, the plots, the report, the check of `keep_best` and the reference in the
documentation all read it. A metric that is not here is refused, except `loss/<term>` and
`evaluation/<measure>`, which trainers with their own losses and measures may add.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum


class Reduction(Enum):
    """How the values of all ranks become one."""

    MEAN = "mean"
    SUM = "sum"
    SAME = "same on all ranks"


class Better(Enum):
    """Which values of a metric are good."""

    HIGHER = "higher"
    LOWER = "lower"
    NEAR_ONE = "near one"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table.

    Attributes:
        name: `group/what`, as it stands in metrics.jsonl.
        unit: Unit of the value; `1` for a plain number.
        meaning: One sentence for the documentation.
        reduction: How ranks are put together.
        label: Short form for the progress line, the plots and the report.
        digits: Behind the point, where a value is printed to be read.
        better: Which way is good; what a judgement of a run rests on.
    """

    name: str
    unit: str
    meaning: str
    reduction: Reduction
    label: str
    digits: int = 4
    better: Better = Better.UNKNOWN


def _metric(name: str, unit: str, reduction: Reduction, label: str, meaning: str) -> Metric:
    return Metric(name=name, unit=unit, reduction=reduction, label=label, meaning=meaning)


_MEAN, _SUM, _SAME = Reduction.MEAN, Reduction.SUM, Reduction.SAME

METRICS: tuple[Metric, ...] = (
    _metric("loss/total", "1", _MEAN, "loss", "Weighted sum of all terms: what the gradient is taken of."),
    _metric(
        "loss/reconstruction_l1", "1", _MEAN, "L1", "Mean absolute error between input and reconstruction."
    ),
    _metric(
        "loss/reconstruction_mse", "1", _MEAN, "MSE", "Mean squared error between input and reconstruction."
    ),
    _metric(
        "loss/kl", "nat", _MEAN, "KL", "Divergence of the posterior from a unit Gaussian, before its weight."
    ),
    _metric(
        "loss/kl_free_bits",
        "nat",
        _MEAN,
        "KL above free bits",
        "The divergence with the floor of `kl_free_bits` in each channel, which is trained in its place.",
    ),
    _metric("loss/perceptual", "1", _MEAN, "perceptual", "Distance of VGG16 features, before its weight."),
    _metric("loss/haar", "1", _MEAN, "Haar", "L1 between one-level 3-D Haar sub-bands, before its weight."),
    _metric(
        "loss/frame_difference",
        "1",
        _MEAN,
        "frame difference",
        "L1 between the differences of neighbouring frames, before its weight.",
    ),
    _metric(
        "loss/flicker",
        "1",
        _MEAN,
        "flicker",
        "L1 between how much 8x8 patches change from frame to frame, before its weight.",
    ),
    _metric(
        "loss/adversarial",
        "1",
        _MEAN,
        "adversarial",
        "What the discriminator makes of reconstructions, as the model minimises it, before its weight.",
    ),
    _metric(
        "loss/feature_matching",
        "1",
        _MEAN,
        "feature matching",
        "L1 between the discriminator's features of clip and reconstruction, before its weight.",
    ),
    _metric(
        "loss/discriminator",
        "1",
        _MEAN,
        "discriminator",
        "What the discriminator minimises, without its regularisers; no part of `loss/total`.",
    ),
    _metric(
        "loss/lecam", "1", _MEAN, "LeCAM", "LeCAM's regulariser of the discriminator, before its weight."
    ),
    _metric(
        "loss/r1",
        "1",
        _MEAN,
        "R1",
        "Half the squared gradient of the discriminator at the data, where it is computed.",
    ),
    _metric(
        "loss/waveform_l1", "1", _MEAN, "waveform", "Mean absolute error between input and decoded waveform."
    ),
    _metric(
        "loss/spectral",
        "1",
        _MEAN,
        "spectral",
        "Magnitude plus log-magnitude L1 of STFTs, before its weight.",
    ),
    _metric("loss/mel", "1", _MEAN, "mel", "L1 between log-mel spectrograms, before its weight."),
    _metric(
        "loss/video",
        "1",
        _MEAN,
        "video",
        "Mean squared error of the velocity of video latents, before its weight.",
    ),
    _metric(
        "loss/audio",
        "1",
        _MEAN,
        "audio",
        "Mean squared error of the velocity of audio latents, before its weight.",
    ),
    _metric("latent/mean", "1", _MEAN, "latent mean", "Mean of the posterior mean over all latent elements."),
    _metric(
        "latent/std", "1", _MEAN, "latent std", "Standard deviation of the posterior mean over all elements."
    ),
    _metric(
        "latent/collapsed_share",
        "1",
        _MEAN,
        "collapsed",
        "Share of latent channels with less than 0.01 nat of KL.",
    ),
    _metric(
        "discriminator/real_accuracy",
        "1",
        _MEAN,
        "real accuracy",
        "Share of the discriminator's logits of data that are on the side of data.",
    ),
    _metric(
        "discriminator/fake_accuracy",
        "1",
        _MEAN,
        "fake accuracy",
        "Share of the discriminator's logits of reconstructions that are on the side of reconstructions.",
    ),
    _metric(
        "discriminator/adaptive_weight",
        "1",
        _MEAN,
        "adaptive weight",
        "Factor of `adversarial_weight`; 1 without `adaptive`.",
    ),
    _metric(
        "discriminator/gradient_ratio",
        "1",
        _MEAN,
        "gradient ratio",
        "Norm of the weighed adversarial gradient over that of the other terms, where `adaptive` measures.",
    ),
    _metric(
        "discriminator/gradient_norm",
        "1",
        _SAME,
        "discriminator's gradient norm",
        "Global L2 norm of the discriminator's gradient before clipping.",
    ),
    _metric(
        "discriminator/learning_rate",
        "1",
        _SAME,
        "discriminator's rate",
        "Learning rate of the discriminator in this update.",
    ),
    _metric(
        "gradient/norm",
        "1",
        _SAME,
        "gradient norm",
        "Global L2 norm of the gradient before clipping, unscaled.",
    ),
    _metric(
        "gradient/clip_norm",
        "1",
        _SAME,
        "clip norm",
        "Norm at which this update was clipped, with an adaptive clip.",
    ),
    _metric(
        "gradient/loss_scale",
        "1",
        _SAME,
        "loss scale",
        "Scale of the loss in the backward pass; 1 outside fp16.",
    ),
    _metric("learning_rate", "1", _SAME, "learning rate", "Learning rate of this update."),
    _metric(
        "time/update_seconds",
        "s",
        _MEAN,
        "update time",
        "Wall time of one update, without pauses between updates.",
    ),
    _metric(
        "time/data_wait_seconds", "s", _MEAN, "data wait", "Part of the update spent waiting for the loader."
    ),
    _metric(
        "time/phase_change_seconds",
        "s",
        _MEAN,
        "phase change",
        "From a phase's last update to the next one's first.",
    ),
    _metric(
        "throughput/clips_per_second", "clips/s", _SUM, "clips/s", "Training clips per second over all ranks."
    ),
    _metric("throughput/updates_per_second", "updates/s", _MEAN, "updates/s", "Updates per second."),
    _metric(
        "throughput/tokens_per_second",
        "tokens/s",
        _SUM,
        "tokens/s",
        "Training tokens of all modalities per second over all ranks.",
    ),
    _metric(
        "throughput/tflops_per_device",
        "TFLOP/s",
        _MEAN,
        "TFLOP/s",
        "FLOPs per second of one device, 1e12, that the model is credited with; recomputing is not counted.",
    ),
    _metric(
        "throughput/mfu",
        "1",
        _MEAN,
        "MFU",
        "Share of the data sheet's peak in matrix products of the precision that is credited.",
    ),
    _metric("memory/rss_bytes", "B", _MEAN, "host memory", "Resident memory of a rank's process."),
    _metric(
        "memory/device_peak_bytes",
        "B",
        _MEAN,
        "device memory",
        "Highest device memory of a rank in this phase.",
    ),
    _metric(
        "data/replaced_clips",
        "clips",
        _SAME,
        "replaced clips",
        "Training clips that could not be read and are replaced, as the last checkpoint has them.",
    ),
    _metric("clock/phase", "1", _SAME, "phase", "Index of the curriculum phase, from 0."),
    _metric("clock/epoch", "1", _SAME, "epoch", "Completed passes over this phase's data."),
    _metric(
        "clock/samples", "clips", _SAME, "samples", "Clips seen by all ranks together in applied updates."
    ),
    _metric(
        "clock/skipped_updates",
        "updates",
        _SAME,
        "skipped",
        "Updates computed but not applied (fp16 overflow).",
    ),
    _metric(
        "clock/rollbacks",
        "1",
        _SAME,
        "rollbacks",
        "Spikes whose data was left out on the way to this update; from the first one on.",
    ),
    *(
        Metric(
            name=f"evaluation/{name}",
            unit=unit,
            meaning=meaning,
            reduction=_SAME,
            label=label,
            digits=digits,
            better=better,
        )
        # In the order of importance: the first that a run has is its headline.
        for name, unit, digits, better, label, meaning in (
            (
                "loss",
                "1",
                4,
                Better.LOWER,
                "loss",
                "Weighted sum of the losses of all modalities on held-out clips, at fixed noise levels.",
            ),
            (
                "video_loss",
                "1",
                4,
                Better.LOWER,
                "video loss",
                "Loss of video latents on held-out clips, mean over fixed noise levels.",
            ),
            (
                "audio_loss",
                "1",
                4,
                Better.LOWER,
                "audio loss",
                "Loss of audio latents on held-out clips, mean over fixed noise levels.",
            ),
            (
                "psnr_db",
                "dB",
                2,
                Better.HIGHER,
                "PSNR",
                "Peak signal-to-noise ratio on held-out clips, peak 1 on [0, 1].",
            ),
            ("ssim", "1", 4, Better.HIGHER, "SSIM", "Structural similarity on held-out clips."),
            (
                "lpips_vgg",
                "1",
                4,
                Better.LOWER,
                "LPIPS",
                "Distance of VGG16 features of the frames of held-out clips, with learned weights.",
            ),
            (
                "rfvd",
                "1",
                1,
                Better.LOWER,
                "rFVD",
                "Fréchet distance of the features of held-out clips and their reconstructions.",
            ),
            (
                "flicker_error",
                "1",
                4,
                Better.LOWER,
                "flicker error",
                "Mean error of the change from frame to frame on held-out clips, on [0, 1].",
            ),
            (
                "flicker_ratio",
                "1",
                3,
                Better.NEAR_ONE,
                "flicker ratio",
                "Change from frame to frame of reconstructions over that of originals.",
            ),
            (
                "mel_distance",
                "1",
                3,
                Better.LOWER,
                "mel distance",
                "Distance of mel bands on held-out sounds, as DAC measures it.",
            ),
            (
                "stft_distance",
                "1",
                3,
                Better.LOWER,
                "STFT distance",
                "Distance of STFTs on held-out sounds, as DAC measures it.",
            ),
            (
                "si_sdr_db",
                "dB",
                2,
                Better.HIGHER,
                "SI-SDR",
                "Scale-invariant signal-to-distortion ratio on held-out sounds.",
            ),
            (
                "visqol",
                "1",
                2,
                Better.HIGHER,
                "ViSQOL",
                "Predicted opinion score of held-out sounds, 1 to about 4.7.",
            ),
            (
                "log_mel_l1",
                "1",
                3,
                Better.LOWER,
                "log-mel error",
                "Mean error of log-mel spectrograms (mel models).",
            ),
        )
    ),
)

_BY_NAME = {metric.name: metric for metric in METRICS}
_OPEN_GROUPS = {"loss": _MEAN, "evaluation": _SAME}
# Of measures that a trainer of one's own adds.
_WAYS = (
    (re.compile(r"loss|distance|error|_l1|_l2|_mse|fvd|fad|fid|lpips"), Better.LOWER),
    (re.compile(r"psnr|ssim|sdr|accuracy|score|visqol|pesq|stoi"), Better.HIGHER),
)


def find_metric(name: str) -> Metric:
    """Returns the row of `name`; terms of open groups that are not listed get a row of their own.

    Raises:
        ValueError: If the name is neither listed nor in an open group.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    group, _, term = name.partition("/")
    if group in _OPEN_GROUPS and term:
        unit, label = "dB" if term.endswith("_db") else "1", term.replace("_", " ")
        added = _metric(name, unit, _OPEN_GROUPS[group], label, "Added by the trainer of this run.")
        ways = (way for pattern, way in _WAYS if pattern.search(term))
        return replace(added, better=next(ways, Better.UNKNOWN))
    raise ValueError(
        "metrics: a name must stand in aiprod_ds.metrics.metric_names or be loss/<term> or "
        f"evaluation/<measure>, got {name!r}. "
        "Add a row."
    )


def find_measure(name: str) -> Metric:
    """Returns the row of a held-out measure, named without `evaluation/`."""
    return find_metric(f"evaluation/{name}")


def is_listed(name: str) -> bool:
    """Returns whether a held-out measure has a row of its own in the table."""
    return f"evaluation/{name}" in _BY_NAME


def measure_order(name: str) -> tuple[int, str]:
    """Sorts held-out measures: those of the table first, in its order, then others by name."""
    names = list(_BY_NAME)
    return (names.index(f"evaluation/{name}") if is_listed(name) else len(names), name)


def table_markdown() -> str:
    """Returns the table as Markdown, for the documentation."""
    rows = ["| metric | unit | over ranks | meaning |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.unit} | {m.reduction.value} | {m.meaning} |" for m in METRICS]
    return "\n".join(rows) + "\n"
