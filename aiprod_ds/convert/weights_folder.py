"""Weights in diffusers' layout, read and written tensor by tensor: one safetensors file, or several and an
index.

    config.json
    diffusion_pytorch_model.safetensors
    diffusion_pytorch_model-00001-of-00002.safetensors, ..., diffusion_pytorch_model.safetensors.index.json

Weights without a class of diffusers are called `model` in place of `diffusion_pytorch_model`, as transformers
has it. Knows names, tensors and files, and nothing about models. What is written is whole or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.checkpoint.disk import explained
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import read_text, sync, write_atomically
from aiprod_ds.tensor_file import (
    TensorFile,
    TensorFileError,
    TensorSource,
    TensorSpec,
    by_width,
    write_tensor_file,
)

CONFIG = "config.json"
DIFFUSERS_STEM, PLAIN_STEM = "diffusion_pytorch_model", "model"
SHARD_BYTES = 10 * 10**9  # as diffusers cuts its own files
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"


class WeightsFolder(TensorSource):
    """The tensors of a folder by name, each read when it is asked for; they come in the order of the files.

    Args:
        folder: In the layout above.

    Attributes:
        stem: What the files' names begin with, `diffusion_pytorch_model` or `model`.

    Raises:
        CheckpointError: If the folder has another layout or its files are not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stem = _stem(folder)
        self._files = {file: open_tensors(folder / file) for file in _file_names(folder, self.stem)}
        self._file_of = {name: file for file, opened in self._files.items() for name in opened}
        self.specs = {name: self._files[file].specs[name] for name, file in self._file_of.items()}
        _require_index(folder, self.stem, self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            return self._files[file][name]
        except TensorFileError as error:
            raise _unreadable(self.folder / file, error) from error

    def file_of(self, name: str) -> str:
        """Returns the name of the file that holds a tensor."""
        return self._file_of[name]

    def paths(self) -> tuple[Path, ...]:
        """Returns the files."""
        return tuple(self.folder / file for file in sorted(self._files))

    def require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See the function `require_shapes`; messages name the folder."""
        require_shapes(self, shapes, where=str(self.folder))


def open_tensors(path: Path) -> TensorFile:
    """Returns an open safetensors file.

    Raises:
        CheckpointError: If it is none.
    """
    try:
        return TensorFile(path)
    except TensorFileError as error:
        raise _unreadable(path, error) from error


def require_shapes(source: TensorSource, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Checks names and shapes without reading any tensor.

    Args:
        source: What there is.
        shapes: By name, of all tensors that the model has.
        where: How the message names the source.

    Raises:
        CheckpointError: If one is missing, surplus or of another shape.
    """
    own = {name: spec.shape for name, spec in source.specs.items()}
    wrong = [name for name in sorted({*own, *shapes}) if own.get(name) != shapes.get(name)]
    if wrong:
        told = "; ".join(
            f"{name} {own.get(name, 'none')} instead of {shapes.get(name, 'none')}" for name in wrong[:3]
        )
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{where}: must hold the weights of its {CONFIG}, got {told}{more}. Take those of this model."
        )


def write_like(source: WeightsFolder, folder: Path, tensors: TensorSource) -> None:
    """Writes another state of the model in `source`, with its configuration, cut into files as `source` is.

    Args:
        source: Names, files and configuration are taken from it.
        folder: Must not exist.
        tensors: The values, under the names of `source`; types may be others.

    Raises:
        CheckpointError: If `folder` exists.
    """
    groups: dict[str, list[str]] = {}
    for name in source:
        groups.setdefault(source.file_of(name), []).append(name)
    with new_folder(folder) as pending:
        _write_files(pending, source.stem, groups, tensors)
        shutil.copyfile(source.folder / CONFIG, pending / CONFIG)


def write_weights(
    tensors: TensorSource,
    folder: Path,
    *,
    stem: str = DIFFUSERS_STEM,
    shard_bytes: int = SHARD_BYTES,
    config: str | None = None,
) -> None:
    """Writes weights in the layout above; memory holds one tensor.

    Args:
        tensors: In the order in which files are filled.
        folder: Must not exist.
        stem: What the files' names begin with.
        shard_bytes: The most that one file holds, unless a single tensor is larger.
        config: Text of `config.json`; None writes none.

    Raises:
        CheckpointError: If `folder` exists.
    """
    groups = _cut(tensors.specs, stem, shard_bytes)
    with new_folder(folder) as pending:
        _write_files(pending, stem, groups, tensors)
        if config is not None:
            write_atomically(pending / CONFIG, config)


