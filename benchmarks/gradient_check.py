"""Whether a fast loop computes the gradients of a plain one: looked at before any figure of it is written.

Both are given the same weights and the same batch. The oracle is eager autograd of the uncompiled model in
the same type with torch's own attention, its blocks recomputed to save memory, which changes no bit. What is
compared is Adam's first moment after the first update, m = (1 - beta1) * c * g with the clipping factor c:
every engine has it for every parameter, whatever it does to gradients on the way, so reduction, flattening,
clipping and capture are seen too.

The differences are ||found - expected|| / ||expected|| of every parameter (`gradient_errors`) and of all as
one vector. A gradient that is lost makes 1, one that is counted twice 1, one of two halves 0.5. What bf16
itself costs, against fp32, is 0.01 for most parameters of LTX-Video and 0.08 where a gradient nearly vanishes
(a key's bias in attention to text: softmax does not see it, and 2048 channels leave little of it), at full
width and two blocks. So one parameter may differ by more than all of them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far gradients may differ.

    Attributes:
        one: Those of any parameter.
        all: Those of all parameters, as one vector.
    """

    one: float
    all: float


TOLERANCES = {
    "fp32": Tolerance(one=1e-3, all=1e-4),
    "bf16": Tolerance(one=0.3, all=0.05),
    # Against bf16: e4m3 rounds to 4 bits, and the errors of 28 blocks add up.
    "fp8": Tolerance(one=1.0, all=0.3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The largest difference of a parameter's gradient and whose it is, and that of all together."""

    name: str
    error: float
    error_of_all: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Gradients of one batch by plain autograd.

    Attributes:
        gradients: By name, on the host.
        precision: In which they were computed; `fp8` compares products of 8 bits with those of bf16.
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
            SystemExit: If they differ by more than the tolerance of the precision.
        """
        tolerance = TOLERANCES[self.precision]
        device = next(iter(moments.values())).device
        expected = {name: value.to(device) for name, value in self.gradients.items()}
        norm = _norm(expected.values())
        scale = (1.0 - beta1) * (min(1.0, CLIP_NORM / (norm + 1e-6)) if is_clipped else 1.0)
        found = {
            # Without a moment there was no gradient.
            name: torch.zeros_like(value) if name not in moments else moments[name].view(value.shape) / scale
            for name, value in expected.items()
        }
        errors = gradient_errors(found, expected)
        error_of_all = _norm(found[name].float() - value for name, value in expected.items()) / norm
        name = max(errors, key=lambda each: (not errors[each] <= torch.inf, errors[each]))  # NaN is the worst
        if not (errors[name] <= tolerance.one and error_of_all <= tolerance.all):
            wrong = sum(not error <= tolerance.one for error in errors.values())
            raise SystemExit(
                f"{case}: gradients must be plain autograd's within {tolerance.one:g} each and "
                f"{tolerance.all:g} together ({self.precision}), got a relative difference of "
                f"{errors[name]:.3g} of {name} and of {error_of_all:.3g} together; {wrong} of {len(errors)} "
                "parameters differ by too much. No figure is written."
            )
        return Worst(name=name, error=errors[name], error_of_all=error_of_all)


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
    for chunk, values in snapshot.chunk_values():
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


def _norm(values: Iterable[Tensor]) -> float:
    return float(torch.stack([value.float().norm() for value in values]).norm())


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
