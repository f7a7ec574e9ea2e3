"""Where DeepSpeed keeps fp32 masters, Adam's state and frozen weights, and how they are read and set from
outside.

Owns every touch of DeepSpeed 0.19.8's optimizers that concerns the state and not the course of an update;
that is `deepspeed_internals`. No policy, no state of its own. The behaviours are pinned by tests/upstream.
Places are relative to the installed `deepspeed/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from aiprod_ds.engine.shards import Shard
from aiprod_ds.snapshot import LossScale, ShardSlice


def is_partitioned(engine: Any) -> bool:
    """Returns whether parameters are partitioned (ZeRO-3) and must be gathered before they are read."""
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)


def trained_shards(engine: Any, names: Mapping[int, str]) -> list[Shard]:
    """Returns the fp32 tensors that this rank's optimizer updates, and what lies in them.

    ZeRO-1/2 has one flat partition for each parameter group, of which runtime/zero/stage_1_and_2.py:825 links
    to each parameter the fragment that lies in it (`_hp_mapping`; utils/mixed_precision_linkage.py). ZeRO-3
    has one for each sub-group of a group, and in it an equal part of every parameter
    (runtime/zero/stage3.py:830, `grad_position`), padded on the last rank. ZeRO-0 has whole parameters.

    Args:
        engine: Whose.
        names: Of the trained parameters, by their `id`.
    """
    optimizer = engine.optimizer
    if is_partitioned(engine):
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        spans_of = _partition_span
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        spans_of = _fragment_span
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        return [Shard.whole(names[id(weight)], master) for weight, master in pairs]
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [Shard.whole(names[id(parameter)], parameter) for parameter in parameters]
    return [
        Shard(
            tensor=flat,
            names=tuple(names[id(parameter)] for parameter in group),
            slices=tuple(
                part for parameter in group for part in spans_of(optimizer, parameter, names[id(parameter)])
            ),
        )
        for flat, group in zip(flats, groups, strict=True)
    ]


def whole_weights(engine: Any, module: nn.Module) -> list[Shard]:
    """Returns the weights that forward computes with, of an engine that leaves them whole: ZeRO-1/2 keeps
    those of a parameter group in one flat tensor (runtime/zero/stage_1_and_2.py:889), in an order of its own.
    """
    flats: list[Tensor] = getattr(engine.optimizer, "bit16_groups_flat", [])
    homes = {flat.untyped_storage().data_ptr(): flat for flat in flats}
    slices: dict[int, list[ShardSlice]] = {id(flat): [] for flat in flats}
    apart: list[Shard] = []
    for name, parameter in module.named_parameters():
        flat = homes.get(parameter.untyped_storage().data_ptr()) if parameter.numel() else None
        if flat is None:
            apart.append(Shard.whole(name, parameter.detach()))
            continue
        offset = int(parameter.storage_offset() - flat.storage_offset())
        part = ShardSlice(name=name, start=0, offset=offset, length=parameter.numel())
        slices[id(flat)].append(part)
    shared = []
    for flat in flats:
        own = tuple(slices[id(flat)])
        shared.append(Shard(tensor=flat, names=tuple(part.name for part in own), slices=own))
    return shared + apart


def frozen_shard(parameter: Any, name: str) -> Shard:
    """Returns what this rank holds of a frozen weight: its partition under ZeRO-3, all of it otherwise.

    Whoever writes into it calls `refresh_weights`: ZeRO-3 keeps small parameters gathered.
    """
    if not hasattr(parameter, "ds_id"):
        return Shard.whole(name, parameter.data)
    part = parameter.ds_tensor
    slices = _own_span(name, parameter, offset=0, length=part.numel())
    return Shard(tensor=part.data, names=(name,), slices=tuple(slices))


def loss_scale_state(engine: Any) -> LossScale | None:
    """Returns where the dynamic loss scale stands (runtime/fp16/loss_scaler.py, DynamicLossScaler); None
    without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return LossScale(
        scale=float(scaler.cur_scale),
        updates=scaler.cur_iter,
        last_overflow=scaler.last_overflow_iter,
        tolerance=scaler.cur_hysteresis,
    )


def restore_loss_scale(engine: Any, state: LossScale | None) -> None:
    """Lets a dynamic loss scale go on from `state`, under the rules of this engine's settings."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if state is None or scaler is None or not scaler.dynamic:
        return
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = (
        state.scale,
        state.updates,
        state.last_overflow,
    )
    scaler.cur_hysteresis = min(state.tolerance, scaler.delayed_shift)


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Does what ends an update: masters are cast into the weights of all ranks. Collective.

    ZeRO-3 keeps small parameters gathered (`stage3_param_persistence_threshold`), with the numbers of their
    last gathering; so they are released and gathered anew, as in runtime/zero/stage3.py:2878 and 2841.
    """
    optimizer = engine.optimizer
    if is_partitioned(engine):
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for weight, master in zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True):
            weight.copy_(master)


def _partition_span(optimizer: Any, parameter: Any, name: str) -> Iterator[ShardSlice]:
    _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return _own_span(name, parameter, offset=offset, length=length)


def _own_span(name: str, parameter: Any, *, offset: int, length: int) -> Iterator[ShardSlice]:
    """Yields what a partition of `length` has of a parameter: less, or nothing, where the ranks share
    unevenly."""
    start = parameter.ds_zero_partition_rank * length
    own = min(length, parameter.ds_numel - start)
    if own > 0:
        yield ShardSlice(name=name, start=start, offset=offset, length=own)


def _fragment_span(optimizer: Any, parameter: Any, name: str) -> Iterator[ShardSlice]:
    del optimizer
    mapping = parameter._hp_mapping
    if mapping is not None:  # None: all of it is in other ranks' partitions
        whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield ShardSlice(name=name, start=whole.start, offset=flat.start, length=whole.numel)
