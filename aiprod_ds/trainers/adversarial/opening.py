"""From a configuration to an adversary, and what stands against it before training.

Owns the rules that need the phases, the model's last layer or the settings of the engine; those of the
section alone are the schema's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.losses import (
    AdversarialConfig,
    AudioAdversarialConfig,
    ReconstructionLossConfig,
    VideoAdversarialConfig,
)
from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.models.discriminators.judgement import Discriminators
from aiprod_ds.models.discriminators.patch import smallest_side
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.engines import decay_groups, engine_of
from aiprod_ds.trainers.adversarial.adversary import Adversary
from aiprod_ds.trainers.adversarial.critic import Critic
from aiprod_ds.trainers.adversarial.last_layer import LastLayer, is_layer, layers_run

_WHERE = "loss.adversarial"
_WEIGHTS = ("adversarial_weight", "feature_matching_weight")
_MOST_PARTITIONED = 2


def open_adversary(
    config: RunConfig,
    adversarial: AdversarialConfig,
    settings: DeepSpeedSettings,
    *,
    plan: RunPlan,
    build: Callable[[], Discriminators],
    last_layer: LastLayer | None,
) -> Adversary:
    """Returns the discriminator's side of a run, with an engine of its own. Collective.

    The engine has the kind of the model's, and its ZeRO stage but for 3: a small network gains nothing from
    weights that are gathered, and R1 differentiates through them twice. It computes in bf16 if the model
    does, otherwise in fp32: in fp16 the gradient of a mean over many pixels is 0, and a second loss scale
    would skip other updates than the first.

    Args:
        config: Of the run.
        adversarial: Its section.
        settings: Of the model's engine.
        plan: The curriculum.
        build: Makes the discriminators with weights from torch's own stream.
        last_layer: Of the decoder, where `adaptive` asks for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "discriminator"))
        critic = Critic(build(), adversarial)
    own = adversarial.optimizer
    engine = engine_of(
        critic,
        decay_groups(critic),
        config,
        optimizer=OptimizerConfig(
            betas=own.betas,
            epsilon=own.epsilon,
            weight_decay=own.weight_decay,
            gradient_clip_norm=own.gradient_clip_norm,
        ),
        settings=_own_settings(settings),
        plan=plan,
    )
    engine.train()
    return Adversary(
        critic, engine, adversarial, last_layer=last_layer, start_phase=_start_phase(adversarial, plan)
    )


def choose_last_layer(module: nn.Module, clip: Tensor, adversarial: AdversarialConfig) -> LastLayer | None:
    """Returns the last layer that `adaptive` measures at, of a module that no engine has; None if it does
    not.

    Args:
        module: Wraps the VAE.
        clip: A batch of one, on the meta device.
        adversarial: After `adversary_problems` has found nothing.
    """
    if adversarial.adaptive != "last_layer":
        return None
    named = adversarial.last_layer
    name = f"vae.{named}" if named is not None else next(reversed(layers_run(module, clip) or {}))
    return LastLayer(module, name)


def adversary_problems(
    config: RunConfig, loss: ReconstructionLossConfig, plan: RunPlan, *, module: nn.Module, clip: Tensor
) -> Iterator[str]:
    """Yields what cannot be trained, as `dotted.path: rule, got X. Fix.`; nothing without a discriminator.

    Args:
        config: Of the run.
        loss: Its loss section.
        plan: The curriculum.
        module: Wraps the VAE; its tensors may be on the meta device.
        clip: A batch of one of the first phase, on the meta device.
    """
    adversarial = getattr(loss, "adversarial", None)
    if not isinstance(adversarial, AdversarialConfig):
        return
    if adversarial.start_phase is not None:
        names = [phase.name for phase in plan.phases]
        if adversarial.start_phase not in names:
            yield (
                f"{_WHERE}.start_phase: must name a phase, got {adversarial.start_phase!r}. "
                f"{suggestion(adversarial.start_phase, names)}"
            )
            return
    yield from _time_problems(config, adversarial, plan)
    if adversarial.adaptive == "last_layer":
        yield from _layer_problems(adversarial, module, clip)
    for phase in plan.phases[_start_phase(adversarial, plan) or 0 :]:
        for number, bucket in enumerate(phase.buckets):
            where = f"curriculum.phases[{phase.index}]"
            yield from _size_problems(adversarial, bucket, f"{where}.buckets[{number}]" if number else where)
    if config.engine.parallel == "auto":
        yield (
            "engine.parallel: must be configured with loss.adversarial, whose memory the estimates do not "
            "know, got auto. Choose the ZeRO stage and the batches yourself."
        )
    if config.performance.graphs == "passes":
        yield (
            "performance.graphs: must be off or auto with loss.adversarial, whose loss trains a second "
            "network and waits for other ranks, got passes. Set auto."
        )


