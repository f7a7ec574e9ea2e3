"""The state of a run as chunks of whole tensors, whoever holds them: what engines, averages and checkpoints
share.

A chunk is a contiguous range of one flattened tensor. What an engine captures names its chunks; what it
restores from is asked for ranges. So neither side knows on how many ranks, or under which ZeRO stage, the
other one was sharded. Owns the records and the copying between shards and ranges. Files are
`aiprod_ds.checkpoint.shard_files`; how an engine shards is its own matter.

    master, exp_avg, exp_avg_sq, ema   of trained parameters, always fp32
    frozen                             weights of the other parameters, in their own type
    buffer                             persistent buffers, in their own type
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from aiprod_ds.errors import CheckpointError

FORMAT = 2
Kind = Literal["master", "exp_avg", "exp_avg_sq", "ema", "frozen", "buffer"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
OF_TRAINED: tuple[Kind, ...] = ("master", *MOMENTS, "ema")
KINDS: tuple[Kind, ...] = (*OF_TRAINED, "frozen", "buffer")
COMPANION = "companion/"
"""Begins the names of what is trained beside the model; no part of a module is called so."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSlice:
    """Where a range of one parameter lies in one flattened shard.

    Attributes:
        start: First element, in the flattened parameter.
        offset: Of that element in the flattened shard.
        length: In elements.
    """

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A range of one tensor of a snapshot.

    Attributes:
        kind: What the tensor is.
        name: Of the parameter or buffer.
        tensor: Index in `Snapshot.tensors`.
        start: First element, in the flattened whole tensor.
        offset: Of that element in `Snapshot.tensors[tensor]`, flattened.
        length: In elements.
    """

    kind: Kind
    name: str
    tensor: int
    start: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMetadata:
    """What the chunks of one tensor make together.

    Attributes:
        shape: Of the whole tensor.
        dtype: As torch calls it: `float32`, `bfloat16`, ...
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype) -> TensorMetadata:
        """Returns the record of a tensor."""
        return cls(shape=tuple(shape), dtype=str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """Where a dynamic loss scale stands; its rules belong to the settings.

    Attributes:
        scale: Of the next backward pass.
        updates: That it has seen.
        last_overflow: Number of the last update that overflowed; -1 before there was one.
        tolerance: Overflows until the scale halves.
    """

    scale: float
    updates: int
    last_overflow: int
    tolerance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Frozen weights that a state refers to in place of holding them.

    Attributes:
        sha256: Over all of them, from `frozen_sha256`.
        is_stored: Whether they are stored beside the checkpoints; otherwise they are what the run started
            from.
        origin: Where they come from, in words.
    """

    sha256: str
    is_stored: bool
    origin: str

    @classmethod
    def from_dict(cls, values: object) -> Base | None:
        """Returns the reference that stands in a state's facts; None for null.

        Raises:
            CheckpointError: If it is neither.
        """
        if values is None:
            return None
        kinds = {"sha256": str, "is_stored": bool, "origin": str}
        is_own = isinstance(values, dict) and {name: type(value) for name, value in values.items()} == kinds
        if not is_own or not _SHA256.fullmatch(cast("dict[str, str]", values)["sha256"]):
            raise CheckpointError(
                f"base: must be null or have {', '.join(kinds)}, got {str(values)[:80]}. It is damaged."
            )
        return cls(**cast("dict[str, Any]", values))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a saved engine state says of itself beside its tensors.

    Attributes:
        engine: `deepspeed` or `local`.
        zero_stage: Of the engine that saved; 0 for `local`.
        precision: `fp32`, `bf16` or `fp16`: the type of the weights.
        world_size: Ranks that saved.
        adam_steps: Updates that Adam has counted, for every trained parameter; 0 where it has no moments yet.
        loss_scale: Of a dynamic loss scaler; None without one.
        tensors: Every whole tensor, by `tensor_key`.
        base: Where those of kind `frozen` are, if not here.
    """

    engine: str
    zero_stage: int
    precision: str
    world_size: int
    adam_steps: Mapping[str, int]
    loss_scale: LossScale | None = None
    tensors: Mapping[str, TensorMetadata]
    base: Base | None = None

    def names(self, kind: Kind) -> tuple[str, ...]:
        """Returns the names of the tensors of one kind, sorted."""
        return tuple(sorted(name for own, name in map(split_key, self.tensors) if own == kind))

    def of_companion(self) -> EngineFacts:
        """Returns what is told of the companion, by its own names."""
        return self._of({key: key.replace(COMPANION, "", 1) for key in self._companion_keys()})

    def of_model(self) -> EngineFacts:
        """Returns what is told of all but the companion."""
        beside = self._companion_keys()
        return self._of({key: key for key in self.tensors if key not in beside}) if beside else self

    def _companion_keys(self) -> frozenset[str]:
        return frozenset(key for key in self.tensors if split_key(key)[1].startswith(COMPANION))

    def _of(self, renamed: Mapping[str, str]) -> EngineFacts:
        """Returns the facts of some tensors, under the new keys."""
        trained = {split_key(key)[1]: split_key(new)[1] for key, new in renamed.items()}
        is_companion = any(key != new for key, new in renamed.items())
        return replace(
            self,
            tensors={new: self.tensors[key] for key, new in renamed.items()},
            adam_steps={trained[name]: step for name, step in self.adam_steps.items() if name in trained},
            loss_scale=None if is_companion else self.loss_scale,
            base=None if is_companion else self.base,
        )

    def num_bytes(self) -> int:
        """Returns the bytes of all tensors that are here."""
        return sum(
            whole.num_bytes
            for key, whole in self.tensors.items()
            if self.base is None or split_key(key)[0] != "frozen"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineFacts:
        """Returns the facts that `to_dict` gave.

        Raises:
            CheckpointError: If the format or a field is another one.
        """
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"format: must be {FORMAT}, got {values.get('format')!r}. It is of another version."
            )
        fields = {"format", *cls.__dataclass_fields__}
        if set(values) != fields:
            raise CheckpointError(f"fields: must be {sorted(fields)}, got {sorted(values)}. It is damaged.")
        for name, kind in (("engine", str), ("precision", str), ("zero_stage", int), ("world_size", int)):
            if type(values[name]) is not kind:
                raise CheckpointError(
                    f"{name}: must be of type {kind.__name__}, got {str(values[name])[:80]!r}. It is damaged."
                )
        return cls(
            engine=values["engine"],
            zero_stage=values["zero_stage"],
            precision=values["precision"],
            world_size=values["world_size"],
            adam_steps=_counts("adam_steps", values["adam_steps"]),
            loss_scale=_loss_scale(values["loss_scale"]),
            tensors=_tensors(values["tensors"]),
            base=Base.from_dict(values["base"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one rank writes of a state: tensors that still belong to the engine, and which chunks they hold.

    Whoever lets training go on before they are written copies them first: `replace(snapshot, tensors=copies)`
    in the same order.

    Attributes:
        facts: Of the whole state, the same on every rank.
        tensors: Not copied, on any device, of any shape; in no file as they are.
        chunks: Together, those of all ranks are every tensor of `facts` exactly once.
    """

    rank: int
    facts: EngineFacts
    tensors: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]

    def chunk_values(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yields every chunk with its values [length], views where the tensor is contiguous."""
        for chunk in self.chunks:
            yield chunk, self.tensors[chunk.tensor].detach().reshape(-1).narrow(0, chunk.offset, chunk.length)

    def on(self, base: Base) -> Snapshot:
        """Returns this without frozen weights, which are in `base`."""
        return self._only(tuple(kind for kind in KINDS if kind != "frozen"), replace(self.facts, base=base))

    def only_frozen(self) -> Snapshot:
        """Returns the frozen weights alone."""
        tensors = {key: whole for key, whole in self.facts.tensors.items() if split_key(key)[0] == "frozen"}
        return self._only(("frozen",), replace(self.facts, tensors=tensors, adam_steps={}, loss_scale=None))

    def beside(self, companion: Snapshot) -> Snapshot:
        """Returns this and what is trained beside it, whose loss has no scale of its own."""
        first, facts = len(self.tensors), companion.facts
        assert facts.loss_scale is None, "a companion's engine is not in fp16"
        own = {
            tensor_key(kind, COMPANION + name): whole
            for (kind, name), whole in ((split_key(key), whole) for key, whole in facts.tensors.items())
        }
        steps = {COMPANION + name: step for name, step in facts.adam_steps.items()}
        return replace(
            self,
            facts=replace(
                self.facts,
                tensors={**self.facts.tensors, **own},
                adam_steps={**self.facts.adam_steps, **steps},
            ),
            tensors=(*self.tensors, *companion.tensors),
            chunks=(
                *self.chunks,
                *(
                    replace(chunk, name=COMPANION + chunk.name, tensor=first + chunk.tensor)
                    for chunk in companion.chunks
                ),
            ),
        )

    def _only(self, kinds: Sequence[Kind], facts: EngineFacts) -> Snapshot:
        chunks = [chunk for chunk in self.chunks if chunk.kind in kinds]
        used = sorted({chunk.tensor for chunk in chunks})
        place = {tensor: index for index, tensor in enumerate(used)}
        return replace(
            self,
            facts=facts,
            tensors=tuple(self.tensors[tensor] for tensor in used),
            chunks=tuple(replace(chunk, tensor=place[chunk.tensor]) for chunk in chunks),
        )

    def plus(self, kind: Kind, shards: Sequence[Tensor], slices: Sequence[Sequence[ShardSlice]]) -> Snapshot:
        """Returns this and one more kind of the trained parameters.

        Args:
            kind: One of `OF_TRAINED` that is not in it.
            shards: Those that this rank writes; none where another rank writes all.
            slices: For each shard, what lies in it.
        """
        first = len(self.tensors)
        own = tuple(
            chunk
            for index, parts in enumerate(slices)
            for chunk in chunks_of(kind, parts, tensor=first + index)
        )
        whole = {
            tensor_key(kind, name): self.facts.tensors[tensor_key("master", name)]
            for name in self.facts.names("master")
        }
        facts = replace(self.facts, tensors={**self.facts.tensors, **whole})
        return replace(self, facts=facts, tensors=(*self.tensors, *shards), chunks=(*self.chunks, *own))


class StateReader(Protocol):
    """What an engine or an average restores itself from."""

    @property
    def facts(self) -> EngineFacts:
        """What is there."""

    def read(self, kind: Kind, name: str, start: int, length: int) -> Tensor:
        """Returns a range of a flattened tensor [length] on the CPU, in its own type: a new tensor.

        Raises:
            CheckpointError: If there is no such tensor or it cannot be read.
        """


def tensor_key(kind: Kind, name: str) -> str:
    """Returns how a tensor is called in files: `<kind>/<name>`."""
    return f"{kind}/{name}"


def split_key(key: str) -> tuple[Kind, str]:
    """Returns kind and name of what `tensor_key` made.

    Raises:
        CheckpointError: If the kind is unknown or the name empty.
    """
    kind, _, name = key.partition("/")
    if kind not in KINDS or not name:
        raise CheckpointError(
            f"{key[:200]!r}: must be <kind>/<name> with a kind of {', '.join(KINDS)}. It is damaged."
        )
    return kind, name


def chunks_of(kind: Kind, slices: Sequence[ShardSlice], *, tensor: int) -> Iterator[Chunk]:
    """Yields the chunks of one shard."""
    for part in slices:
        yield Chunk(
            kind=kind, name=part.name, tensor=tensor, start=part.start, offset=part.offset, length=part.length
        )


@torch.no_grad()
def fill(
    source: StateReader, kind: Kind, shards: Sequence[Tensor], slices: Sequence[Sequence[ShardSlice]]
) -> None:
    """Copies what `slices` say from `source` into `shards`; what lies between, as padding does, stays.

    Args:
        source: Has the kind for every name in `slices`.
        shards: On any device; each is contiguous, or one whole parameter.
        slices: For each shard, what lies in it.

    Raises:
        CheckpointError: If something is not there.
    """
    for shard, parts in zip(shards, slices, strict=True):
        for part in parts:
            values = source.read(kind, part.name, part.start, part.length)
            if part.length == shard.numel():
                shard.copy_(values.view(shard.shape))
            else:
                shard.view(-1).narrow(0, part.offset, part.length).copy_(values)


def _counts(name: str, values: object) -> dict[str, int]:
    if not isinstance(values, dict) or any(type(value) is not int for value in values.values()):
        raise CheckpointError(
            f"{name}: must be a mapping to whole numbers, got {str(values)[:80]}. It is damaged."
        )
    return dict(values)


def _loss_scale(values: object) -> LossScale | None:
    if values is None:
        return None
    if not isinstance(values, dict) or set(values) != set(LossScale.__dataclass_fields__):
        raise CheckpointError(
            f"loss_scale: must be null or have its fields, got {str(values)[:80]}. It is damaged."
        )
    counts = _counts("loss_scale", {name: value for name, value in values.items() if name != "scale"})
    if type(values["scale"]) not in {int, float}:
        raise CheckpointError(
            f"loss_scale: must be a number, got {str(values['scale'])[:80]}. It is damaged."
        )
    return LossScale(scale=float(values["scale"]), **counts)


def _tensors(values: object) -> dict[str, TensorMetadata]:
    if not isinstance(values, dict):
        raise CheckpointError(f"tensors: must be a mapping, got {str(values)[:80]}. It is damaged.")
    return {key: _whole(key, value) for key, value in values.items()}


def _whole(key: str, value: object) -> TensorMetadata:
    kind, _ = split_key(key)
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    shape, dtype = entry.get("shape"), entry.get("dtype")
    is_shape = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
    if (
        set(entry) != {"shape", "dtype"}
        or not is_shape
        or not isinstance(getattr(torch, str(dtype), None), torch.dtype)
    ):
        raise CheckpointError(
            f"tensors: {key[:200]} must have a shape and a dtype, got {str(value)[:80]}. It is damaged."
        )
    if kind in OF_TRAINED and dtype != "float32":
        raise CheckpointError(f"tensors: {key[:200]} must be float32, got {dtype}. It is damaged.")
    return TensorMetadata(shape=tuple(cast("list[int]", shape)), dtype=str(dtype))
