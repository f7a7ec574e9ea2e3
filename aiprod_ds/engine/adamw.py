"""AdamW as the engines use it: its state, what a phase may do to it, and an update that clips on the way.

Owns how moments begin and their scaling, not where an engine keeps them. Called by the engines only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import MOMENTS

_MARGIN = 1e-6  # as torch.nn.utils.clip_grad_norm_


def scale_moments(states: Iterable[dict[str, Any]], factor: float) -> None:
    """Multiplies both moments of each state by `factor`, in place: whoever holds a view of them sees the
    change.

        exp_avg *= factor;  exp_avg_sq *= factor;  step *= 0 if factor == 0

    Worked example: factor 0.25 turns a state with exp_avg 4, exp_avg_sq 16 and step 7 into 1, 4 and 7; factor
    0 into 0, 0 and 0, so that bias correction starts anew. What the moments alone do next, exp_avg /
    sqrt(exp_avg_sq), shrinks to sqrt(factor).

    Args:
        states: `optimizer.state.values()`; before the first update there are none.
        factor: In [0, 1]; 1 changes nothing.

    Raises:
        EngineError: If `factor` is out of range.
    """
    if not 0.0 <= factor <= 1.0:
        raise EngineError(
            f"scale_moments: factor must lie in [0, 1], got {factor}. 0 resets the moments and 1 keeps them."
        )
    for state in states:
        for name in MOMENTS:
            if factor == 0.0:
                state[name].zero_()  # a product would keep what is not finite
            elif factor != 1.0:
                state[name].mul_(factor)
        if factor == 0.0:
            state["step"] *= 0  # an int (DeepSpeedCPUAdam) or a tensor (torch)


def new_moments(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> dict[str, Any]:
    """Returns a state of zeros after `step` updates, as the optimizer itself begins it at its first.

    torch counts in a 0-dim tensor, on the device if it is fused and on the CPU otherwise
    (torch/optim/adam.py, `_init_group`); DeepSpeedCPUAdam in an int (ops/adam/cpu_adam.py, `step`).
    """
    count: Tensor | int = step
    if isinstance(optimizer, torch.optim.AdamW):
        is_fused = bool(optimizer.param_groups[0]["fused"])
        count = torch.tensor(float(step), device=master.device if is_fused else "cpu")
    return {"step": count, **{name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}}


class OnePassAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` over one flat master a group, in one pass from its gradients to its weights.

    On a GPU with Triton that is one kernel (`kernels/adamw.py`); elsewhere torch's own step stands between
    two conversions. On a GPU neither waits for the device.
    """

    def __init__(self, groups: Any, *, betas: tuple[float, float], epsilon: float, fused: bool) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=epsilon, fused=fused)
        self._is_fused = fused
        self._kernel = _kernel() if fused else None
        self._expected: tuple[Tensor, Tensor] | None = None  # the divisor, and whether to skip

    def expect(self, norm: Tensor, *, clip_norm: float | None) -> None:
        """Sets what the coming updates do with their gradients.

        Worked number: a norm of 4 and a limit of 1 divide by 4; a norm of 0.5 divides by 1.

        Args:
            norm: 0-dim fp32 on the device: of all gradients together. Not finite: nothing is updated or
                counted.
            clip_norm: Above it gradients are scaled down to it; None: they are not.
        """
        excess = torch.ones_like(norm) if clip_norm is None else ((norm + _MARGIN) / clip_norm).clamp(min=1.0)
        self._expected = excess, (~torch.isfinite(norm)).to(torch.float32)

    @torch.no_grad()
    def update(self, index: int, gradients: Sequence[Tensor], weights: Tensor) -> None:
        """Updates a group's master and moments, unless `expect` got a norm that is not finite.

        Args:
            index: Of the group. It has one parameter, which is 1-dimensional.
            gradients: Of any floating type, in the order of the master's parts; they may end before it does,
                where it has padding. They are changed.
            weights: Of the master's length; they get it in their type.
        """
        assert self._expected is not None, "`expect` comes first"
        divisor, is_skipped = self._expected
        group = self.param_groups[index]
        (master,) = group["params"]
        if self._kernel is not None and master.is_cuda:
            self._update_by(self._kernel, group, gradients, weights)
            return
        if not self._is_fused and bool(is_skipped):
            return
        whole = torch.zeros_like(master)
        for gradient, part in _parts(gradients, whole):
            part.copy_(gradient)
        master.grad = whole if self._is_fused else whole.div_(divisor)
        if self._is_fused:  # by the names under which torch's gradient scaler would set them
            self.grad_scale, self.found_inf = divisor, is_skipped
        groups, self.param_groups = self.param_groups, [group]
        try:
            self.step()
        finally:
            self.param_groups = groups
            master.grad = None
        weights.copy_(master)

    def _update_by(
        self, kernel: Any, group: dict[str, Any], gradients: Sequence[Tensor], weights: Tensor
    ) -> None:
        assert self._expected is not None
        divisor, is_skipped = self._expected
        (master,) = group["params"]
        if not self.state[master]:
            self.state[master] = new_moments(self, master, 0)
        state, (beta1, beta2) = self.state[master], group["betas"]
        state["step"] += 1.0 - is_skipped
        # In fp64: 0.999 to a small power lies close to 1.
        steps = state["step"].double()
        corrections = [1.0 / (1.0 - beta1**steps), (1.0 - beta2**steps).rsqrt()]
        numbers = torch.stack([is_skipped, divisor, *(each.float() for each in corrections)])
        moments = [state[name] for name in MOMENTS]
        at = 0
        for gradient, part in _parts(gradients, master):
            here = slice(at, at + part.numel())
            kernel.update(
                gradient, part, tuple(moment[here] for moment in moments), weights[here], numbers,
                rate=group["lr"], decay=group["weight_decay"], betas=(beta1, beta2), epsilon=group["eps"],
            )  # fmt: skip
            at += part.numel()


def _parts(gradients: Sequence[Tensor], whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each gradient in one dimension, and the part of `whole` that it belongs to."""
    at = 0
    for gradient in gradients:
        size = gradient.numel()
        yield gradient.reshape(-1), whole[at : at + size]
        at += size


def _kernel() -> Any:
    """Returns the module of the kernel, or None where Triton is missing."""
    try:
        return importlib.import_module("aiprod_ds.engine.kernels.adamw")
    except ImportError:
        return None


def global_norm(shards: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the L2 norm of all ranks' tensors together, 0-dim fp32. Collective.

    Not finite if any number of them is not.

    Args:
        shards: This rank's, of any floating type; each is summed in fp32.
        device: Of the shards, or where 0 stands if there are none.
    """
    norms = torch._foreach_norm(list(shards), 2.0, dtype=torch.float32) if shards else ()
    squares = torch.stack([*norms, torch.zeros((), device=device)]).double().square().sum()
    if dist.world_size() > 1:
        torch_dist.all_reduce(squares)
    return squares.sqrt().float()


class LateNumber:
    """A number that is on its way from the device to the host while the device goes on.

    Args:
        value: 0-dim; on the CPU it is there at once.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value.detach(), None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def value(self) -> float:
        """Returns it; waits for what the device was asked for before it, not after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)
