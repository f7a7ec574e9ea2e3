"""The parameters of a DeepSpeed engine by their own names, wherever their values are: in flat parameters, in
shards, on other ranks.

Owns reading and writing them one by one, and what a checkpoint holds of them. What DeepSpeed itself holds,
and where, says `deepspeed_state`; which parameters are flat, `flat_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from aiprod_ds.engine import deepspeed_state, dist
from aiprod_ds.engine.flat_layout import FlatLayout, member_names, member_slices
from aiprod_ds.engine.layout import find_parameter, persistent_tensors, require_shape, whole_shape
from aiprod_ds.engine.protocol import ParameterState, Replica
from aiprod_ds.engine.shards import EngineShards, Shard, describe_wholes
from aiprod_ds.snapshot import MOMENTS, ShardSlice


class ModuleNames:
    """What a module's parameters are called and in what shapes, noted before any of them becomes flat.

    Args:
        module: As it is given to the engine.

    Attributes:
        shapes: Of the whole parameters, by name.
        own_names: The name of each key of `state_dict` that is a parameter; a tied one has several.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shapes = {name: whole_shape(value) for name, value in module.named_parameters()}
        self.own_names, _ = persistent_tensors(module)


class EngineParameters:
    """Reads and writes the parameters of a live engine.

    Args:
        engine: DeepSpeed's, after its construction.
        module: That it holds.
        names: Noted before.
        trained: Names of the trained ones.
        layouts: Of the flat parameters that the module has now.
        device: Where gathered values go.
        is_sharded: Whether each rank has other masters.

    Attributes:
        masters: The fp32 tensors that this rank updates, with what they hold by the parameters' own names.
    """

    def __init__(
        self,
        engine: Any,
        module: nn.Module,
        names: ModuleNames,
        *,
        trained: Sequence[str],
        layouts: Mapping[str, FlatLayout],
        device: torch.device,
        is_sharded: bool,
    ) -> None:
        self._engine, self._module, self._layouts = engine, module, layouts
        self._device, self._is_sharded = device, is_sharded
        self._own_names = names.own_names
        parameters = dict(module.named_parameters())
        homes = {member.name: name for name, layout in layouts.items() for member in layout.members}
        # Tensors without memory: shape and type are all that is asked of them.
        self._wholes = {
            name: torch.empty(shape, dtype=parameters[homes.get(name, name)].dtype, device="meta")
            for name, shape in names.shapes.items()
        }
        self._trained = frozenset(trained)
        self._frozen_homes = {
            name: homes.get(name, name) for name in names.shapes if name not in self._trained
        }
        self._frozen = {home: parameters[home] for home in self._frozen_homes.values()}
        by_id = {id(value): name for name, value in parameters.items()}
        self.masters = [self._by_own_names(shard) for shard in deepspeed_state.trained_shards(engine, by_id)]
        self._homes = {name: shard for shard in self.masters for name in shard.names}

    def read(self, name: str) -> Tensor:
        """Returns a parameter, whole and in fp32, on every rank: the master of a trained one. Collective.

        Raises:
            EngineError: If there is no such parameter.
        """
        find_parameter(self._wholes, name, where="read_value")
        if name in self._trained:
            return self._gather(name, self._homes[name], is_sharded=self._is_sharded)
        return self._read_frozen(name).to(torch.float32)

    def write(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets masters of trained parameters and weights of frozen ones, each rank its own part; casting
        masters into weights is the engine's.

        Raises:
            EngineError: If there is no such parameter, or a shape differs.
        """
        frozen = {name: shard for shard in self._frozen_shards() for name in shard.names}
        for name, value in values:
            whole = find_parameter(self._wholes, name, where="write_values")
            require_shape(value, whole.shape, name=name)
            _write(self._homes[name] if name in self._trained else frozen[name], name, value)

    def states(self) -> Iterator[ParameterState]:
        """Yields every trained parameter in name order. Collective; rank 0 gets the tensors, others get empty
        ones."""
        for name in sorted(self._trained):
            home = self._homes[name]
            state = self._engine.basic_optimizer.state.get(home.tensor, {})
            yield ParameterState(
                name=name,
                value=_on_rank_0(self._gather(name, home, is_sharded=self._is_sharded)),
                optimizer={
                    kind: _on_rank_0(self._gather(name, home, state[kind], is_sharded=self._is_sharded))
                    for kind in MOMENTS
                    if kind in state
                },
                step=int(state.get("step", 0)),
            )

    def module_state(self) -> dict[str, Tensor]:
        """Returns the whole model (trained in fp32, frozen and buffers as they are) on rank 0, an empty dict
        on the others. Collective."""
        values = {state.name: state.value for state in self.states()}
        for name in self.frozen_dtypes():
            values[name] = _on_rank_0(self._read_frozen(name))
        if dist.rank() != 0:
            return {}
        state = {key: values[name] for key, name in self._own_names.items()}
        return state | {key: _on_rank_0(buffer) for key, buffer in self._buffers().items()}

    def frozen_dtypes(self) -> dict[str, torch.dtype]:
        """Returns the types of the weights that are not trained, by name."""
        return {name: whole.dtype for name, whole in self._wholes.items() if name not in self._trained}

    def shards(self) -> EngineShards:
        """Returns all that this rank holds, for a checkpoint."""
        trained = {name: whole for name, whole in self._wholes.items() if name in self._trained}
        frozen = {name: whole for name, whole in self._wholes.items() if name not in self._trained}
        buffers = self._buffers()
        return EngineShards(
            masters=self.masters,
            frozen=self._frozen_shards(),
            buffers=[Shard.whole(name, buffer) for name, buffer in buffers.items()],
            wholes=describe_wholes(trained, frozen, buffers),
            optimizer=self._engine.basic_optimizer,
            writes_masters=self._is_sharded or dist.rank() == 0,
            writes_frozen=deepspeed_state.is_partitioned(self._engine) or dist.rank() == 0,
        )

    def replicas(self) -> list[Replica]:
        """See `Engine.replicas`; in the order of the module, the same on all ranks."""
        found: list[Replica] = []
        if not deepspeed_state.is_partitioned(self._engine):
            weights = map(self._by_own_names, deepspeed_state.whole_weights(self._engine, self._module))
            found += [Replica(kind="weight", tensor=each.tensor, slices=each.slices) for each in weights]
        if not self._is_sharded:
            weight_ids = {id(parameter) for parameter in self._module.parameters()}
            masters = [shard for shard in self.masters if id(shard.tensor) not in weight_ids]
            found += [Replica(kind="master", tensor=each.tensor, slices=each.slices) for each in masters]
        buffers = [Shard.whole(name, buffer) for name, buffer in self._module.named_buffers()]
        return found + [Replica(kind="buffer", tensor=each.tensor, slices=each.slices) for each in buffers]

    def _read_frozen(self, name: str) -> Tensor:
        shard = self._frozen_shard(self._frozen_homes[name])
        return self._gather(name, shard, is_sharded=deepspeed_state.is_partitioned(self._engine))

    @torch.no_grad()
    def _gather(self, name: str, shard: Shard, values: Tensor | None = None, *, is_sharded: bool) -> Tensor:
        """Returns a parameter's part of `shard` on all ranks together, or of `values` that lie as in it."""
        flat = (shard.tensor if values is None else values).detach().reshape(-1)
        whole = torch.zeros(self._wholes[name].numel(), dtype=flat.dtype, device=self._device)
        for part in _parts(shard, name):
            whole[part.start :][: part.length].copy_(flat[part.offset :][: part.length])
        if is_sharded and dist.world_size() > 1 and whole.numel():
            torch_dist.all_reduce(whole.view(torch.uint8))  # each byte is 0 on all ranks but one
        return whole.view(self._wholes[name].shape)

    def _frozen_shards(self) -> list[Shard]:
        return [self._frozen_shard(home) for home in self._frozen]

    def _frozen_shard(self, home: str) -> Shard:
        return self._by_own_names(deepspeed_state.frozen_shard(self._frozen[home], home))

    def _buffers(self) -> dict[str, Tensor]:
        _, buffers = persistent_tensors(self._module)
        return buffers

    def _by_own_names(self, shard: Shard) -> Shard:
        return Shard(
            tensor=shard.tensor,
            names=member_names(shard.names, self._layouts),
            slices=member_slices(shard.slices, self._layouts),
        )


@torch.no_grad()
def _write(shard: Shard, name: str, value: Tensor) -> None:
    """Copies this rank's part of `value` into a shard."""
    for part in _parts(shard, name):
        own = value.detach().reshape(-1)[part.start :][: part.length]
        if part.length == shard.tensor.numel():
            shard.tensor.copy_(own.view(shard.tensor.shape))
        else:
            shard.tensor.view(-1)[part.offset :][: part.length].copy_(own)


def _parts(shard: Shard, name: str) -> Iterator[ShardSlice]:
    return (part for part in shard.slices if part.name == name)


def _on_rank_0(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if dist.rank() == 0 else torch.empty(0)