def write_one_file(tensors: TensorSource, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes weights as one safetensors file; memory holds one tensor.

    Args:
        tensors: Wide types are written first, else in the order given.
        path: Must not exist.
        metadata: Text by name.

    Raises:
        CheckpointError: If `path` exists.
    """
    with new_file(path) as pending:
        specs = by_width(tensors.specs)
        write_tensor_file(pending, specs, ((name, tensors[name]) for name in specs), metadata=metadata)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives `<folder>.pending` to write into, flushes it to disk and renames it at the end; after an error it
    is removed.

    What a killed call left there is removed by the next.

    Raises:
        CheckpointError: If `folder` exists or the disk fails; `DiskFullError` if there is no room.
    """
    require_absent(folder)
    pending = folder.with_name(f"{folder.name}.pending")
    with explained(folder):
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        try:
            yield pending
            for path in (*pending.rglob("*"), pending):
                sync(path)
            pending.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(pending, ignore_errors=True)
            raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As `new_folder`, of one file: gives `<path>.pending`.

    Raises:
        CheckpointError: If `path` exists or the disk fails; `DiskFullError` if there is no room.
    """
    require_absent(path)
    pending = path.with_name(f"{path.name}.pending")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pending.unlink(missing_ok=True)
        try:
            yield pending
            sync(pending)
            pending.rename(path)
            sync(path.parent)
        except BaseException:
            pending.unlink(missing_ok=True)
            raise


def require_absent(path: Path) -> None:
    """Refuses to overwrite.

    Raises:
        CheckpointError: If `path` exists.
    """
    if path.exists():
        raise CheckpointError(
            f"{path}: must not exist yet, got a {'folder' if path.is_dir() else 'file'}. Name another or "
            "remove it."
        )


def require_equal(actual: Mapping[str, Tensor], expected: Iterable[tuple[str, Tensor]]) -> None:
    """Compares what was written, bit by bit: a NaN equals itself.

    Raises:
        CheckpointError: If types, shapes or values differ.
    """
    for name, tensor in expected:
        written = actual[name]
        if TensorSpec.of(written) != TensorSpec.of(tensor) or not torch.equal(_bits(written), _bits(tensor)):
            raise CheckpointError(
                f"{name}: must be what was computed, got other values in the file. Check the disk and write "
                "again."
            )


def _write_files(pending: Path, stem: str, groups: Mapping[str, list[str]], tensors: TensorSource) -> None:
    for file, names in groups.items():
        specs = by_width({name: tensors.specs[name] for name in names})
        write_tensor_file(pending / file, specs, ((name, tensors[name]) for name in specs))
    if list(groups) != [f"{stem}{_SUFFIX}"]:
        files = {name: file for file, names in groups.items() for name in names}
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in tensors.specs.values())},
            "weight_map": files,
        }
        write_atomically(pending / f"{stem}{_INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")


def _cut(specs: Mapping[str, TensorSpec], stem: str, shard_bytes: int) -> dict[str, list[str]]:
    """Returns the names of the tensors of each file: the next file begins where a tensor does not fit into
    the one before."""
    files: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not files or (spec.nbytes > room and files[-1]):
            files.append([])
            room = shard_bytes
        files[-1].append(name)
        room -= spec.nbytes
    if len(files) == 1:
        return {f"{stem}{_SUFFIX}": files[0]}
    return {
        f"{stem}-{number:05d}-of-{len(files):05d}{_SUFFIX}": names
        for number, names in enumerate(files, start=1)
    }


def _stem(folder: Path) -> str:
    for stem in (DIFFUSERS_STEM, PLAIN_STEM):
        if (folder / f"{stem}{_INDEX_SUFFIX}").is_file() or (folder / f"{stem}{_SUFFIX}").is_file():
            return stem
    raise CheckpointError(
        f"{folder}: must hold {DIFFUSERS_STEM}{_SUFFIX} or {DIFFUSERS_STEM}{_INDEX_SUFFIX}, got neither. "
        "Name the folder of the transformer."
    )


def _file_names(folder: Path, stem: str) -> list[str]:
    index = folder / f"{stem}{_INDEX_SUFFIX}"
    return sorted(set(_weight_map(index).values())) if index.is_file() else [f"{stem}{_SUFFIX}"]


def _require_index(folder: Path, stem: str, found: Mapping[str, str]) -> None:
    index = folder / f"{stem}{_INDEX_SUFFIX}"
    told = _weight_map(index) if index.is_file() else found
    if found != told:
        wrong = sorted({name for name in {*found, *told} if found.get(name) != told.get(name)})
        raise CheckpointError(
            f"{index}: must say what the files hold, got {', '.join(wrong[:3])}. Load it again."
        )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        told = json.loads(read_text(path))["weight_map"]
        files = {str(name): str(file) for name, file in told.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: must hold a weight_map from tensors to files, got {error!r}. Load it again."
        ) from error
    outside = next(
        (file for file in files.values() if Path(file).name != file or not file.endswith(_SUFFIX)), None
    )
    if outside is not None:
        raise CheckpointError(
            f"{path}: must name safetensors files beside it, got {outside!r}. Do not use this folder."
        )
    return files


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _unreadable(path: Path, error: TensorFileError) -> CheckpointError:
    return CheckpointError(f"{path}: must be a safetensors file, got {error}. Load it again.")
