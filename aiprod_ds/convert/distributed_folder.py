"""Checkpoints of torch.distributed.checkpoint, as FSDP and accelerate save them, read tensor by tensor
without a process group.

    .metadata           a pickle: every tensor with its shape, its chunks, and where the bytes of each are
    __0_0.distcp, ...   chunks, each written by `torch.save`

torch's own reader unpickles `.metadata` as it comes and fills a whole dictionary; here `restricted_pickle`
reads it, and memory holds one tensor. Layout as of torch 2.14, distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.convert.restricted_pickle import load_blob, load_metadata, require_trust
from aiprod_ds.errors import CheckpointError
from aiprod_ds.tensor_file import TensorSource, TensorSpec

METADATA = ".metadata"
_OF_ACCELERATE = "pytorch_model_fsdp_*"


def find_distributed_folder(folder: Path) -> Path | None:
    """Returns the folder with `.metadata`: `folder` itself, or the model's in what accelerate saved; None if
    there is none."""
    found = [folder, *sorted(folder.glob(_OF_ACCELERATE))] if folder.is_dir() else []
    return next((path for path in found if (path / METADATA).is_file()), None)


class DistributedFolder(TensorSource):
    """The tensors of a checkpoint of torch.distributed.checkpoint; what is no tensor is left out.

    Args:
        folder: The one with `.metadata`, from `find_distributed_folder`.
        is_trusted: Whether the user said so. Without it nothing is opened.

    Attributes:
        top_level: Names of the dictionaries that the tensors were saved in (`model`); empty where they were
            saved as they are.

    Raises:
        CheckpointError: If the folder is not trusted, damaged, incomplete, or names files outside itself.
    """

    def __init__(self, folder: Path, *, is_trusted: bool) -> None:
        self.folder = folder
        require_trust(folder, is_trusted=is_trusted, what="a checkpoint of torch.distributed.checkpoint")
        metadata = load_metadata(folder / METADATA)
        try:
            self._tensors = {
                name: value
                for name, value in metadata.state_dict_metadata.items()
                if hasattr(value, "chunks")
            }
            self._stored = {
                (index.fqn, _offsets(index.offset)): info
                for index, info in (metadata.storage_data or {}).items()
            }
            paths = metadata.planner_data or {}
            self.top_level = tuple(
                sorted({str(paths[name][0]) for name in self._tensors if len(paths.get(name, ())) > 1})
            )
            self.specs = {
                name: TensorSpec(dtype=value.properties.dtype, shape=tuple(value.size))
                for name, value in self._tensors.items()
            }
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{folder / METADATA}: must describe tensors, got {error!r}. It is damaged."
            ) from error
        for name in self._tensors:
            self._require_whole(name)

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in self._tensors[name].chunks:
            info = self._stored[name, _offsets(chunk.offsets)]
            part = load_blob(self._file(info), info.offset, info.length)
            wanted = TensorSpec(dtype=spec.dtype, shape=tuple(chunk.sizes))
            if TensorSpec.of(part) != wanted:
                raise CheckpointError(
                    f"{self._file(info)}: must hold {wanted} of {name}, got {TensorSpec.of(part)}."
                )
            place = whole
            for axis, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(axis, start, length)
            place.copy_(part)
        return whole

    def _require_whole(self, name: str) -> None:
        """Checks that the chunks are inside the tensor, as many numbers as it has, and in files of this
        folder."""
        spec, chunks = self.specs[name], self._tensors[name].chunks
        numel = 0
        for chunk in chunks:
            sizes, offsets = tuple(chunk.sizes), _offsets(chunk.offsets)
            is_inside = len(sizes) == len(offsets or ()) == len(spec.shape) and all(
                0 <= start <= start + size <= end
                for start, size, end in zip(offsets or (), sizes, spec.shape, strict=True)
            )
            info = self._stored.get((name, offsets))
            if not is_inside or info is None:
                raise CheckpointError(
                    f"{self.folder / METADATA}: {name} must have all its chunks, got others. It is damaged."
                )
            self._file(info)
            numel += torch.Size(sizes).numel()
        if numel != spec.numel:
            raise CheckpointError(
                f"{self.folder / METADATA}: {name} must have {spec.numel} numbers, got chunks with {numel}. "
                "It is damaged."
            )

    def _file(self, info: Any) -> Path:
        name, transforms = str(info.relative_path), getattr(info, "transform_descriptors", None)
        if Path(name).name != name or transforms:
            got = f"the file {name[:80]!r}" if not transforms else f"transformed by {transforms}"
            raise CheckpointError(
                f"{self.folder / METADATA}: must name plain files beside it, got {got}. Do not use this "
                "folder."
            )
        return self.folder / name


def _offsets(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(offset) for offset in value)
