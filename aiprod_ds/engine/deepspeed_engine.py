"""The DeepSpeed engine: ZeRO 0 to 3 in fp32, bf16 and fp16 behind the protocol that the loop knows.

Owns how DeepSpeed is configured, stepped, captured and restored; its own checkpoints are not used. What
DeepSpeed does not document is in `deepspeed_internals` and `deepspeed_state`. There is no scheduler: the loop
writes the learning rate. DeepSpeed's own counters serve nothing; the clock is the truth.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, deepspeed_dictionary
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import deepspeed_internals as internals
from aiprod_ds.engine import deepspeed_state, dist
from aiprod_ds.engine.adamw import LateNumber, OnePassAdamW, global_norm, scale_moments
from aiprod_ds.engine.captured import CapturedLoss, CaptureHooks, DirectCalls, GraphPool
from aiprod_ds.engine.compiled import leave_unaligned_eager
from aiprod_ds.engine.deepspeed_parameters import EngineParameters, ModuleNames
from aiprod_ds.engine.flat_parameters import MAX_ELEMENTS, FlatMode, FlatParameters, Sharding
from aiprod_ds.engine.flat_views import InFlatParameter, saving_by_place
from aiprod_ds.engine.layout import TORCH_DTYPES, group_parameters, require_precision
from aiprod_ds.engine.protocol import (
    ParameterGroup,
    ParameterState,
    Replica,
    UpdateResult,
    group_names,
    require_clip_norm,
)
from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import EngineFacts, ShardSlice, Snapshot, StateReader

_LOG = logging.getLogger(__name__)
_PARTITIONED = 3
_PARTITIONED_STATE = (1, 2)  # stages that leave weights whole


class DeepSpeedEngine:
    """`aiprod_ds.engine.protocol.Engine` on DeepSpeed; every rank constructs it with the same module and
    arguments.

    Args:
        module: Moved to the device, cast to the precision and, under ZeRO-3, partitioned: all in place. Rank
            0's parameters and buffers are the ones that count. After `close` it stays partitioned, so only a
            ZeRO-3 engine of the same precision can take it; parameters may be added and removed before that.
        groups: Every trainable parameter once.
        optimizer: AdamW settings; the learning rate is 0 until `set_learning_rate`.
        settings: ZeRO stage, precision, offload.
        micro_batch_size: Samples per micro-batch and rank.
        accumulation: Micro-batches per update.
        device: Must be what `dist.initialize` returned; that is also the default.
        flat_parameters: Whether the weights of each repeated block become a few flat parameters until
            `close`, as `flat_parameters` says: under ZeRO-3 all of them, otherwise the trained ones.

    Attributes:
        layout_notes: What of the blocks stays as it is, and why.

    Raises:
        EngineError: If the groups do not fit the module, the device cannot run the settings, or
            `flat_parameters` cannot be on.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        optimizer: OptimizerConfig,
        settings: DeepSpeedSettings,
        micro_batch_size: int,
        accumulation: int,
        device: torch.device | None = None,
        flat_parameters: FlatMode = "auto",
    ) -> None:
        self.device = _device_for(settings, device)
        self.module = module
        self.rank = dist.rank()
        self.world_size = dist.world_size()
        self.compute_dtype = TORCH_DTYPES[settings.precision]
        self.has_partitioned_masters = settings.zero_stage > 0
        self._settings = settings
        self._groups = tuple(
            group for group in groups if group.names
        )  # as DeepSpeed 0.19.8, runtime/engine.py:2348
        group_parameters(module, groups)
        self._needs_own_norm = settings.zero_stage == 0 and settings.precision == "fp32"
        internals.cast_added_parameters(module, self.compute_dtype)
        names = ModuleNames(module)
        self._flat = _flat_parameters(module, groups, settings, flat_parameters)
        self.layout_notes = self._flat.notes
        self._optimized = self._flat.groups(module, groups)
        self._clip_norm = optimizer.gradient_clip_norm
        self._direct = DirectCalls(module)
        self._graph_pool = GraphPool()
        dictionary = deepspeed_dictionary(
            settings,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            world_size=self.world_size,
            gradient_clip_norm=optimizer.gradient_clip_norm,
        )
        if self._flat.layouts and settings.zero_stage == _PARTITIONED:
            internals.keep_linear(dictionary)
        adamw = _adamw(self._optimized, optimizer, settings, self.device)
        self._one_pass = adamw if isinstance(adamw, OnePassAdamW) else None
        if self._one_pass is not None:
            internals.leave_step_to_optimizer(dictionary)
        self._engine: Any = _initialize(module, adamw, dictionary)
        internals.prepare(self._engine)
        if self._one_pass is not None:
            internals.step_by(self._engine, self._one_pass.update)
            if self.world_size == 1:
                internals.keep_gradients_in_place(self._engine)
        internals.unhook_parts(self._engine, self._flat.blocks())
        self._parameters = EngineParameters(
            self._engine,
            module,
            names,
            trained=group_names(groups),
            layouts=self._flat.layouts,
            device=self.device,
            is_sharded=self.has_partitioned_masters,
        )
        # After DeepSpeed's own hooks, so that what they gather is there.
        self._flat.attach(is_traced=not deepspeed_state.is_partitioned(self._engine))
        if self.device.type == "cuda":
            self.layout_notes += _left_eager(module)
        self.set_weight_decay(optimizer.weight_decay)
        internals.count_overflows_at_minimum(self._engine)
        _broadcast_buffers(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module forward through DeepSpeed's hooks."""
        if self._direct.are_on:
            return self._direct(*args, **kwargs)
        try:
            with self._saving():
                return self._engine(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            if InFlatParameter.__name__ not in str(error):
                raise
            raise EngineError(
                "engine.flat_parameters: must be off for a model that reads the weights of a block while the "
                f"block does not run, got: {error}. Set it to off."
            ) from error

    def captured_loss(
        self, loss: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor]
    ) -> CapturedLoss:
        """See `Engine.captured_loss`."""
        if deepspeed_state.is_partitioned(self._engine):
            raise EngineError(
                "performance.graphs: must be off with ZeRO-3, got a loss to capture. Set it to off."
            )
        hooks = CaptureHooks(
            direct=self._direct.using,
            before_forward=lambda: internals.before_captured_forward(self._engine),
            before_backward=lambda: internals.before_captured_backward(self._engine),
        )
        return CapturedLoss(
            loss,
            tensors,
            parameters=dict(self.module.named_parameters()),
            hooks=hooks,
            device=self.device,
            pool=self._graph_pool,
        )

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        self._engine.backward(loss)

    def step(self) -> UpdateResult | None:
        """See `Engine.step`."""
        engine = self._engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return None
        if self._one_pass is not None:
            return self._step_in_one_pass(self._one_pass)
        scale = internals.loss_scale(engine)  # before the step, which may change it
        # ZeRO-0 in fp32 looks for nothing: a non-finite gradient must be found before it reaches the weights.
        norm = self._replicated_norm() if self._needs_own_norm else None
        if norm is not None and not bool(torch.isfinite(norm)):
            return self._skip(norm)
        internals.restart_bias_correction(engine)
        with internals.scale_growth_after_update(engine):
            engine.step()
        internals.clean_up_after_update(engine)
        if norm is None:
            norm = engine.get_global_grad_norm()
        return UpdateResult(applied=engine.was_step_applied(), gradient_norm=norm, loss_scale=scale)

    def set_learning_rate(self, learning_rate: float) -> None:
        """See `Engine.set_learning_rate`."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = group["initial_lr"] = learning_rate

    def set_weight_decay(self, weight_decay: float) -> None:
        """See `Engine.set_weight_decay`."""
        for values, group in zip(self._engine.basic_optimizer.param_groups, self._groups, strict=True):
            values["weight_decay"] = weight_decay if group.is_decayed else 0.0

    def set_clip_norm(self, clip_norm: float | None) -> None:
        """See `Engine.set_clip_norm`."""
        require_clip_norm(clip_norm)
        self._clip_norm = clip_norm
        if self._one_pass is None:
            internals.set_clip_norm(self._engine, clip_norm)

    def scale_moments(self, factor: float) -> None:
        """See `Engine.scale_moments`."""
        scale_moments(self._engine.basic_optimizer.state.values(), factor)

    def set_batch(self, *, micro_batch_size: int, accumulation: int) -> None:
        """See `Engine.set_batch`."""
        engine = self._engine
        done = engine.micro_steps % engine.gradient_accumulation_steps()
        if done:
            raise EngineError(
                f"set_batch: must be called between updates, got {done} of "
                f"{engine.gradient_accumulation_steps()} micro-batches"
                " done. Finish the window first."
            )
        engine.set_train_micro_batch_size(micro_batch_size)
        engine.set_train_batch_size(micro_batch_size * accumulation * self.world_size)
        engine.micro_steps = (
            0  # the boundary is (micro_steps + 1) % accumulation: an old count would shorten the next window
        )

    def train(self) -> None:
        """See `Engine.train`."""
        self._engine.train()

    def eval(self) -> None:
        """See `Engine.eval`."""
        self._engine.eval()

    def master_shards(self) -> list[Tensor]:
        """Returns the fp32 masters that this rank owns, not copied; with an offloaded optimizer they are on
        the CPU."""
        return [shard.tensor for shard in self._parameters.masters]

    def slices(self) -> list[tuple[ShardSlice, ...]]:
        """Returns, for each of `master_shards`, which parts of which parameters lie in it."""
        return [shard.slices for shard in self._parameters.masters]

    def replicas(self) -> list[Replica]:
        """See `Engine.replicas`; ZeRO-3 has buffers alone."""
        return self._parameters.replicas()

    def refresh_weights(self) -> None:
        """Casts the masters into the weights of all ranks. Collective."""
        deepspeed_state.refresh_weights(self._engine)

    def frozen_dtypes(self) -> dict[str, torch.dtype]:
        """See `Engine.frozen_dtypes`."""
        return self._parameters.frozen_dtypes()

    def parameter_states(self) -> Iterator[ParameterState]:
        """Yields every trained parameter in name order. Collective; rank 0 gets the tensors, others get empty
        ones."""
        return self._parameters.states()

    def module_state(self) -> dict[str, Tensor]:
        """See `Engine.module_state`."""
        return self._parameters.module_state()

    def read_value(self, name: str) -> Tensor:
        """Returns one parameter, whole and in fp32, on every rank: the master of a trained one, the weight of
        a frozen one. Collective.

        Raises:
            EngineError: If there is no such parameter.
        """
        return self._parameters.read(name)

    def write_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.write_values`; each rank sets its own part."""
        self._parameters.write(values)
        self.refresh_weights()

    def capture(self) -> Snapshot:
        """Returns what this rank writes into a checkpoint, not copied: its partitions, and on rank 0 what
        nobody partitions."""
        shards = self._parameters.shards()
        facts = EngineFacts(
            engine="deepspeed",
            zero_stage=self._settings.zero_stage,
            precision=self._settings.precision,
            world_size=self.world_size,
            adam_steps=shards.adam_steps(),
            loss_scale=deepspeed_state.loss_scale_state(self._engine),
            tensors=shards.all_wholes(),
        )
        return shards.capture(facts, rank=self.rank)

    def restore(self, source: StateReader) -> None:
        """Takes over what any engine of this model and precision captured, on however many ranks. Collective.

        Learning rate, weight decay, clipping norm and the rules of the loss scale stay those of this engine.

        Raises:
            CheckpointError: If it is of another model or precision, or cannot be read.
        """
        require_precision(source.facts, self._settings.precision)
        self._parameters.shards().restore(source)
        deepspeed_state.restore_loss_scale(self._engine, source.facts.loss_scale)
        self._engine.micro_steps = 0
        self.refresh_weights()

    def close(self) -> None:
        """Releases everything, so that the module may be given to a new engine. Idempotent.

        Collective under ZeRO-3 if there are flat parameters; after an error, where other ranks may be gone,
        the module is left without its weights.
        """
        if self._engine is None:
            return
        is_partitioned = deepspeed_state.is_partitioned(self._engine)
        internals.full_teardown(self._engine)
        self._engine = None
        self._optimized = []
        del self._parameters
        if is_partitioned and sys.exc_info()[0] is not None:
            self._flat.detach()
            return
        had_flat = bool(self._flat.layouts)
        self._flat.restore()
        if had_flat and is_partitioned:
            internals.separate_partitions(self.module)

    def _saving(self) -> AbstractContextManager[Any]:
        has_gathered = self._flat.layouts and deepspeed_state.is_partitioned(self._engine)
        return saving_by_place() if has_gathered else nullcontext()

    def _step_in_one_pass(self, adamw: OnePassAdamW) -> UpdateResult:
        """Takes the step of ZeRO-1 and ZeRO-2; the host learns the norm while the device updates."""
        norm = global_norm(internals.reduced_gradients(self._engine), self.device)
        reading = LateNumber(norm)
        adamw.expect(norm, clip_norm=self._clip_norm)
        self._engine.step()
        value = reading.value()
        return UpdateResult(applied=math.isfinite(value), gradient_norm=value, loss_scale=1.0)

    def _replicated_norm(self) -> Tensor:
        """ZeRO-0 in fp32 reports no norm and applies non-finite gradients; here gradients are already
        averaged over ranks."""
        gradients = [value.grad for group in self._optimized for value in group if value.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _skip(self, norm: Tensor) -> UpdateResult:
        self._engine.zero_grad()
        self._engine.micro_steps += 1
        self._engine.skipped_steps += 1
        self._engine.global_steps += 1
        return UpdateResult(applied=False, gradient_norm=norm, loss_scale=1.0)


def _device_for(settings: DeepSpeedSettings, device: torch.device | None) -> torch.device:
    chosen = dist.initialize()
    if device is not None and device != chosen:
        raise EngineError(f"device: must be this rank's device {chosen}, got {device}. Leave it out.")
    accelerator = get_accelerator().device_name()
    if accelerator != chosen.type:
        raise EngineError(
            f"device: DeepSpeed must run on {chosen.type}, got {accelerator}. Set "
            f"DS_ACCELERATOR={chosen.type}."
        )
    if settings.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise EngineError(
            "precision: fp16 needs a device that computes in it, got one that does not. Use bf16 or fp32 "
            "here."
        )
    # torch reports bf16 as supported on a V100 through emulation, so the compute capability decides.
    if (
        settings.precision == "bf16"
        and chosen.type == "cuda"
        and torch.cuda.get_device_capability(chosen)[0] < 8
    ):
        raise EngineError(
            "precision: bf16 needs compute capability 8.0 or higher, got a lower one. Use an fp16 file."
        )
    return chosen


def _flat_parameters(
    module: nn.Module, groups: Sequence[ParameterGroup], settings: DeepSpeedSettings, mode: FlatMode
) -> FlatParameters:
    is_partitioned = settings.zero_stage == _PARTITIONED
    bucket = settings.zero_setting("reduce_bucket_size", default=MAX_ELEMENTS)
    flat = FlatParameters(
        module,
        groups,
        mode=mode,
        includes_frozen=is_partitioned,
        max_elements=min(MAX_ELEMENTS, int(bucket)),  # DeepSpeed reduces what fits no bucket apart
        sharding=Sharding(gather=internals.gathered, partition=internals.partition_as),
    )
    _LOG.info(
        "flat_parameters mode=%s flat=%d of=%d%s",
        mode, len(flat.layouts), sum(len(layout.members) for layout in flat.layouts.values()),
        "".join(f" note={note!r}" for note in flat.notes),
    )  # fmt: skip
    return flat


def _left_eager(module: nn.Module) -> tuple[str, ...]:
    notes = leave_unaligned_eager(module)
    for note in notes:
        _LOG.warning("compile_left_out note=%r", note)
    return notes


def _adamw(
    parameters: Sequence[Sequence[nn.Parameter]],
    optimizer: OptimizerConfig,
    settings: DeepSpeedSettings,
    device: torch.device,
) -> torch.optim.Optimizer:
    groups = [{"params": list(members)} for members in parameters]
    if settings.optimizer_offload:
        offloaded: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, lr=0.0, betas=optimizer.betas, eps=optimizer.epsilon, adamw_mode=True
        )
        return offloaded
    if settings.zero_stage in _PARTITIONED_STATE and settings.precision != "fp16":
        fused = device.type == "cuda"
        return OnePassAdamW(groups, betas=optimizer.betas, epsilon=optimizer.epsilon, fused=fused)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=optimizer.betas, eps=optimizer.epsilon, fused=device.type == "cuda"
    )


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, dictionary: dict[str, Any]) -> Any:
    internals.quiet_logs()
    internals.leave_out_shared_memory_op()
    os.environ.setdefault(
        "LOCAL_RANK", "0"
    )  # DeepSpeed insists on it, also for a single process without a launcher
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    engine, _, _, _ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dictionary, dist_init_required=False
    )
    return engine


def _broadcast_buffers(module: nn.Module) -> None:
    """DeepSpeed gives every rank the parameters of rank 0 but not its buffers."""
    if dist.world_size() > 1:
        for buffer in module.buffers():
            torch_dist.broadcast(buffer.data, src=0)
