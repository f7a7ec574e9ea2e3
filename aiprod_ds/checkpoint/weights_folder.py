"""Weights in diffusers' layout, read and written tensor by tensor: one safetensors file, or several and an index.

    config.json
    diffusion_pytorch_model.safetensors
    diffusion_pytorch_model-00001-of-00002.safetensors, ..., diffusion_pytorch_model.safetensors.index.json

Knows names, tensors and files, and nothing about models. A folder that is written is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import write_atomically

CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"


class WeightsFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for; they come in the order of the files.

    Args:
        folder: In the layout above.

    Raises:
        CheckpointError: If the folder has another layout or its files are not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files_by_tensor(folder)
        self._opened: tuple[str, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = self._open(self._file_of[name]).get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def file_of(self, name: str) -> str:
        """Returns the name of the file that holds a tensor."""
        return self._file_of[name]

    def require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks names and shapes without reading any tensor.

        Args:
            shapes: Of every tensor that the model has.

        Raises:
            CheckpointError: If one is missing, surplus or of another shape.
        """
        own = {name: tuple(self._open(file).get_slice(name).get_shape()) for name, file in self._file_of.items()}
        wrong = [name for name in sorted({*own, *shapes}) if own.get(name) != shapes.get(name)]
        if wrong:
            told = "; ".join(f"{name} {own.get(name, 'none')} instead of {shapes.get(name, 'none')}" for name in wrong[:3])
            raise CheckpointError(f"{self.folder}: must hold the weights of its {CONFIG}, got {told}. Load it again.")

    def _open(self, file: str) -> Any:
        """Returns the open file; only one at a time, so that the pages of others can go."""
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, _open_safetensors(self.folder / file))
        return self._opened[1]


def write_like(source: WeightsFolder, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes another state of the model in `source`, with its configuration, cut into files as `source` is.

    Memory holds the tensors of one file.

    Args:
        source: Names, files and configuration.
        folder: Must not exist.
        tensors: Every tensor of `source`, in its order.

    Raises:
        CheckpointError: If `folder` exists.
    """
    num_bytes = 0
    files: dict[str, str] = {}
    with new_folder(folder) as pending:
        for file, group in groupby(tensors, key=lambda pair: source.file_of(pair[0])):
            part = {name: tensor.contiguous() for name, tensor in group}
            save_file(part, pending / file, metadata={"format": "pt"})
            num_bytes += sum(tensor.nbytes for tensor in part.values())
            files |= dict.fromkeys(part, file)
            part.clear()  # or two files would be in memory while the next is collected
        assert list(files) == list(source), "the tensors are those of the source, in its order"
        if set(files.values()) != {_WEIGHTS}:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
            write_atomically(pending / _INDEX, json.dumps(index, indent=2) + "\n")
        shutil.copyfile(source.folder / CONFIG, pending / CONFIG)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives `<folder>.pending` to write into, flushes it to disk and renames it at the end; after an error nothing is renamed.

    What a killed call left there is removed by the next.

    Raises:
        CheckpointError: If `folder` exists.
    """
    require_absent(folder)
    pending = folder.with_name(f"{folder.name}.pending")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    yield pending
    for path in pending.rglob("*"):
        if path.is_file():
            _flush(path)
    pending.rename(folder)


def require_absent(path: Path) -> None:
    """Refuses to overwrite.

    Raises:
        CheckpointError: If `path` exists.
    """
    if path.exists():
        raise CheckpointError(
            f"{path}: must not exist yet, got a {'folder' if path.is_dir() else 'file'}. Name another or remove it."
        )


def require_equal(actual: Mapping[str, Tensor], expected: Iterable[tuple[str, Tensor]]) -> None:
    """Compares what was written, bit by bit.

    Raises:
        CheckpointError: If types, shapes or values differ.
    """
    for name, tensor in expected:
        written = actual[name]
        if written.dtype != tensor.dtype or not torch.equal(written, tensor):
            raise CheckpointError(
                f"{name}: must be what was computed, got other values in the file. Check the disk and write again."
            )


def _files_by_tensor(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).is_file():
        told = _weight_map(folder / _INDEX)
        files = sorted(set(told.values()))
    elif (folder / _WEIGHTS).is_file():
        told, files = None, [_WEIGHTS]
    else:
        raise CheckpointError(f"{folder}: must hold {_WEIGHTS} or {_INDEX}, got neither. Name the folder of the transformer.")
    found = {name: file for file in files for name in _open_safetensors(folder / file).keys()}  # noqa: SIM118
    if told is not None and found != told:
        wrong = sorted({name for name in {*found, *told} if found.get(name) != told.get(name)})
        raise CheckpointError(f"{folder}: {_INDEX} must say what the files hold, got {', '.join(wrong[:3])}. Load it again.")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in told.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: must hold a weight_map from tensors to files, got {error!r}. Load it again.") from error
    outside = next((file for file in files.values() if Path(file).name != file or not file.endswith(".safetensors")), None)
    if outside is not None:
        raise CheckpointError(f"{path}: must name safetensors files beside it, got {outside!r}. Do not use this folder.")
    return files


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: must be a safetensors file, got {error}. Load it again.") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
