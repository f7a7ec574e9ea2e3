"""What the phases of a run train of a VAE, and what its unit does for that.

Owns which parameters a pattern names, the weights of the loss in an update, and the values that weights had
before an engine made them 16 bits long. What stands against a configuration is `rules.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.models.vae import WrappedVAE
from aiprod_ds.trainers.stages.latent_facts import LatentFacts, latent_facts

PREFIX = "vae."
"""Of the model's parameters in the module around it."""


class TrainedParts:
    """The stages of one run.

    Args:
        module: Before an engine takes it; its tensors may be on the meta device.
        plan: The phases.
        clip: A batch of one on the meta device, in the type that the module takes.
    """

    def __init__(self, module: WrappedVAE, plan: RunPlan, clip: Tensor) -> None:
        self._module = module
        self._is_staged = any(phase.decoder_only or phase.frozen for phase in plan.phases)
        self._facts = latent_facts(module, clip) if self._is_staged else None
        self._frozen = {phase.index: frozen_names(phase, module, self._facts) for phase in plan.phases}
        self._trained: tuple[str, ...] = ()
        never = frozenset.intersection(*self._frozen.values())
        self._originals = _copies(module, never)

    def prepare(self, phase: PhasePlan) -> None:
        """Marks what `phase` trains. Call it while no engine holds the module."""
        if self._is_staged:
            known = frozenset() if self._facts is None else self._facts.depend_on
            self._module.freeze(self._frozen[phase.index], latents_depend_on=known)
            # An engine may hold them under other names, as parts of flat parameters.
            named = self._module.named_parameters()
            self._trained = tuple(name for name, parameter in named if parameter.requires_grad)

    def keeps_latents(self, phase: PhasePlan) -> bool:
        """Returns whether nothing is trained in `phase` that latents depend on."""
        facts = self._facts
        return facts is not None and facts.depend_on <= self._frozen[phase.index]

    def takes_mode(self, phase: PhasePlan) -> bool:
        """Returns whether the decoder gets the posterior's mode and no draw."""
        return phase.latents == "mode" and self.keeps_latents(phase)

    def weights(self, phase: PhasePlan, position: int) -> dict[str, float]:
        """Returns the weights of the loss in one update; that of the divergence is 0 where latents stay what
        they are.

        Args:
            phase: Of the update.
            position: Of its global batch in the data of the phase.
        """
        found = phase.weights_at(position)
        return {**found, "kl_weight": 0.0} if self.keeps_latents(phase) else found

    def originals(self) -> Mapping[str, Tensor]:
        """Returns what no phase trains as it was before an engine took it, by name in the module; on the main
        rank, elsewhere nothing."""
        return self._originals

    def hand_off(self, engine: Engine) -> WeightHandoff:
        """Returns the masters of what is trained. Collective.

        The rest needs no carrying: it stays in the module, in the type that it was computed with.
        """
        values = WeightHandoff()
        for name in self._trained:
            values.add(name, engine.read_value(name))
        return values


def frozen_names(phase: PhasePlan, module: WrappedVAE, facts: LatentFacts | None) -> frozenset[str]:
    """Returns which parameters of `module`, as it came from its maker, are not trained in `phase`."""
    latents: Collection[str] = facts.depend_on if facts is not None and phase.decoder_only else ()
    return frozenset(
        name
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
        or name in latents
        or any(matches(name.removeprefix(PREFIX), pattern) for pattern in phase.frozen)
    )


def matches(name: str, pattern: str) -> bool:
    """Returns whether `pattern` is of a parameter or of a layer that it lies in.

    Example: `decoder.blocks.0.conv.weight` is matched by itself, `decoder`, `decoder.blocks.0`, `*.conv` and
    `decoder.blocks.[01]`, and not by `blocks`.
    """
    steps = name.split(".")
    return any(fnmatchcase(".".join(steps[:length]), pattern) for length in range(1, len(steps) + 1))


@torch.no_grad()
def answer(engine: Engine, clip: Tensor) -> Tensor:
    """Returns what the module makes of a batch of one with the posterior's mode: reconstruction and mean in
    one vector, fp32 on the CPU. Collective."""
    engine.eval()
    output, mean, _ = engine(clip.to(engine.device))
    engine.train()
    return torch.cat([output.float().flatten().cpu(), mean.float().flatten().cpu()])


def as_before(state: dict[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` with `originals` in place of what an engine made of them.

    A value that is not its original in its own type stays: it came from a checkpoint of other weights.
    """
    exact = {
        name: value
        for name, value in originals.items()
        if name in state and torch.equal(value.to(state[name].dtype), state[name])
    }
    return {**state, **exact}


def _copies(module: WrappedVAE, names: Collection[str]) -> dict[str, Tensor]:
    if not dist.is_main():
        return {}
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if name in names and not parameter.is_meta
    }
