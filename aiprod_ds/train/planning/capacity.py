"""Whether a run fits its GPUs, found on shapes before it starts.

Owns what is asked about: the GPUs of a table for `check --machine`, those that the ranks have for a run, and
those of the hosts for `launch`. How it is found, and what would fit, is `aiprod_ds.planner.capacity`. A model
that cannot run on shapes alone is not judged: nothing is refused because nothing is known.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.errors import AiprodError, PlanError
from aiprod_ds.planner.capacity import Capacity
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.search import search
from aiprod_ds.train.planning.auto import ResolvedRun, this_machine
from aiprod_ds.train.planning.estimate import estimator_of, settings_for
from aiprod_ds.train.planning.recompute import with_recompute
from aiprod_ds.train.planning.trace import Shaped

RequireCapacity = Callable[[ResolvedRun, Clock | None], None]
_LOG = logging.getLogger(__name__)


def require_capacity(
    trainer: Shaped,
    plan: RunPlan,
    settings: DeepSpeedSettings,
    machine: Machine,
    *,
    first: int = 0,
    is_chosen: bool = False,
) -> None:
    """Checks all phases from `first` on; with `engine.on_lack_of_memory: go_on` it warns.

    Args:
        plan: For as many GPUs; under `engine.parallel: auto` with what it has chosen, if it has.
        settings: As `plan`.
        is_chosen: Whether they are chosen already.

    Raises:
        PlanError: With one message for each phase that needs more memory than the GPU has.
    """
    problems = capacity_problems(trainer, plan, settings, machine, first=first, is_chosen=is_chosen)
    stop_or_warn(problems, trainer.config)


def stop_or_warn(problems: Sequence[str], config: RunConfig) -> None:
    """Does with what does not fit what the configuration says.

    Raises:
        PlanError: If there is any, unless it says to go on.
    """
    if problems and config.engine.on_lack_of_memory == "stop":
        raise PlanError(problems)
    for problem in problems:
        _LOG.warning("capacity %s", problem)


def capacity_problems(
    trainer: Shaped,
    plan: RunPlan,
    settings: DeepSpeedSettings,
    machine: Machine,
    *,
    first: int = 0,
    is_chosen: bool = False,
) -> list[str]:
    """Returns what does not fit, in words; see `require_capacity`."""
    config, where = trainer.config, trainer.source
    estimator = estimator_of(trainer, plan, machine, settings)
    settings_of = settings_for(settings, where=where)
    try:
        with torch.random.fork_rng(devices=[]):
            if config.engine.parallel == "auto" and not is_chosen:
                search(estimator, settings_of, where=where)
                return []
            plan, _ = with_recompute(config.performance, plan, settings, estimator)
            capacity = Capacity(
                estimator=estimator,
                plan=plan,
                settings=settings,
                settings_of=settings_of if config.engine.kind == "deepspeed" else None,
                is_chosen=is_chosen,
                places=_places(trainer, plan),
                where=where,
            )
            return capacity.problems(first=first)
    except PlanError as error:
        return list(error.problems)
    except AiprodError:
        raise
    except Exception as error:  # noqa: BLE001  a model of anyone's own may do anything on the meta device
        _LOG.warning("capacity_not_estimated reason=%s: %s", type(error).__name__, str(error)[:300])
        return []


def require_own_capacity(trainer: Shaped, resolved: ResolvedRun, resumed_at: Clock | None) -> None:
    """Checks what is left of a run against the GPUs of its ranks; on a CPU nothing. Collective.

    Args:
        trainer: Of the run.
        resolved: What it runs with.
        resumed_at: Where its checkpoint stands; phases before that one are not asked about.

    Raises:
        PlanError: See `require_capacity`; on every rank.
    """
    machine, is_chosen = this_machine(), resolved.choice is not None
    if machine is None or (is_chosen and resumed_at is None):  # that was just chosen because it fits
        return
    ranks = dist.gather_objects((socket.gethostname(), machine.memory_bytes, _host_bytes()))
    own, first = least_machine(machine, ranks), 0 if resumed_at is None else resumed_at.phase
    plan, settings = resolved.plan, resolved.settings
    dist.from_main(lambda: require_capacity(trainer, plan, settings, own, first=first, is_chosen=is_chosen))


def least_machine(machine: Machine, ranks: Sequence[tuple[str, int, int]]) -> Machine:
    """Returns `machine` with the least memory that any rank has.

    Args:
        ranks: Host, bytes of the GPU and bytes of the host's memory of each.
    """
    sharing = Counter(host for host, _, _ in ranks)
    return replace(
        machine,
        memory_bytes=min(memory for _, memory, _ in ranks),
        host_memory_bytes=min(of_host // sharing[host] for host, _, of_host in ranks),
    )


def _places(trainer: Shaped, plan: RunPlan) -> dict[tuple[int, int], str]:
    """Returns the dotted path of what holds each bucket's batch: the phase's own, unless buckets are
    listed."""
    listed = {path for path, _ in trainer.config.phase_shapes()}
    places = {}
    for phase in plan.phases:
        for index in range(len(phase.buckets)):
            own = f"curriculum.phases[{phase.index}].buckets[{index}]"
            places[phase.index, index] = own if own in listed else f"curriculum.phases[{phase.index}]"
    return places


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
