"""The tensors of a checkpoint: chunks of whole tensors, in two safetensors files for each rank that wrote
some.

    engine.json                             `EngineFacts`: what there is, in whole tensors
    rank_00000_of_00002.safetensors         the chunks of rank 0, by `<kind>/<name>`; metadata
                                            `starts`: JSON {key: first element}
    rank_00000_of_00002.moments.safetensors the same of `MOMENTS`, which only training needs

Owns these files: writing a rank's own, and reading any range of any tensor from all of them. Who reads needs
neither the number of ranks nor the ZeRO stage that wrote, and finds moments beside weights too, where
checkpoints had them before. Nothing is unpickled. Commit and hashes are `store.py` and `manifest.py`.

Frozen weights may be elsewhere (`EngineFacts.base`): in `bases/<sha256>/engine` beside the checkpoints, which
is read as if it were here, or only where the run started from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from aiprod_ds.checkpoint.manifest import FileRecord, read_mapping
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import sync
from aiprod_ds.snapshot import (
    COMPANION,
    MOMENTS,
    Base,
    Chunk,
    EngineFacts,
    Kind,
    Snapshot,
    TensorMetadata,
    split_key,
    tensor_key,
)
from aiprod_ds.tensor_file import TensorFile, TensorFileError, TensorSpec, by_width, write_tensor_file

FACTS = "engine.json"
_STARTS = "starts"
_SUFFIX, _MOMENTS_SUFFIX = ".safetensors", ".moments.safetensors"
_FILE = re.compile(r"rank_([0-9]{5,})_of_([0-9]{5,})(\.moments)?\.safetensors")


def base_folder(checkpoints: Path, sha256: str) -> Path:
    """Returns where a stored base is, below the folder of a run's checkpoints."""
    return checkpoints / "bases" / sha256


def write_shards(folder: Path, state: Snapshot) -> dict[str, FileRecord]:
    """Writes this rank's files, each if it has chunks for it, and on rank 0 the facts, into an existing
    folder, down to the disk.

    Waits for nobody. Memory holds one tensor; its bytes are hashed as they are written.

    Args:
        folder: The one that all ranks write into; the files' names say whose they are.
        state: Its tensors must not change before this returns. Those on a GPU are copied to the host one by
            one.

    Returns:
        Size and hash of what was written, by name.

    Raises:
        OSError: If the disk fails.
    """
    written: dict[str, FileRecord] = {}
    chunks = {tensor_key(chunk.kind, chunk.name): (chunk, values) for chunk, values in state.chunk_values()}
    assert len(chunks) == len(state.chunks), "a rank has one chunk of a tensor"
    for suffix in (_SUFFIX, _MOMENTS_SUFFIX):
        own = {
            key: chunk
            for key, chunk in chunks.items()
            if (chunk[0].kind in MOMENTS) == (suffix == _MOMENTS_SUFFIX)
        }
        if own:
            name = f"rank_{state.rank:05d}_of_{state.facts.world_size:05d}{suffix}"
            written[name] = _write_file(folder / name, own)
    if state.rank == 0:
        text = json.dumps(state.facts.to_dict(), indent=1, sort_keys=True) + "\n"
        (folder / FACTS).write_text(text, encoding="utf-8")
        written[FACTS] = FileRecord(
            bytes=len(text.encode()), sha256=hashlib.sha256(text.encode()).hexdigest()
        )
    # Here, because the main rank, which commits, cannot empty another host's cache onto the disk.
    for name in written:
        sync(folder / name)
    return written


