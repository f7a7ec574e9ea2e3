"""Every touch of what DeepSpeed does not document, each with the version and the place that make it
necessary.

Owns workarounds for DeepSpeed 0.19.8 and nothing else: no policy, no state. Where DeepSpeed keeps the state
of a run is in `deepspeed_state`. Called by `deepspeed_engine` alone. The behaviours are pinned by
tests/upstream, so that an upgrade says which of them can go. Places are relative to the installed
`deepspeed/`.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import (
    InsertPostInitMethodToModuleSubClasses,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from aiprod_ds.engine.deepspeed_state import is_partitioned

_MODULE_STATE = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
    "_original_parameters",
)
_PARAMETER_STATE = ("_z3_optimizer", "_zero_optimizer")


def quiet_logs() -> None:
    """Keeps DeepSpeed's own logger to warnings, unless this package logs all that it can, and its use of
    renamed torch collectives (comm/torch.py) to itself."""
    logger = logging.getLogger("DeepSpeed")
    is_verbose = logging.getLogger(__package__).isEnabledFor(logging.DEBUG)
    level = logging.INFO if is_verbose else logging.WARNING
    logger.setLevel(level)
    logger.addFilter(_is_news)  # the same one again is not added
    for handler in logger.handlers:  # has a level of its own (utils/logging.py:46)
        handler.setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.*` is deprecated")


def _is_news(record: logging.LogRecord) -> bool:
    # runtime/engine.py:2304 warns of every optimizer that is not its own, as this package's is on purpose.
    return "untested optimizer" not in record.getMessage()


def leave_out_shared_memory_op() -> None:
    """Keeps DeepSpeed from building its shared-memory all-reduce for CPUs; call it before
    `deepspeed.init_distributed`.

    comm/torch.py:47 compiles the op for a minute, though only `inference_all_reduce` uses it, which training
    never calls. Every rank then leaves 66 MiB in /dev/shm behind (ops/csrc/cpu/comm/shm.cpp:79: nothing calls
    `shared_close`), until memory is full.
    """
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def cast_added_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts what was added to a module that an earlier ZeRO-3 engine has partitioned; call it before the next
    engine is made.

    runtime/engine.py:1859 casts nothing in a module of which any parameter is partitioned.
    """
    parameters = list(module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        for parameter in parameters:
            if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def prepare(engine: Any) -> None:
    """Corrects a new engine before its first update."""
    if is_partitioned(engine) and engine._config.zero_config.memory_efficient_linear:
        # runtime/zero/parameter_offload.py:263: an engine puts its `linear` in place only for a module
        # without any partitioned parameter. With torch's own, a rebuilt engine would keep every gathered
        # weight from forward to backward.
        torch.nn.functional.linear = _memory_efficient_linear
    else:
        _restore_linear()
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # runtime/fp16/unfused_optimizer.py, initialize_optimizer_states: construction takes a real optimizer
        # step on zero gradients, which leaves Adam's step count one ahead, so the first update is smaller
        # than AdamW's.
        engine.optimizer.optimizer.state.clear()


def keep_linear(dictionary: dict[str, Any]) -> None:
    """Changes the configuration of a ZeRO-3 engine so that it leaves `torch.nn.functional.linear` alone.

    runtime/zero/linear.py saves parameters; a view of a flat one it would keep, as torch's own does.
    """
    dictionary["zero_optimization"]["memory_efficient_linear"] = False


def leave_step_to_optimizer(dictionary: dict[str, Any]) -> None:
    """Changes the configuration of a ZeRO-1 or ZeRO-2 engine so that its step looks at no gradient: the
    optimizer that it is given clips, and finds what is not finite.

    runtime/zero/stage_1_and_2.py:3029 converts all gradients to fp32 to look for overflow, :2683 to fp64 for
    their norm, and :3193 divides them in a pass of its own.
    """
    dictionary["gradient_clipping"] = 0.0
    dictionary["zero_optimization"]["compute_grad_norm"] = False
    if "bf16" in dictionary:
        dictionary["bf16"]["check_grad_overflow"] = False
    dictionary["zero_allow_untested_optimizer"] = True  # runtime/engine.py:2299: a class of its own list


def step_by(engine: Any, update: Callable[[int, Sequence[Tensor], Tensor], None]) -> None:
    """Lets a ZeRO-1 or ZeRO-2 engine's step call `update` with each group's number, its gradients in this
    rank's partition and its weights there.

    runtime/zero/stage_1_and_2.py:3113 joins the gradients, converts them to fp32, steps, and converts the
    masters: four passes over memory around the one that updates. Everything else of :3013 is done here.
    """
    optimizer = engine.optimizer

    def step(closure: Any = None) -> None:
        assert closure is None
        optimizer.micro_step_id = -1
        optimizer.overflow = False
        for index, weights in enumerate(optimizer.parallel_partitioned_bit16_groups):
            optimizer.free_grad_in_param_list(optimizer.params_not_in_partition[index])
            partition = torch_dist.get_rank(optimizer.real_dp_process_group[index])
            update(index, _gradients(optimizer, index), weights[partition])
            optimizer.free_grad_in_param_list(optimizer.params_in_partition[index])
            optimizer._release_preflattened_grad_buffers(index)
            optimizer.averaged_gradients[index] = optimizer.all_grad_tensors[index] = None
        optimizer._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    optimizer.step = step


def keep_gradients_in_place(engine: Any) -> None:
    """Lets a ZeRO-1 or ZeRO-2 engine of one rank take the gradients of an update of one micro-batch where
    autograd put them.

    There is nobody to reduce with, yet runtime/zero/stage_1_and_2.py:1447 copies them into a bucket, :1664
    divides them by 1, and :2183 or :1326 copies them once more.
    """
    optimizer = engine.optimizer
    copying: dict[str, Callable[..., None]] = {
        name: getattr(optimizer, name)
        for name in (
            "process_gradients",
            "reduce_gradients",
            "overlapping_partition_gradients_reduce_epilogue",
        )
    }

    def has_one_micro_batch() -> bool:
        return bool(engine.gradient_accumulation_steps() == 1)

    def process_gradients(parameter: nn.Parameter, index: int) -> None:
        if not has_one_micro_batch():
            copying["process_gradients"](parameter, index)

    def take_or(name: str) -> Callable[..., None]:
        def reduce(*arguments: Any, **options: Any) -> None:
            if has_one_micro_batch():
                _take_gradients(optimizer)
            else:
                copying[name](*arguments, **options)

        return reduce

    optimizer.process_gradients = process_gradients
    for name in ("reduce_gradients", "overlapping_partition_gradients_reduce_epilogue"):
        setattr(optimizer, name, take_or(name))


def _take_gradients(optimizer: Any) -> None:
    for index, members in enumerate(optimizer.round_robin_bit16_groups):
        found: list[Tensor] = []
        for member, padding in zip(members, optimizer.round_robin_bit16_padding[index], strict=True):
            found.append(torch.zeros_like(member) if member.grad is None else member.grad)
            found += [member.new_zeros(padding)] if padding else []
        optimizer.averaged_gradients[index] = found
    optimizer._epilogue_ran_this_backward = True


def reduced_gradients(engine: Any) -> list[Tensor]:
    """Returns the gradients of this rank's partitions, between the last backward pass and the step."""
    optimizer = engine.optimizer
    return [each for index in sorted(optimizer.averaged_gradients) for each in _gradients(optimizer, index)]


def _gradients(optimizer: Any, index: int) -> Sequence[Tensor]:
    """runtime/zero/stage_1_and_2.py:1046 puts them into `averaged_gradients`, with padding, which is 0; some
    (:141) are parts of a tensor that has them all."""
    found = optimizer.averaged_gradients[index]
    whole: Tensor | None = getattr(found, "flat_partition", None)
    return (found or ()) if whole is None else [whole]


def before_captured_forward(engine: Any) -> None:
    """Does before a forward pass that is replayed what runtime/engine.py:2992 does in any other."""
    if isinstance(engine.optimizer, ZeROOptimizer):
        engine.optimizer.clear_backward_seen_flag()


def before_captured_backward(engine: Any) -> None:
    """Does in a backward pass that is replayed what a hook on the forward's output does in any other.

    runtime/engine.py:3019 registers it on what the module returns, and nothing is returned by a replay.
    """
    engine._backward_prologue()


def unhook_parts(engine: Any, blocks: Iterable[nn.Module]) -> None:
    """Takes DeepSpeed's hooks off the parts of blocks that own no parameter, where nothing is to be gathered.

    They cost time in every forward, and cut what torch.compile makes of the block's forward. A block marked
    as a leaf (utils/z3_leaf_module.py) would have none, but reduces gradients when those of its inputs are
    there (runtime/zero/stage3.py:1534): before that of a flat parameter, which then counts as 0.
    """
    if not is_partitioned(engine):
        return
    empty = {
        id(hooks)
        for block in blocks
        for part in block.modules()
        if part is not block and all(parameter is None for parameter in part._parameters.values())
        for hooks in (part._forward_hooks, part._forward_pre_hooks)
    }
    offload = engine.optimizer.parameter_offload
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in empty:
            handle.remove()


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Returns a context in which parameters are whole, partitioned ones too. Collective."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
    return context


def partition_as(parameters: Sequence[nn.Parameter], like: nn.Parameter) -> None:
    """Partitions parameters if `like` is partitioned, as runtime/zero/parameter_offload.py:263 does what was
    added to a module. Collective then."""
    convert = getattr(like, "convert_to_zero_parameters", None)
    if convert is not None:
        convert(param_list=list(parameters))


def loss_scale(engine: Any) -> float:
    """Returns the scale of the next backward pass; 1.0 outside fp16."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return 1.0 if scaler is None else float(scaler.cur_scale)


def count_overflows_at_minimum(engine: Any) -> None:
    """Lets an overflow at the minimum scale be a skipped update that the caller counts.

    runtime/fp16/loss_scaler.py: update_scale raises a bare Exception there.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def set_clip_norm(engine: Any, clip_norm: float | None) -> None:
    """Applies a clipping norm to the updates that follow.

    ZeRO's optimizers and the one of 16-bit ZeRO-0 read their own `clip_grad` in each step; ZeRO-0 in fp32 has
    a plain optimizer and reads the configuration (runtime/engine.py:3506).
    """
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = clip_norm or 0.0
    else:
        engine._config.gradient_clipping = clip_norm or 0.0


@contextmanager
def scale_growth_after_update(engine: Any) -> Iterator[None]:
    """Lets the loss scale double after the update instead of inside it.

    runtime/zero/stage_1_and_2.py:3047 and stage3.py:2826 double the scale before gradients are divided by it,
    so that one update in every window would be half as large as it should be.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        yield
        return
    grown: list[bool] = []

    def update_scale(overflow: bool) -> None:
        if overflow:
            type(scaler).update_scale(scaler, overflow)
        else:
            grown.append(True)

    scaler.update_scale = update_scale
    try:
        yield
    finally:
        del scaler.update_scale  # an instance attribute, which hides the class's
    if grown:
        scaler.update_scale(False)


def restart_bias_correction(engine: Any) -> None:
    """Lets the coming update compute Adam's bias correction from the step count alone.

    ops/csrc/includes/cpu_adam.h:71 multiplies the powers of beta that it keeps by beta once more, but calls
    pow for a step that does not follow the one before. A resumed optimizer would call pow where the saved one
    multiplied, and differ from it in the last bits. After an update of nothing, numbered 0, every step calls
    pow (or is the first, where both give beta).
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    nothing = torch.empty(0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    optimizer.ds_opt_adam.adam_update(
        optimizer.opt_id, 0, 0.0, beta1, beta2, 1.0, 0.0, False, nothing, nothing, nothing, nothing
    )


def clean_up_after_update(engine: Any) -> None:
    """Drops what DeepSpeed keeps of an update that is over.

    runtime/zero/stage_1_and_2.py:3056 leaves the gradients of an overflowed update in place when the
    optimizer is offloaded and gradients are accumulated in fp32, so that no later update would ever be finite
    again. runtime/zero/parameter_offload.py:536 pushes every module onto a global list in its forward and
    pops it in its forward hook, which torch's checkpointing never reaches when it stops a recomputation
    early: the list would grow with every update.
    """
    optimizer = engine.optimizer
    if not engine.was_step_applied() and getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
    if is_partitioned(engine) and len(parameter_offload.FWD_MODULE_STACK) > 1:
        _remove_from_forward_stack(set(engine.module.modules()) - {engine.module})


def full_teardown(engine: Any) -> None:
    """Takes an engine apart so that nothing in the process refers to it, its optimizer or its module any
    more.

    `DeepSpeedEngine.destroy` (runtime/engine.py:1243) leaves: the root forward hooks (runtime/engine.py:624);
    backward functions on every module that call the old coordinator after a new engine took the module
    (runtime/zero/parameter_offload.py:444, 483); the optimizer on every parameter
    (runtime/zero/stage3.py:807, stage_1_and_2.py:822); on every module the dictionary of parameters that it
    replaced (runtime/zero/parameter_offload.py:85); the module in a global list
    (parameter_offload.py:315); an unbounded class-level cache (partitioned_param_coordinator.py:633);
    parameters as they are, all of them gathered if a forward without a backward was last, and gatherings
    under way on the module (parameter_offload.py:199); a process-wide autocast flag
    (runtime/torch_autocast.py:28); and the replaced `torch.nn.functional.linear`
    (runtime/zero/partition_parameters.py:419), which would change speed and memory of every later engine.
    """
    module = engine.module
    engine.destroy()
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()
            setattr(engine, name, None)
    for part in module.modules():
        for attribute in _MODULE_STATE:
            part.__dict__.pop(attribute, None)
    for parameter in module.parameters():
        for attribute in _PARAMETER_STATE:
            parameter.__dict__.pop(attribute, None)
    _forget_gathered(module)
    _remove_from_forward_stack(set(module.modules()))
    _clear_caches(PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch_autocast.TORCH_AUTOCAST_DTYPE = None
    _restore_linear()
    engine.optimizer = engine.basic_optimizer = engine.lr_scheduler = None
    gc.collect()


def separate_partitions(module: nn.Module) -> None:
    """Gives each partition memory of its own, of a module whose flat parameters are gone.

    runtime/zero/stage3.py keeps the partitions of a group in one buffer, so that a single one of them would
    keep those of all.
    """
    for parameter in module.parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is not None and part.untyped_storage().nbytes() > part.nbytes:
            part.data = part.data.clone()


def _memory_efficient_linear(
    input: Tensor,  # noqa: A002  as torch's is called
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Calls DeepSpeed's function, except where torch.compile traces it: there it loses gradients of weights
    (inductor of torch 2.11 on a GPU), and saves nothing."""
    if torch.compiler.is_compiling():
        result: Tensor = InsertPostInitMethodToModuleSubClasses.linear_bk(input, weight, bias)
        return result
    efficient: Tensor = zero3_linear_wrap(input, weight, bias)
    return efficient


def _restore_linear() -> None:
    if torch.nn.functional.linear in {zero3_linear_wrap, _memory_efficient_linear}:
        torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


def _remove_from_forward_stack(modules: set[nn.Module]) -> None:
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry not in modules]


def _forget_gathered(module: nn.Module) -> None:
    """Leaves of every parameter the partition alone, and waits for no gathering: after an error other ranks
    may be gone."""
    in_flight = getattr(module, "ds_inflight_param_registry", {})
    for parameter in in_flight:
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    in_flight.clear()
    partitioned: list[Any] = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    for parameter in partitioned:
        parameter.ds_active_sub_modules.clear()
        parameter.partition()


def _clear_caches(function: Callable[..., Any]) -> None:
    """Clears every lru_cache under a stack of decorators; DeepSpeed's nvtx wrapper hides it in a closure."""
    pending: list[Any] = [function]
    while pending:
        current = pending.pop()
        if hasattr(current, "cache_clear"):
            current.cache_clear()
        if hasattr(current, "__wrapped__"):
            pending.append(current.__wrapped__)
        for cell in getattr(current, "__closure__", None) or ():
            if callable(cell.cell_contents) and cell.cell_contents is not current:
                pending.append(cell.cell_contents)
