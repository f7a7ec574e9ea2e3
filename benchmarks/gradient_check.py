"""Whether a fast loop computes the gradients of a plain one: looked at before any figure of it is written.

Both are given the same weights and the same batch. The oracle is eager autograd of the uncompiled model in
the same type with torch's own attention, its blocks recomputed to save memory, which changes no bit. What is
compared is Adam's first moment after the first update, m = (1 - beta1) * c * g with the clipping factor c:
every engine has it for every parameter, whatever it does to gradients on the way, so reduction, flattening,
clipping and capture are seen too.

The differences are ||found - expected|| / ||expected|| of every parameter (`gradient_errors`). A gradient
that is lost makes 1, one that is counted twice 1, one of two halves 0.5; rounding of another order of the
same products makes a few hundredths in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workload import Choices, Shape, Workload

from aiprod_ds.clock import Clock
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.snapshot import Snapshot
from aiprod_ds.testing.gradients import gradient_errors
from aiprod_ds.trainers.base import Trainer

TOLERANCES = {"fp32": 1e-3, "bf16": 0.15}
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The largest difference of a parameter's gradient, and whose it is."""

    name: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Gradients of one batch by plain autograd.

    Attributes:
        gradients: By name, on the host.
        precision: In which they were computed.
    """

    gradients: Mapping[str, Tensor]
    precision: str

    def compare(self, moments: Mapping[str, Tensor], *, beta1: float, is_clipped: bool, case: str) -> Worst:
        """Returns the worst of all parameters.

        Args:
            moments: Adam's first, after one update, by the same names.
            beta1: Of that Adam.
            is_clipped: Whether the gradients were scaled down to a norm of `CLIP_NORM`.
            case: Whose they are, for the message.

        Raises:
            SystemExit: If a gradient differs by more than the tolerance of the precision.
        """
        device = next(iter(moments.values())).device
        expected = {name: value.to(device) for name, value in self.gradients.items()}
        scale = 1.0 - beta1
        if is_clipped:
            norm = torch.stack([value.float().norm() for value in expected.values()]).norm()
            scale *= min(1.0, CLIP_NORM / (float(norm) + 1e-6))
        found = {
            name: (value.float() / scale).view(self.gradients[name].shape) for name, value in moments.items()
        }
        errors = gradient_errors(found, expected)
        name = max(errors, key=lambda each: (not errors[each] <= torch.inf, errors[each]))  # NaN is the worst
        if not errors[name] <= TOLERANCES[self.precision]:
            wrong = sum(not error <= TOLERANCES[self.precision] for error in errors.values())
            raise SystemExit(
                f"{case}: the gradient of {name} must be plain autograd's within "
                f"{TOLERANCES[self.precision]:g} ({self.precision}), got a relative difference of "
                f"{errors[name]:.3g}; {wrong} of {len(errors)} parameters differ. No figure is written."
            )
        return Worst(name=name, error=errors[name])


def bare_oracle(workload: Workload, shape: Shape, device: str, choices: Choices) -> Oracle:
    """Returns the gradients of the bare loops' batch."""
    module = workload.module(device, choices).train()
    _recompute(module)
    inputs = workload.inputs(shape, device, choices)
    workload.loss(module, inputs).backward()  # type: ignore[no-untyped-call]
    return _taken(module, choices)


def trainer_oracle(trainer: Trainer[Any], choices: Choices, device: torch.device) -> Oracle:
    """Returns the gradients of the batch with which the trainer begins, by its own unit and no engine.

    Args:
        trainer: Of the one that is measured only in having a model of its own, which this uses up.
        choices: Precision of the weights.
        device: Where they are computed.
    """
    data, plan = trainer.open_data(), trainer.plan(world_size=1)
    plan = data.with_lengths(plan, trainer.source)
    unit = trainer.build_unit(trainer.config, model=trainer.shapes, plan=plan, data=data, too_short=())
    phase = plan.phases[0]
    unit.prepare(phase)
    for parameter in unit.module.parameters():
        parameter.data = parameter.data.to(device, choices.dtype)
    unit.module.to(device).train()
    _recompute(unit.module)
    stream = unit.open_stream(phase, Clock(), rank=0, world_size=1)
    try:
        engine: Any = _Plain(unit.module, device, choices.dtype)
        unit.loss(engine, next(iter(stream)), phase).total.backward()  # type: ignore[no-untyped-call]
    finally:
        stream.close()
    return _taken(unit.module, choices)


def engine_moments(engine: Engine) -> dict[str, Tensor]:
    """Returns Adam's first moments of an engine on one process, flattened, by name."""
    return _moments(engine.capture())


def _moments(snapshot: Snapshot) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for chunk, values in snapshot.pieces():
        if chunk.kind != "exp_avg":
            continue
        whole = snapshot.facts.tensors[f"{chunk.kind}/{chunk.name}"].numel
        if chunk.name not in found:
            found[chunk.name] = values if chunk.length == whole else values.new_zeros(whole)
        if chunk.length != whole:
            found[chunk.name][chunk.start :][: chunk.length] = values
    return found


@dataclass(frozen=True, slots=True)
class _Plain:
    """As much of an `Engine` as a unit's loss asks for."""

    module: nn.Module
    device: torch.device
    compute_dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _recompute(module: nn.Module) -> None:
    if list(repeated_blocks(module)):
        set_recompute(module, enabled=True)


def _taken(module: nn.Module, choices: Choices) -> Oracle:
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = gradient.cpu()
        parameter.grad = None
    return Oracle(gradients=gradients, precision=choices.precision)
