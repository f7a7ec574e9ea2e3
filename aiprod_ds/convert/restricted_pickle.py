"""The only place that opens pickles of others: files of `torch.save` and the `.metadata` of
torch.distributed.checkpoint.

A pickle can name any function of the machine and have it called. Here only the names below are resolved,
everything else is an error before anything is called; and nothing is opened unless the user said that the
folder is trusted, because torch's own reader of tensors is large. DeepSpeed's classes are replaced by one
that keeps nothing, so that DeepSpeed is not imported.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch

from aiprod_ds.errors import CheckpointError

_MAX_METADATA_BYTES = 1 << 30
# What a damaged pickle, or one that is refused, ends in.
_FAILURES = (
    *(
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
    ),
    *(ValueError, pickle.UnpicklingError),
)
# What DeepSpeed 0.19 saves beside tensors; none of it is needed.
_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}


class Ignored:
    """Stands for an object whose content is not needed."""

    def __init__(self, *_: object) -> None:
        return

    def __setstate__(self, _: object) -> None:
        return


def require_trust(folder: Path, *, is_trusted: bool, what: str) -> None:
    """Refuses to go on with a folder of pickles, unless the user said that it is trusted. Call it before
    opening anything.

    Raises:
        CheckpointError: If it is not.
    """
    if not is_trusted:
        raise CheckpointError(
            f"{folder}: is {what}, whose files are pickles, and has no manifest of ours. A pickle from "
            "someone else can run any "
            "program. If it is your own, give --trust-checkpoint."
        )


def load_saved(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a file of `torch.save`, its tensors mapped and not yet read.

    Raises:
        CheckpointError: If it is damaged, no dictionary, or names anything but tensors and what DeepSpeed
            saves beside them.
    """
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (Ignored, name) for name in _DEEPSPEED_CLASSES
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _FAILURES as error:
        raise _refused(path, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: must hold a dictionary, got {type(value).__name__}. Take a whole checkpoint."
        )
    return value


def load_blob(path: Path, offset: int, length: int) -> torch.Tensor:
    """Returns the tensor that `torch.save` wrote into a part of a file.

    Raises:
        CheckpointError: If there is something else.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            value = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except _FAILURES as error:
        raise _refused(path, error) from None
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{path}: must hold a tensor at byte {offset}, got {type(value).__name__}. Take a whole "
            "checkpoint."
        )
    return value


def load_metadata(path: Path) -> Any:
    """Returns the `Metadata` of torch.distributed.checkpoint.

    Raises:
        CheckpointError: If it is damaged or names anything else than that class is made of.
    """
    if path.stat().st_size > _MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{path}: must have at most {_MAX_METADATA_BYTES} bytes, got {path.stat().st_size}."
        )
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except _FAILURES as error:
        raise _refused(path, error) from None


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return PurePosixPath  # where the folder was when it was saved
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"the name {module}.{name}, which has no place there")


def _refused(path: Path, error: Exception) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch's first line advises to load it nevertheless; why it did not is further below.
    reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])[:300].rstrip(".")
    return CheckpointError(
        f"{path}: must hold tensors and nothing else that is loaded, got: {reason}. Do not use this file."
    )
