"""Whether every phase of a run fits a kind of GPU as it is configured, and which changes would make it fit.

Pure: each change that is named has been computed by the same estimate and fits. What `MemoryUse.needed` adds
to the peak is the margin. Called by `aiprod_ds.train.planning.capacity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.errors import EngineError, PlanError
from aiprod_ds.planner.cost import BucketCost, Estimator, recompute_in_words, recompute_of
from aiprod_ds.planner.memory import CONTEXT_BYTES, FRAGMENTATION
from aiprod_ds.planner.search import STAGES, search

SettingsOf = Callable[[int, bool], DeepSpeedSettings]
MARGIN = f"{100 * FRAGMENTATION:.0f} % and {CONTEXT_BYTES / 1e9:.1f} GB of it are a margin"
_NOTHING = (
    "Nothing that the planner can change makes it fit: take more or larger GPUs, smaller or shorter clips, "
    "or adapters"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Asks for one run, as it is configured.

    Attributes:
        estimator: Of the run on the kind of GPU in question.
        plan: All phases, with the micro-batches and the recomputation that they run with.
        settings: Of the engine.
        settings_of: Makes those of a ZeRO stage, with or without offload; None where the engine has none of
            it.
        is_chosen: Whether `engine.parallel: auto` has chosen what runs, so that nothing of it can be
            configured.
        places: Dotted path of what holds a bucket's batch, by phase and bucket.
        where: How messages name the run.
    """

    estimator: Estimator
    plan: RunPlan
    settings: DeepSpeedSettings
    settings_of: SettingsOf | None
    is_chosen: bool
    places: Mapping[tuple[int, int], str]
    where: str

    def problems(self, *, first: int = 0) -> list[str]:
        """Returns one message for each phase that does not fit: what it needs, what there is, what would
        fit.

        Args:
            first: Index of the first phase that is still to run.
        """
        found = [
            (phase, costs)
            for phase in self.plan.phases[first:]
            if (costs := [cost for cost in self._costs(phase, self.settings) if not cost.fits])
        ]
        of_all = [*self._of_all_phases(first)] if found else []
        return [self._message(phase, costs, of_all) for phase, costs in found]

    def _costs(self, phase: PhasePlan, settings: DeepSpeedSettings) -> list[BucketCost]:
        own = recompute_of(phase, settings)
        return [
            self.estimator.cost(phase, index, settings, recompute=own) for index in range(len(phase.buckets))
        ]

    def _message(self, phase: PhasePlan, costs: Sequence[BucketCost], of_all: Sequence[str]) -> str:
        machine = self.estimator.machine
        most = max(costs, key=lambda cost: (cost.memory.needed > machine.memory_bytes, cost.memory.needed))
        needs = f"{most.memory.needed / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB"
        if most.memory.host > machine.host_memory_bytes:
            needs += (
                f" and, of the host's memory for each GPU, {most.memory.host / 1e9:.1f} of "
                f"{machine.host_memory_bytes / 1e9:.1f} GB"
            )
        ways = [*([] if self.is_chosen else self._ways(phase, costs)), *of_all]
        return (
            f"{self.where}: curriculum.phases[{phase.index}] ({phase.name}): must fit {machine.name}, got "
            f"{most.shape}, which by the estimate needs {needs} ({_engine_in_words(most)}, micro-batch "
            f"{most.micro_batch_size}, recomputation {recompute_in_words(most.recompute)}; {MARGIN}). "
            + (f"By the same estimate it fits with {'; or with '.join(ways)}" if ways else _NOTHING)
            + ". Or go on all the same: engine.on_lack_of_memory: go_on."
        )

    def _ways(self, phase: PhasePlan, costs: Sequence[BucketCost]) -> Iterator[str]:
        """Yields what can be changed in the phase alone: one thing, or both where one is not enough."""
        now = recompute_of(phase, self.settings)
        key, found = f"curriculum.phases[{phase.index}].activation_checkpointing: true", False
        recomputed = [] if now == 1 else self._recomputed(phase)
        if recomputed and all(cost.fits for cost in recomputed):
            yield f"{key} ({_most(recomputed)} GB)"
            found = True
        if (smaller := self._smaller(phase, costs, recompute=now)) is not None:
            yield smaller
            found = True
        if (
            recomputed
            and not found
            and (smaller := self._smaller(phase, recomputed, recompute=1)) is not None
        ):
            yield f"{key} and {smaller}"

    def _recomputed(self, phase: PhasePlan) -> list[BucketCost]:
        """Returns the phase with its blocks computed again; nothing where it has none."""
        try:
            return [
                self.estimator.cost(phase, index, self.settings, recompute=1)
                for index in range(len(phase.buckets))
            ]
        except EngineError:
            return []

    def _smaller(self, phase: PhasePlan, costs: Sequence[BucketCost], *, recompute: int) -> str | None:
        """Returns the largest micro-batches that fit, of the same global batches; None if some bucket has
        none."""
        changes, needed = [], 0.0
        for cost in (cost for cost in costs if not cost.fits):
            fitting = self._largest(phase, cost, recompute=recompute)
            if fitting is None:
                return None
            needed = max(needed, fitting.memory.needed)
            place = self.places[phase.index, cost.bucket]
            changes.append(
                f"{place}.micro_batch_size: {fitting.micro_batch_size} and {place}.accumulation: "
                f"{fitting.accumulation}"
            )
        return f"{' and '.join(changes)} ({needed / 1e9:.1f} GB)"

    def _largest(self, phase: PhasePlan, cost: BucketCost, *, recompute: int) -> BucketCost | None:
        own = cost.micro_batch_size * cost.accumulation
        for size in sorted(
            (size for size in range(1, cost.micro_batch_size) if own % size == 0), reverse=True
        ):
            smaller = self.estimator.cost(
                phase, cost.bucket, self.settings, recompute=recompute, micro_batch_size=size
            )
            if smaller.fits:
                return smaller
        return None

    def _of_all_phases(self, first: int) -> Iterator[str]:
        """Yields what changes the engine under all phases, or chooses for all of them."""
        if self.is_chosen:
            yield "another number of GPUs, for which engine.parallel: auto chooses anew"
        elif self.settings_of is not None:
            yield from self._other_engines(first, self.settings_of)
            yield from self._choice(self.settings_of)

    def _other_engines(self, first: int, settings_of: SettingsOf) -> Iterator[str]:
        """Yields the least sharding, and the least offload, with which all phases fit as they are."""
        (stage_now, offloaded_now), told = (self.settings.zero_stage, self.settings.optimizer_offload), set()
        for stage, is_offloaded in STAGES:
            is_more = is_offloaded > offloaded_now or (is_offloaded == offloaded_now and stage > stage_now)
            if not is_more or is_offloaded in told:
                continue
            settings = settings_of(stage, is_offloaded)
            costs = [cost for phase in self.plan.phases[first:] for cost in self._costs(phase, settings)]
            if all(cost.fits for cost in costs):
                told.add(is_offloaded)
                yield f"{_engine_in_words(costs[0])} in engine.deepspeed_config ({_most(costs)} GB)"

    def _choice(self, settings_of: SettingsOf) -> Iterator[str]:
        try:
            choice = search(self.estimator, settings_of, where=self.where)
        except PlanError:
            return
        settings = settings_of(choice.zero_stage, choice.is_offloaded)
        costs = [cost for phase in choice.applied(self.plan).phases for cost in self._costs(phase, settings)]
        yield (
            "engine.parallel: auto and no micro_batch_size, accumulation or activation_checkpointing in the "
            f"phases ({_engine_in_words(costs[0])}, {_most(costs)} GB)"
        )


def _engine_in_words(cost: BucketCost) -> str:
    return f"ZeRO-{cost.zero_stage}" + (" with an offloaded optimizer" if cost.is_offloaded else "")


def _most(costs: Sequence[BucketCost]) -> str:
    return f"{max(cost.memory.needed for cost in costs) / 1e9:.1f}"
