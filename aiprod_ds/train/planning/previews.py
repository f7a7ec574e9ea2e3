"""Whether the clips that a run samples fit beside what training holds: found on shapes, before it starts.

Asks for a lower bound, so that nothing is refused that could run: of training only what stays between updates
is counted, and of sampling only the transformer's forward pass. Called by `check --machine`.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.errors import PlanError
from aiprod_ds.planner.cost import recompute_of
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.memory import CONTEXT_BYTES, memory_use
from aiprod_ds.train.planning.trace import Shaped, Workloads


def require_fitting_previews(
    trainer: Shaped, plan: RunPlan, settings: DeepSpeedSettings, machine: Machine
) -> None:
    """Checks the shapes that prompts state themselves.

    Raises:
        PlanError: If a clip needs more memory than the GPU has.
    """
    problems = list(_problems(trainer, plan, settings, machine))
    if problems:
        raise PlanError(problems)


def _problems(trainer: Shaped, plan: RunPlan, settings: DeepSpeedSettings, machine: Machine) -> Iterator[str]:
    shapes = trainer.preview_shapes(plan)
    if not shapes:
        return
    workloads, phase = Workloads(trainer, plan, precision=settings.precision), plan.phases[-1]
    one = workloads.of(phase, 0, micro_batch_size=1, recompute=recompute_of(phase, settings))
    use = memory_use(
        one,
        settings,
        world_size=plan.world_size,
        accumulation=1,
        has_average=trainer.config.ema is not None,
    )
    held = use.weights + use.optimizer + use.average + CONTEXT_BYTES
    for where, bucket in shapes:
        needed = held + workloads.forward_bytes(phase, bucket)
        if needed > machine.memory_bytes:
            yield (
                f"{trainer.source}: {where}: must fit {machine.name} beside training, "
                f"{machine.memory_bytes / 1e9:.1f} GB, got at least {needed / 1e9:.1f} GB for "
                f"{bucket.length_text} {bucket.height}x{bucket.width}. Make it smaller or shorter."
            )
