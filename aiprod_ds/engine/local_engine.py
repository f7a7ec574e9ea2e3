"""The control engine: the numerics of mixed-precision training in plain PyTorch, on one process.

Owns fp32 master weights, loss scale, clipping and AdamW, written so that each line can be read against the
DeepSpeed engine. No sharding: the ZeRO stage of the settings has no effect on one process, the precision
does.

One update over K micro-batches, with L the loss scale (1 outside fp16) and m the master weights:
    g = sum_k float(dL_k/dw * L / K) / L;  norm = ||g||_2
    g *= min(1, clip / (norm + 1e-6));  m = AdamW(m, g);  w = cast(m)
A non-finite norm skips the update in every precision.

Deviation from DeepSpeed: gradients of a window are added up in fp32, as DeepSpeed does with
`data_types.grad_accum_dtype: fp32`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.adamw import scale_moments
from aiprod_ds.engine.captured import CapturedLoss, CaptureHooks, DirectCalls, GraphPool
from aiprod_ds.engine.layout import (
    TORCH_DTYPES,
    find_parameter,
    group_parameters,
    persistent_tensors,
    require_precision,
    require_shape,
)
from aiprod_ds.engine.loss_scale import LossScaler
from aiprod_ds.engine.protocol import (
    ParameterGroup,
    ParameterState,
    Replica,
    UpdateResult,
    group_names,
    require_clip_norm,
)
from aiprod_ds.engine.shards import EngineShards, Shard, describe_wholes
from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import MOMENTS, EngineFacts, ShardSlice, Snapshot, StateReader


class LocalEngine:
    """`aiprod_ds.engine.protocol.Engine` on one process, without DeepSpeed.

    Args:
        module: Moved to `device` and cast in place: parameters to the precision, buffers only if
            `buffer_dtype` says so.
        groups: Every trainable parameter once.
        optimizer: AdamW settings; the learning rate is 0 until `set_learning_rate`.
        settings: Precision and loss scale; ZeRO stage and offload have no meaning here.
        micro_batch_size: Samples per micro-batch.
        accumulation: Micro-batches per update.
        device: Defaults to where the module's parameters are.

    Raises:
        EngineError: If the groups do not fit the module.
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
    ) -> None:
        parameters = group_parameters(module, groups)
        self.module = module
        self.device = device if device is not None else parameters[0][0].device
        self.rank = 0
        self.world_size = 1
        self._precision = settings.precision
        self.compute_dtype = TORCH_DTYPES[settings.precision]
        self.has_partitioned_masters = False
        self._clip_norm = optimizer.gradient_clip_norm
        self._accumulation = accumulation
        self._micro_batch_size = micro_batch_size
        self._micro_batches = 0
        self._scaler = LossScaler(settings.loss_scale)
        _cast(
            module,
            self.device,
            self.compute_dtype,
            settings.buffer_dtype and TORCH_DTYPES[settings.buffer_dtype],
        )
        names = group_names(groups)
        flat = [parameter for group in parameters for parameter in group]
        self._weights = dict(zip(names, flat, strict=True))
        self._masters = {name: self._master(weight) for name, weight in self._weights.items()}
        self._optimizer = torch.optim.AdamW(
            [{"params": [self._masters[name] for name in group.names]} for group in groups],
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
            fused=self.device.type == "cuda",
        )
        self._groups = tuple(groups)
        self._direct = DirectCalls(module)
        self._graph_pool = GraphPool()
        self.set_weight_decay(optimizer.weight_decay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module forward."""
        if self._direct.are_on:
            return self._direct(*args, **kwargs)
        return self.module(*args, **kwargs)

    def captured_loss(
        self, loss: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor]
    ) -> CapturedLoss:
        """See `Engine.captured_loss`."""
        hooks = CaptureHooks(direct=self._direct.using)
        return CapturedLoss(
            loss,
            tensors,
            parameters=self._weights,
            hooks=hooks,
            device=self.device,
            pool=self._graph_pool,
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of `loss` (0-dim fp32, the mean over the micro-batch), divided by the
        accumulation."""
        (loss * (self._scaler.scale / self._accumulation)).backward()  # type: ignore[no-untyped-call]
        for name, weight in self._weights.items():
            master = self._masters[name]
            if master is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def step(self) -> UpdateResult | None:
        """See `Engine.step`."""
        self._micro_batches += 1
        if self._micro_batches < self._accumulation:
            return None
        self._micro_batches = 0
        scale = self._scaler.scale
        gradients = self._unscaled_gradients(scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = bool(torch.isfinite(norm))
        if applied:
            self._apply(gradients, norm)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.update(overflow=not applied)
        return UpdateResult(applied=applied, gradient_norm=norm, loss_scale=scale)

    def set_learning_rate(self, learning_rate: float) -> None:
        """See `Engine.set_learning_rate`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def set_weight_decay(self, weight_decay: float) -> None:
        """See `Engine.set_weight_decay`."""
        for values, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            values["weight_decay"] = weight_decay if group.is_decayed else 0.0

    def set_clip_norm(self, clip_norm: float | None) -> None:
        """See `Engine.set_clip_norm`."""
        require_clip_norm(clip_norm)
        self._clip_norm = clip_norm

    def scale_moments(self, factor: float) -> None:
        """See `Engine.scale_moments`."""
        scale_moments(self._optimizer.state.values(), factor)

    def set_batch(self, *, micro_batch_size: int, accumulation: int) -> None:
        """See `Engine.set_batch`."""
        if self._micro_batches:
            raise EngineError(
                f"set_batch: must be called between updates, got {self._micro_batches} of "
                f"{self._accumulation} micro-batches"
                " done. Finish the window first."
            )
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation

    def train(self) -> None:
        """See `Engine.train`."""
        self.module.train()

    def eval(self) -> None:
        """See `Engine.eval`."""
        self.module.eval()

    def master_shards(self) -> list[Tensor]:
        """Returns the fp32 masters, in the order of the groups, not copied."""
        return list(self._masters.values())

    def slices(self) -> list[tuple[ShardSlice, ...]]:
        """Returns, for each of `master_shards`, the whole parameter that it is."""
        return [Shard.whole(name, master).slices for name, master in self._masters.items()]

    def replicas(self) -> list[Replica]:
        """Returns nothing: no other rank holds the same."""
        return []

    def refresh_weights(self) -> None:
        """Casts the masters into the module's weights."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                if self._masters[name] is not weight:
                    weight.copy_(self._masters[name])

    def frozen_dtypes(self) -> dict[str, torch.dtype]:
        """See `Engine.frozen_dtypes`."""
        parameters = self.module.named_parameters()
        return {name: value.dtype for name, value in parameters if name not in self._masters}

    def parameter_states(self) -> Iterator[ParameterState]:
        """See `Engine.parameter_states`."""
        for name in sorted(self._masters):
            master = self._masters[name]
            state = self._optimizer.state.get(master, {})
            yield ParameterState(
                name=name,
                value=_host_copy(master),
                optimizer={key: _host_copy(state[key]) for key in MOMENTS if key in state},
                step=int(state["step"]) if "step" in state else 0,
            )

    def module_state(self) -> dict[str, Tensor]:
        """Returns the whole model: trained parameters in fp32, frozen ones and buffers as they are."""
        own_names, buffers = persistent_tensors(self.module)
        parameters = dict(self.module.named_parameters())
        state = {
            key: _host_copy(self._masters.get(name, parameters[name])) for key, name in own_names.items()
        }
        return state | {key: _host_copy(buffer) for key, buffer in buffers.items()}

    def read_value(self, name: str) -> Tensor:
        """Returns one parameter in fp32: the master of a trained one, the weight of a frozen one; a new
        tensor.

        Raises:
            EngineError: If there is no such parameter.
        """
        parameter = find_parameter(dict(self.module.named_parameters()), name, where="read_value")
        return self._masters.get(name, parameter).detach().to(torch.float32, copy=True)

    def write_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.write_values`."""
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in values:
                parameter = find_parameter(parameters, name, where="write_values")
                require_shape(value, parameter.shape, name=name)
                self._masters.get(name, parameter).copy_(value)
        self.refresh_weights()

    def capture(self) -> Snapshot:
        """Returns what a checkpoint holds, not copied."""
        shards = self._shards()
        facts = EngineFacts(
            engine="local",
            zero_stage=0,
            precision=self._precision,
            world_size=1,
            adam_steps=shards.adam_steps(),
            loss_scale=self._scaler.state(),
            tensors=shards.all_wholes(),
        )
        return shards.capture(facts, rank=0)

    def restore(self, source: StateReader) -> None:
        """Takes over what any engine of this model and precision captured.

        Learning rate, weight decay, clipping norm and the rules of the loss scale stay those of this engine.

        Raises:
            CheckpointError: If it is of another model or precision, or cannot be read.
        """
        require_precision(source.facts, self._precision)
        self._shards().restore(source)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.restore(source.facts.loss_scale)
        self._micro_batches = 0
        self.refresh_weights()

    def close(self) -> None:
        """Drops gradients and optimizer state; the module stays usable, with its weights in the precision of
        this engine."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()

    def _shards(self) -> EngineShards:
        frozen = {name: value for name, value in self.module.named_parameters() if name not in self._masters}
        _, buffers = persistent_tensors(self.module)
        return EngineShards(
            masters=[Shard.whole(name, master) for name, master in self._masters.items()],
            frozen=[Shard.whole(name, value) for name, value in frozen.items()],
            buffers=[Shard.whole(name, value) for name, value in buffers.items()],
            wholes=describe_wholes(self._masters, frozen, buffers),
            optimizer=self._optimizer,
            writes_masters=True,
            writes_frozen=True,
        )

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if self.compute_dtype == torch.float32:
            return weight
        # Like DeepSpeed's, masters start from the 16-bit weights, so both engines start equal.
        return nn.Parameter(weight.detach().float())

    def _unscaled_gradients(self, scale: float) -> list[Tensor]:
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        return gradients

    def _apply(self, gradients: list[Tensor], norm: Tensor) -> None:
        if self._clip_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0))
        self._optimizer.step()
        self.refresh_weights()


def _cast(
    module: nn.Module, device: torch.device, dtype: torch.dtype, buffer_dtype: torch.dtype | None
) -> None:
    module.to(device)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in module.buffers():
        if buffer_dtype is not None and buffer.is_floating_point():
            buffer.data = buffer.data.to(buffer_dtype)


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