def _start_phase(adversarial: AdversarialConfig, plan: RunPlan) -> int | None:
    if adversarial.start_phase is None:
        return None
    return next(phase.index for phase in plan.phases if phase.name == adversarial.start_phase)


def _time_problems(config: RunConfig, adversarial: AdversarialConfig, plan: RunPlan) -> Iterator[str]:
    """Yields what comes too late to have an effect; phases that end by epochs alone have no known length."""
    limits = [phase.limit_updates for phase in config.curriculum.phases]
    first = _start_phase(adversarial, plan)
    known = _total(limits[first or 0 :])
    start = adversarial.start_update or 0
    if first is None and known is not None and start >= known:
        yield (
            f"{_WHERE}.start_update: must be below the updates of the run ({known}), got {start}. Lower it."
        )
        return
    felt = start + adversarial.warmup_updates
    if known is not None and felt >= known:
        yield (
            f"{_WHERE}.warmup_updates: must leave updates in which the model is trained against the "
            f"discriminator, got {adversarial.warmup_updates} of the {known - start} after its start. Lower "
            "it."
        )
        return
    phases = [phase for phase in plan.phases if phase.index >= (first or 0)]
    # Of those the ones that are still running when the model begins to feel it.
    felt_in = [
        phase
        for place, phase in enumerate(phases)
        if (end := _total(limits[first or 0 :][: place + 1])) is None or end > felt
    ]
    if not any(phase.loss_weights[name] > 0 for phase in felt_in for name in _WEIGHTS):
        yield (
            "loss.adversarial_weight: this or loss.feature_matching_weight must exceed 0 in a phase after "
            f"the discriminator's start, got 0 in {_names(felt_in)}. Raise one of them."
        )
    elif adversarial.adaptive != "off" and not any(
        phase.loss_weights["adversarial_weight"] > 0 for phase in felt_in
    ):
        yield (
            f"{_WHERE}.adaptive: has no effect without adversarial_weight, got {adversarial.adaptive}. Set "
            "off."
        )


def _layer_problems(adversarial: AdversarialConfig, module: nn.Module, clip: Tensor) -> Iterator[str]:
    run, named = layers_run(module, clip), adversarial.last_layer
    if named is None:
        if not run:
            yield (
                f"{_WHERE}.last_layer: must be given for a model that does not run without weights, got "
                "null. Name the decoder's last convolution, or set adaptive to output."
            )
        return
    name = f"vae.{named}"
    if not is_layer(module, name) or (run is not None and name not in run):
        known = [each.removeprefix("vae.") for each in run or {}]
        last = f" The one that runs last is {known[-1]}." if known else ""
        yield (
            f"{_WHERE}.last_layer: must name a convolution or linear layer that reconstructing runs, got "
            f"{named!r}.{last}"
        )


def _size_problems(adversarial: AdversarialConfig, bucket: BucketPlan, where: str) -> Iterator[str]:
    if isinstance(adversarial, VideoAdversarialConfig):
        members = {"patch_3d": adversarial.patch_3d, "frame_2d": adversarial.frame_2d}
        for key, member in members.items():
            least = 1 if member is None else smallest_side(member)
            if min(bucket.height, bucket.width) < least:
                yield (
                    f"{where}.resolution: must have sides of at least {least} for {_WHERE}.{key} with "
                    f"{member.layers if member else 0} layers, got {bucket.height}x{bucket.width}. Lower "
                    "layers."
                )
    elif isinstance(adversarial, AudioAdversarialConfig):
        longest = {
            "stft.fft_sizes": max(adversarial.stft.fft_sizes) if adversarial.stft else 0,
            "period.periods": max(adversarial.period.periods) + 1 if adversarial.period else 0,
        }
        for key, least in longest.items():
            if bucket.frames < least:
                yield (
                    f"{where}.duration: must give at least {least} samples for {_WHERE}.{key}, got "
                    f"{bucket.frames}. Lengthen its clips, or remove the longest of them."
                )


def _total(limits: Sequence[int | None]) -> int | None:
    """Returns the sum; None if one of them is not known."""
    return None if None in limits else sum(limit for limit in limits if limit is not None)


def _names(phases: Sequence[PhasePlan]) -> str:
    return ", ".join(phase.name for phase in phases)


def _own_settings(settings: DeepSpeedSettings) -> DeepSpeedSettings:
    stage = min(settings.zero_stage, _MOST_PARTITIONED)
    values: dict[str, object] = {"zero_optimization": {"stage": stage}}
    if settings.precision == "bf16":
        values["bf16"] = {"enabled": True}
        if stage == _MOST_PARTITIONED:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
    return parse_deepspeed_settings(values, where=_WHERE)