def holds_moments_only(name: str) -> bool:
    """Returns whether a file is so called that readers of weights need not read it; one with other chunks is
    refused."""
    return name.endswith(_MOMENTS_SUFFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredChunk:
    file: str
    start: int
    length: int


class ShardReader:
    """Reads ranges of whole tensors; a `StateReader`, and a context that closes the files.

    Opening reads headers only and checks all of them: every tensor of `engine.json` is there exactly once, in
    its type, and nothing else is. Memory holds what is returned.

    Args:
        folder: The `engine` folder of a checkpoint whose manifest was compared; for weights, but for the
            hashes of moments.
        of_companion: Whether it reads what was trained beside the model, in its place; without it nobody
            sees that.

    Raises:
        CheckpointError: If anything is missing, surplus, damaged or twice; names file and key.
    """

    def __init__(self, folder: Path, *, of_companion: bool = False) -> None:
        self.folder = folder
        self._prefix = COMPANION if of_companion else ""
        try:
            self._all = EngineFacts.from_dict(read_mapping(folder / FACTS))
            self.facts = self._all.of_companion() if of_companion else self._all.of_model()
        except CheckpointError as error:
            where = "" if str(error).startswith(str(folder)) else f"{folder / FACTS}: "
            raise CheckpointError(f"{where}{error}") from error
        base, checkpoints = self.facts.base, folder.absolute().parent.parent
        self._base = (
            ShardReader(base_folder(checkpoints, base.sha256) / "engine") if base and base.is_stored else None
        )
        self._opened: dict[str, TensorFile] = {}
        try:
            self._chunks = self._tiled()
            self._require_base()
        finally:
            self.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()

    def close(self) -> None:
        """Closes the files; the next read opens what it needs."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()
        if self._base is not None:
            self._base.close()

    def names(self, kind: Kind) -> tuple[str, ...]:
        """Returns the names of the tensors of one kind, sorted; of moments none before the first update."""
        return self.facts.names(kind)

    def metadata_of(self, kind: Kind, name: str) -> TensorMetadata:
        """Returns shape and type of a tensor.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        try:
            return self.facts.tensors[tensor_key(kind, name)]
        except KeyError as error:
            raise CheckpointError(
                f"{self.folder}: must hold {tensor_key(kind, name)}, got no such tensor. It is of another "
                "model or run."
            ) from error

    def read(self, kind: Kind, name: str, start: int, length: int) -> Tensor:
        """See `StateReader.read`; a range beyond the tensor's end is an error too."""
        whole, key = self.metadata_of(kind, name), tensor_key(kind, self._prefix + name)
        if kind == "frozen" and self.facts.base is not None:
            return self._read_base(self.facts.base, name, start, length)
        if not 0 <= start <= start + length <= whole.numel:
            raise CheckpointError(
                f"{self.folder}: {key} has {whole.numel} elements, got the range {start}+{length}."
            )
        result = torch.empty(length, dtype=getattr(torch, whole.dtype), device="cpu")
        # Who resumes has other shards than who saved: a range may lie in several chunks.
        for chunk in self._chunks[key]:
            begin, end = max(start, chunk.start), min(start + length, chunk.start + chunk.length)
            if begin < end:
                self._read_chunk(chunk, key, begin - chunk.start, result[begin - start : end - start])
        return result

    def whole(self, kind: Kind, name: str) -> Tensor:
        """Returns a whole tensor in its shape and type, on the CPU: a new tensor.

        Raises:
            CheckpointError: If there is no such tensor or it cannot be read.
        """
        whole = self.metadata_of(kind, name)
        return self.read(kind, name, 0, whole.numel).view(whole.shape)

    def _read_base(self, base: Base, name: str, start: int, length: int) -> Tensor:
        if self._base is None:
            raise CheckpointError(
                f"{self.folder}: holds no {tensor_key('frozen', name)}, only what was trained on "
                f"{base.origin}. Read it there."
            )
        return self._base.read("frozen", name, start, length)

    def _require_base(self) -> None:
        if self._base is None:
            return
        own, stored = (
            {name: reader.metadata_of("frozen", name) for name in reader.names("frozen")}
            for reader in (self, self._base)
        )
        if own != stored:
            raise CheckpointError(
                f"{self._base.folder}: must hold the frozen weights that {self.folder} names, got others."
            )

    def _read_chunk(self, chunk: _StoredChunk, key: str, first: int, target: Tensor) -> None:
        path = self.folder / chunk.file
        try:
            if chunk.file not in self._opened:
                self._opened[chunk.file] = TensorFile(path)
            self._opened[chunk.file].read_into(target, key, first)
        except TensorFileError as error:
            raise CheckpointError(f"{path}: {key} must be readable, got {error}. Check the disk.") from error

    def _tiled(self) -> dict[str, list[_StoredChunk]]:
        """Returns the chunks of every tensor in order, after checking that they are the whole of it."""
        has_all = self._all.base is None
        found: dict[str, list[_StoredChunk]] = {
            key: [] for key in self._all.tensors if has_all or split_key(key)[0] != "frozen"
        }
        for path in self._rank_files():
            for key, chunk, dtype in _chunks_in(path):
                whole = self._all.tensors.get(key)
                if whole is None or key not in found:
                    raise CheckpointError(
                        f"{path}: must hold tensors of {FACTS} only, got {key[:200]!r}. It is damaged."
                    )
                if holds_moments_only(path.name) and split_key(key)[0] not in MOMENTS:
                    raise CheckpointError(
                        f"{path}: must hold {' and '.join(MOMENTS)} only, got {key[:200]}. It is damaged."
                    )
                if dtype != whole.dtype:
                    raise CheckpointError(f"{path}: {key} must be {whole.dtype}, got {dtype}. It is damaged.")
                found[key].append(chunk)
        for key, chunks in found.items():
            chunks.sort(key=lambda chunk: chunk.start)
            end = 0
            for chunk in chunks:
                if chunk.start != end:
                    raise CheckpointError(
                        f"{self.folder / chunk.file}: {key} must go on at element {end}, got a piece from "
                        f"{chunk.start}. "
                        "A piece is missing or there twice."
                    )
                end += chunk.length
            if end != self._all.tensors[key].numel:
                raise CheckpointError(
                    f"{self.folder}: {key} must have {self._all.tensors[key].numel} elements, got {end}. A "
                    "piece is missing."
                )
        return found

    def _rank_files(self) -> list[Path]:
        paths = sorted(path for path in self.folder.iterdir() if path.name != FACTS)
        for path in paths:
            match = _FILE.fullmatch(path.name)
            is_own = match is not None and int(match[1]) < int(match[2]) == self.facts.world_size
            if not is_own or path.is_symlink() or not path.is_file():
                raise CheckpointError(
                    f"{path}: must be a file of one of {self.facts.world_size} ranks. Remove it."
                )
        return paths


def _write_file(path: Path, chunks: Mapping[str, tuple[Chunk, Tensor]]) -> FileRecord:
    specs = by_width({key: TensorSpec.of(values) for key, (_, values) in chunks.items()})
    tensors = ((key, chunks[key][1].cpu()) for key in specs)
    starts = {key: chunks[key][0].start for key in specs}
    digest = hashlib.sha256()
    write_tensor_file(path, specs, tensors, metadata={_STARTS: json.dumps(starts)}, observe=digest.update)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def _chunks_in(path: Path) -> Iterator[tuple[str, _StoredChunk, str]]:
    """Yields key, chunk and type of everything in a file; reads its header only."""
    try:
        with TensorFile(path) as file:
            specs, starts = file.specs, _starts(path, file.metadata, file.specs)
    except TensorFileError as error:
        raise CheckpointError(f"{path}: must be a safetensors file, got {error}. It is damaged.") from error
    for key, spec in specs.items():
        if len(spec.shape) != 1 or spec.numel == 0:
            raise CheckpointError(
                f"{path}: {key[:200]} must be a range of numbers, got {list(spec.shape)}. It is damaged."
            )
        dtype = str(spec.dtype).removeprefix("torch.")
        yield key, _StoredChunk(file=path.name, start=starts[key], length=spec.numel), dtype


def _starts(path: Path, metadata: Mapping[str, str], keys: Collection[str]) -> dict[str, int]:
    try:
        starts = json.loads(metadata[_STARTS])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: metadata must hold {_STARTS} as JSON, got {error!r}. It is damaged."
        ) from error
    if not isinstance(starts, dict) or set(starts) != set(keys):
        raise CheckpointError(
            f"{path}: {_STARTS} must name the tensors of the file, got others. It is damaged."
        )
    for key, start in starts.items():
        if type(start) is not int or start < 0:
            raise CheckpointError(
                f"{path}: {key[:200]} must start at an element, got {str(start)[:80]}. It is damaged."
            )
    return starts
