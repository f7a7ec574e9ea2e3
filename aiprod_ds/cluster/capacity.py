"""Whether a run fits the GPUs of its hosts, before any rank is started.

Owns what the answers of the hosts say of their GPUs; what is judged, and the words, are
`aiprod_ds.train.planning.capacity`'s. Each rank asks the same once more when it starts, so what cannot be
found out here is left to it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiprod_ds.cluster.examine import Examined
from aiprod_ds.config.load import load_config
from aiprod_ds.config.trainers import trainer_class
from aiprod_ds.errors import AiprodError
from aiprod_ds.planner.hardware import Machine, machine_like

if TYPE_CHECKING:
    from aiprod_ds.cluster.start import Request

_LOG = logging.getLogger(__name__)


def require_capacity_of(found: Sequence[Examined], request: Request, *, world_size: int) -> None:
    """Checks all phases of a run that begins; one that goes on knows best where it stands.

    Args:
        found: Of the hosts.
        request: Of the launch.
        world_size: Ranks on all hosts.

    Raises:
        PlanError: If a phase needs more memory than the GPU has that has least.
    """
    machine = _machine(found)
    if machine is None or (
        request.resume != "never" and any(request.run_folder.glob("checkpoints/update_*"))
    ):
        return
    from aiprod_ds.config.deepspeed import read_settings
    from aiprod_ds.train.planning.capacity import (
        capacity_problems,
        stop_or_warn,
    )  # loads torch, which takes seconds

    folder, source = str(request.run_folder), str(request.config)
    try:
        config = load_config(request.config, request.overrides, folder, trust_code=request.trust_code)
        trainer = trainer_class(config.trainer)(config=config, source=source)
        plan, settings = trainer.plan(world_size=world_size), read_settings(config, source=source)
        problems = capacity_problems(trainer, plan, settings, machine)
    except AiprodError as error:  # a model may be on the hosts alone
        _LOG.info("capacity_not_estimated reason=%s", error)
        return
    stop_or_warn(problems, config)


def _machine(found: Sequence[Examined]) -> Machine | None:
    """Returns the GPU that has the least memory of those that ranks are on; None on CPUs."""
    machines = []
    for one in found:
        probe = one.probe or {}
        if probe.get("is_cpu_run", True):
            return None
        for slot in one.host.slots:
            gpu = probe["gpus"][slot]
            machines.append(
                machine_like(gpu["name"], tuple(gpu["capability"]), memory_bytes=gpu["memory_bytes"])
            )
    return min(machines, key=lambda machine: machine.memory_bytes, default=None)
