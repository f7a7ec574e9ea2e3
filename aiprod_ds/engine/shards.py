"""The state of an engine as chunks: what a shard holds of which parameter, and how both engines capture and
restore it.

Owns the slices, not where an engine keeps its shards: an engine describes them, once for its own kind. No
collectives here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.engine.adamw import new_moments
from aiprod_ds.engine.layout import whole_shape
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import (
    MOMENTS,
    Chunk,
    EngineFacts,
    Kind,
    ShardSlice,
    Snapshot,
    StateReader,
    TensorMetadata,
    chunks_of,
    fill,
    tensor_key,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A tensor that this rank holds, and which parts of which parameters lie in it.

    Attributes:
        tensor: A flat partition, or one whole parameter in its own shape.
        names: Of all parameters in it, on whatever rank; one optimizer state is that of all of them.
        slices: What lies in this rank's.
    """

    tensor: Tensor
    names: tuple[str, ...]
    slices: tuple[ShardSlice, ...]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Shard:
        """Returns the shard that is one whole tensor."""
        slices = (ShardSlice(name=name, start=0, offset=0, length=tensor.numel()),) if tensor.numel() else ()
        return cls(tensor=tensor, names=(name,), slices=slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShards:
    """Everything that an engine holds of a model and its optimizer.

    Attributes:
        masters: fp32, in the order of `Engine.master_shards`.
        frozen: Weights of parameters that are not trained.
        buffers: Persistent ones, whole.
        wholes: What all ranks together hold of these, by `tensor_key`; moments are not in it.
        optimizer: Its state is keyed by the masters' tensors.
        writes_masters: Whether this rank's masters are not written by another rank too.
        writes_frozen: The same for frozen weights; buffers are written by rank 0.
    """

    masters: Sequence[Shard]
    frozen: Sequence[Shard]
    buffers: Sequence[Shard]
    wholes: Mapping[str, TensorMetadata]
    optimizer: torch.optim.Optimizer
    writes_masters: bool
    writes_frozen: bool

    def adam_steps(self) -> dict[str, int]:
        """Returns the updates that Adam has counted, by parameter; 0 where it has no state."""
        steps: dict[str, int] = {}
        for shard in self.masters:
            step = int(self.optimizer.state.get(shard.tensor, {}).get("step", 0))
            steps |= dict.fromkeys(shard.names, step)
        return steps

    def all_wholes(self) -> dict[str, TensorMetadata]:
        """Returns `wholes` and those of the moments that there are."""
        started = [
            name for shard in self.masters if self.optimizer.state.get(shard.tensor) for name in shard.names
        ]
        moments = {
            tensor_key(kind, name): self.wholes[tensor_key("master", name)]
            for name in started
            for kind in MOMENTS
        }
        return {**self.wholes, **moments}

    def capture(self, facts: EngineFacts, *, rank: int) -> Snapshot:
        """Returns what this rank writes, not copied."""
        tensors: list[Tensor] = []
        chunks: list[Chunk] = []

        def add(kind: Kind, tensor: Tensor, slices: Sequence[ShardSlice]) -> None:
            if slices:
                chunks.extend(chunks_of(kind, slices, tensor=len(tensors)))
                tensors.append(tensor)

        for shard in self.masters if self.writes_masters else ():
            add("master", shard.tensor, shard.slices)
            state = self.optimizer.state.get(shard.tensor, {})
            for kind in MOMENTS if state else ():
                add(kind, state[kind], shard.slices)
        for shard in self.frozen if self.writes_frozen else ():
            add("frozen", shard.tensor, shard.slices)
        for shard in self.buffers if rank == 0 else ():
            add("buffer", shard.tensor, shard.slices)
        return Snapshot(rank=rank, facts=facts, tensors=tuple(tensors), chunks=tuple(chunks))

    @torch.no_grad()
    def restore(self, source: StateReader) -> None:
        """Sets masters, moments, frozen weights and buffers; casting masters into weights is the engine's.

        Frozen weights stay as they are if the source refers to those that the run started from.

        Raises:
            CheckpointError: If the source holds another model.
        """
        self._require_same(source.facts)
        slices = [shard.slices for shard in self.masters]
        fill(source, "master", [shard.tensor for shard in self.masters], slices)
        started = set(source.facts.names("exp_avg"))
        for shard in self.masters:
            self.optimizer.state.pop(shard.tensor, None)
            if started.isdisjoint(shard.names):
                continue
            # One count for all that share a state. Only ZeRO-0 has parameters without one, those that were
            # never used.
            step = max(source.facts.adam_steps[name] for name in shard.names)
            state = self.optimizer.state[shard.tensor] = new_moments(self.optimizer, shard.tensor, step)
            own = [part for part in shard.slices if part.name in started]
            for kind in MOMENTS:
                fill(source, kind, [state[kind]], [own])
        if source.facts.base is None or source.facts.base.is_stored:
            fill(
                source,
                "frozen",
                [shard.tensor for shard in self.frozen],
                [shard.slices for shard in self.frozen],
            )
        fill(
            source,
            "buffer",
            [shard.tensor for shard in self.buffers],
            [shard.slices for shard in self.buffers],
        )

    def _require_same(self, facts: EngineFacts) -> None:
        saved = {
            key: whole
            for key, whole in facts.tensors.items()
            if key.split("/", 1)[0] in {"master", "frozen", "buffer"}
        }
        wrong = sorted(key for key in {*saved, *self.wholes} if saved.get(key) != self.wholes.get(key))
        if wrong:
            told = "; ".join(
                f"{key} {_words(saved.get(key))} there, {_words(self.wholes.get(key))} here"
                for key in wrong[:3]
            )
            raise CheckpointError(
                f"engine state: must hold this model, got {len(wrong)} tensors that differ: {told}."
                " Resume with the settings of the saved run."
            )
        names = set(facts.names("master"))
        if (
            set(facts.adam_steps) != names
            or set(facts.names("exp_avg")) != set(facts.names("exp_avg_sq")) <= names
        ):
            raise CheckpointError(
                "engine state: must hold both moments and a step of what is trained, got others. It is "
                "damaged."
            )


def describe_wholes(
    trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, TensorMetadata]:
    """Returns what all ranks together hold of a model, by `tensor_key`; masters are fp32 whatever is
    trained."""
    return {
        **{
            tensor_key("master", name): TensorMetadata.of(whole_shape(value), torch.float32)
            for name, value in trained.items()
        },
        **{
            tensor_key("frozen", name): TensorMetadata.of(whole_shape(value), value.dtype)
            for name, value in frozen.items()
        },
        **{
            tensor_key("buffer", name): TensorMetadata.of(value.shape, value.dtype)
            for name, value in buffers.items()
        },
    }


def _words(whole: TensorMetadata | None) -> str:
    return "missing" if whole is None else f"{whole.dtype} {list(whole.shape)}"
