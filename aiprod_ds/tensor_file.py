"""One safetensors file: opened only if its header can be believed, read in any piece, written tensor by
tensor.

Owns the bytes of the format and the checks that stand before them: every reader of a user's safetensors file
opens it here. Knows nothing about what the tensors mean. The library reads out of a mapped file and writes a
dictionary that is in memory as a whole; here memory holds what was asked for, and a file may be larger than
memory.

The format: 8 bytes with the length of the header, little-endian; the header, JSON with `dtype`, `shape` and
`data_offsets` of every tensor and text in `__metadata__`; the data without gaps. Source:
github.com/huggingface/safetensors, README.md.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

_MAX_HEADER_BYTES = 100_000_000  # the bound of the library
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_AT_ONCE_BYTES = 16 << 20  # what is written is still in a cache when it is observed
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFileError(ValueError):
    """The file is missing, damaged or hostile; the message says what was found, and readers say whose file it
    is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements; 1 of a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Returns that of a tensor."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape))


class TensorSource(Mapping[str, Tensor]):
    """Tensors by name, each read or computed when it is asked for; names, shapes and types are known before.

    Attributes:
        specs: Of every tensor, in the order in which they are read best.
    """

    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class TensorFile(TensorSource):
    """The tensors of one safetensors file.

    Args:
        path: A regular file or a link to one.

    Attributes:
        specs: In the order of the data.
        metadata: Text by name.

    Raises:
        TensorFileError: If it cannot be opened, its header is larger than the file or 100 MB or no such JSON,
            or its offsets leave gaps, overlap, do not fit types and shapes or end elsewhere than the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            raise TensorFileError(str(error)) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            length, header = _read_header(self._descriptor)
            self.metadata, self.specs, self._starts = _parse(header, data_bytes=length)
        except OSError as error:  # the disk fails, or it is no file of a disk
            self.close()
            raise TensorFileError(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._data_start = _LENGTH_BYTES + len(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; without a call it happens with the object's end."""
        self._close()

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        value = torch.empty(spec.numel, dtype=spec.dtype, device="cpu")
        self.read_into(value, name)
        return value.reshape(spec.shape)

    def read_into(self, target: Tensor, name: str, start: int = 0) -> None:
        """Fills a tensor from element `start` of the flattened one.

        Args:
            target: [elements], contiguous, of the same type, on the CPU.
            start: First element.

        Raises:
            KeyError: If there is no such tensor.
            TensorFileError: If the file became shorter since it was opened, or the disk fails.
        """
        spec = self.specs[name]
        assert target.dtype == spec.dtype and target.is_contiguous(), (
            "the target is memory of the tensor's type"
        )
        assert 0 <= start <= start + target.numel() <= spec.numel, "the range lies inside the tensor"
        self._fill(_bytes_of(target), self._data_start + self._starts[name] + start * spec.dtype.itemsize)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            while buffer:
                done = os.preadv(self._descriptor, [buffer], offset)
                if not done:
                    raise TensorFileError("a file that became shorter while it was read")
                buffer, offset = buffer[done:], offset + done
        except OSError as error:
            raise TensorFileError(str(error)) from error


def write_tensor_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    observe: Callable[[memoryview], object] = lambda _: None,
) -> None:
    """Writes a file that every reader of safetensors reads; memory holds one tensor.

    Args:
        path: Written in place; the caller renames it when it is whole.
        specs: Of every tensor, in the order in which they come. Types should become narrower in that order,
            or some tensors start at odd addresses, which mapped readers must copy.
        tensors: The same names in the same order, on the CPU.
        metadata: Text by name; `format: pt` is added.
        observe: Is given all bytes of the file, in order; a hash's `update`.

    Raises:
        OSError: If the disk fails.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    names = iter(specs)
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text), observe)
        for name, tensor in tensors:
            assert name == next(names, None), "the tensors are those of the specs, in their order"
            assert TensorSpec.of(tensor) == specs[name], f"{name} is what its spec says"
            _write_all(file, _bytes_of(tensor.detach().contiguous()), observe)
    assert next(names, None) is None, "all tensors were given"


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a file that is in memory as a whole; each has memory of its own.

    Raises:
        TensorFileError: As `TensorFile`.
    """
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(len(data) - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise TensorFileError(f"a header of {length} bytes in a file of {len(data)}")
    first = _LENGTH_BYTES + length
    _, specs, starts = _parse(data[_LENGTH_BYTES:first], data_bytes=len(data) - first)
    found = {}
    for name, spec in specs.items():
        value = torch.empty(spec.numel, dtype=spec.dtype, device="cpu")
        if spec.nbytes:
            _bytes_of(value)[:] = memoryview(data)[first + starts[name] : first + starts[name] + spec.nbytes]
        found[name] = value.reshape(spec.shape)
    return found


def by_width(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Returns the same specs in an order that keeps every tensor of a file aligned: wide types first."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data  # numpy has no bfloat16


def _write_all(file: Any, buffer: memoryview, observe: Callable[[memoryview], object]) -> None:
    while buffer:
        done = file.write(buffer[:_AT_ONCE_BYTES])
        observe(buffer[:done])
        buffer = buffer[done:]


def _read_header(descriptor: int) -> tuple[int, bytes]:
    """Returns the bytes of the data and the header."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise TensorFileError("something that is no regular file")
    length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    if not 2 <= length <= min(status.st_size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise TensorFileError(f"a header of {length} bytes in a file of {status.st_size}")
    header = os.pread(descriptor, length, _LENGTH_BYTES)
    return status.st_size - _LENGTH_BYTES - length, header


def _parse(header: bytes, *, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorSpec], dict[str, int]]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata = entries.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TensorFileError("metadata that is not text")
        found = sorted((_range(entry), name, _spec(entry)) for name, entry in entries.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = (
            str(error)
            if isinstance(error, TensorFileError)
            else f"a header that is none ({type(error).__name__})"
        )
        raise TensorFileError(reason) from error
    end = 0
    for (start, stop), name, spec in found:
        if start != end or stop - start != spec.nbytes:
            raise TensorFileError(
                f"offsets [{start}, {stop}) of {name}, which must be [{end}, {end + spec.nbytes})"
            )
        end = stop
    if end != data_bytes:
        raise TensorFileError(f"{data_bytes} bytes of data where the header tells of {end}")
    return metadata, {name: spec for _, name, spec in found}, {name: start for (start, _), name, _ in found}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise TensorFileError("a header that names something twice")
    return values


def _range(entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return _count(start), _count(stop)


def _spec(entry: Any) -> TensorSpec:
    if entry["dtype"] not in _DTYPES:
        raise TensorFileError(f"a tensor of the type {str(entry['dtype'])[:20]!r}")
    return TensorSpec(dtype=_DTYPES[entry["dtype"]], shape=tuple(_count(size) for size in entry["shape"]))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TensorFileError(f"{str(value)[:20]!r} as a size")
    return value
