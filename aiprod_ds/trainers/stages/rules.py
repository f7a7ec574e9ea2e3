"""What of a configuration's stages cannot be trained, or would have no effect.

Owns the rules that need the model; those of a value or between values are the schema's. Called by `plan` of
both VAE trainers, so `check` finds all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from aiprod_ds.config.losses import AudioVAELossConfig, VideoVAELossConfig
from aiprod_ds.config.messages import suggestion
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.vae import WrappedVAE
from aiprod_ds.trainers.stages.latent_facts import LatentFacts, latent_facts
from aiprod_ds.trainers.stages.parts import PREFIX, frozen_names, matches

Loss = VideoVAELossConfig | AudioVAELossConfig


def stage_problems(loss: Loss, plan: RunPlan, *, module: WrappedVAE, clip: Tensor) -> Iterator[str]:
    """Yields problems as `dotted.path: rule, got X. Fix.`

    Args:
        loss: Section of the run.
        plan: The curriculum.
        module: Wraps the VAE; its tensors may be on the meta device.
        clip: A batch of one of the first phase on the meta device, in the type that the module takes.
    """
    try:
        facts = latent_facts(module, clip)
    except ConfigError as error:
        yield str(error)
        return
    names = [name for name, _ in module.named_parameters()]
    kept = []
    for phase in plan.phases:
        frozen = frozen_names(phase, module, facts)
        yield from _part_problems(phase, names, frozen, facts)
        is_kept = facts is not None and facts.depend_on <= frozen
        if is_kept:
            kept.append(phase)
        yield from _latent_problems(phase, facts, frozen, is_kept=is_kept)
    yield from _divergence_problems(loss, plan, facts, kept)


def _part_problems(
    phase: PhasePlan, names: Sequence[str], frozen: frozenset[str], facts: LatentFacts | None
) -> Iterator[str]:
    where = f"curriculum.phases[{phase.index}]"
    if phase.decoder_only and facts is None:
        yield (
            f"{where}.decoder_only: needs a model that runs without weights, so that it is seen what latents "
            "depend on, got one that does not. Name those layers in `frozen`."
        )
        return
    own = [name.removeprefix(PREFIX) for name in names]
    free = own
    if phase.decoder_only and facts is not None:
        free = [name.removeprefix(PREFIX) for name in names if name not in facts.depend_on]
    for number, pattern in enumerate(phase.frozen):
        if not any(matches(name, pattern) for name in own):
            yield (
                f"{where}.frozen[{number}]: must match a layer or a weight of the model, got {pattern!r}. "
                f"{suggestion(pattern, _layers(own))}"
            )
        elif not any(matches(name, pattern) for name in free):
            yield f"{where}.frozen[{number}]: has no effect beside decoder_only, got {pattern!r}. Remove it."
    if len(frozen) == len(names):
        key = "frozen" if phase.frozen else "decoder_only"
        yield (
            f"{where}.{key}: must leave something to train, got all {len(names)} weights of the model "
            "frozen. Freeze less."
        )


def _latent_problems(
    phase: PhasePlan, facts: LatentFacts | None, frozen: frozenset[str], *, is_kept: bool
) -> Iterator[str]:
    if phase.latents == "sample":
        return
    where = f"curriculum.phases[{phase.index}].latents"
    if facts is not None and not facts.has_posterior:
        yield f"{where}: has no effect on a model without a posterior, got {phase.latents}. Remove it."
    elif not is_kept:
        trained = sorted(facts.depend_on - frozen) if facts is not None else ()
        which = f", {trained[0].removeprefix(PREFIX)} for one" if trained else ""
        yield (
            f"{where}: has no effect where weights are trained that latents depend on{which}, got "
            f"{phase.latents}. Remove it, or set decoder_only."
        )


def _divergence_problems(
    loss: Loss, plan: RunPlan, facts: LatentFacts | None, kept: Sequence[PhasePlan]
) -> Iterator[str]:
    """Yields weights of a divergence that is not there or trains nothing; the default counts as not given."""
    if facts is None:
        return
    default = type(loss).model_fields["kl_weight"].default
    without = (
        "for a model without a posterior"
        if not facts.has_posterior
        else "where nothing is trained that latents depend on"
    )
    idle = plan.phases if not facts.has_posterior else kept
    if len(idle) == len(plan.phases) and loss.kl_weight not in (0, default):
        yield f"loss.kl_weight: has no effect {without}, got {loss.kl_weight:g}. Remove it."
    for phase in idle:
        weight = phase.loss_weights["kl_weight"]
        is_own = weight not in (0, default, loss.kl_weight) or "kl_weight" in phase.loss_ramps
        if is_own:
            got = "a weight that moves" if "kl_weight" in phase.loss_ramps else f"{weight:g}"
            yield (
                f"curriculum.phases[{phase.index}].loss.kl_weight: has no effect {without}, got {got}. "
                "Remove it."
            )
    pressed = [phase for phase in plan.phases if phase not in idle and phase.loss_weights["kl_weight"] > 0]
    if loss.kl_free_bits > 0 and not pressed:
        reason = without if len(idle) == len(plan.phases) else "without kl_weight"
        yield f"loss.kl_free_bits: has no effect {reason}, got {loss.kl_free_bits:g}. Remove it."


def _layers(names: Sequence[str]) -> set[str]:
    """Returns every parameter, and every layer that holds one."""
    return {
        ".".join(steps[:length])
        for steps in (name.split(".") for name in names)
        for length in range(1, len(steps) + 1)
    }
