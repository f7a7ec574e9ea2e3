"""Training under torch's FSDP2 (`fully_shard`) without the trainer: the loop of torch's own examples.

fp32 masters are what is sharded; blocks compute in the type of the job and reduce gradients in it, as
DeepSpeed's bf16 settings do. Every repeated block is a group of its own whose forward is compiled, with
FSDP's hooks outside of it; fused AdamW, clipping. Called by `scaling.py`, inside a process group.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bare_loops import Job, adamw
from gradient_check import CLIP_NORM
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aiprod_ds.engine import dist
from aiprod_ds.engine.compiled import set_compiled
from aiprod_ds.engine.recompute import repeated_blocks


class Fsdp2Loop:
    """A `BareLoop`.

    Args:
        job: Its blocks not compiled.
        keeps_weights: Whether gathered weights stay from the forward to the backward pass, as in ZeRO-2;
            otherwise they are gathered twice, as in ZeRO-3.
    """

    is_clipped = True

    def __init__(self, job: Job, *, keeps_weights: bool) -> None:
        self._job = job
        blocks = list(repeated_blocks(job.module))
        set_compiled(blocks, enabled=True, backend=job.backend)
        self._module = job.module
        buffers = {name: value.dtype for name, value in self._module.named_buffers()}
        self._module.float()  # weights stay those of the compute type, rounded
        for name, value in self._module.named_buffers():
            value.data = value.data.to(buffers[name])
        policy = MixedPrecisionPolicy(param_dtype=job.choices.dtype, cast_forward_inputs=False)
        mesh = init_device_mesh(job.device.type, (dist.world_size(),))
        for block in (*blocks, self._module):
            is_gathered_again = not keeps_weights and block is not self._module
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=is_gathered_again)
        self._trained = {
            name: value for name, value in self._module.named_parameters() if value.requires_grad
        }
        self._optimizer = adamw(self._trained)

    def update(self) -> None:
        """See `BareLoop`."""
        self._job.loss(self._module).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained.values(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> dict[str, Tensor]:
        """See `BareLoop`; whole ones. Collective."""
        state = self._optimizer.state
        return {name: _whole(state[value]["exp_avg"]) for name, value in self._trained.items()}

    def close(self) -> None:
        """See `BareLoop`."""


def _whole(value: Any) -> Tensor:
    return cast("Tensor", value.full_tensor())
