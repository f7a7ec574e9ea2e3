"""One safetensors file: what the library reads and writes is the oracle, and hostile files are refused by
both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_ds.tensor_file import (
    TensorFile,
    TensorFileError,
    TensorSpec,
    by_width,
    tensors_in,
    write_tensor_file,
)


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "eight": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "gewöhnlich": torch.arange(4, dtype=torch.uint8),
    }


def _equal(first: Tensor, second: Tensor) -> bool:
    return TensorSpec.of(first) == TensorSpec.of(second) and first.reshape(-1).view(torch.uint8).equal(
        second.reshape(-1).view(torch.uint8)
    )


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"rank": "4"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"rank": "4"}
        assert file.keys() == tensors.keys()
        assert all(_equal(file[name], value) for name, value in tensors.items())
        assert file.specs == {name: TensorSpec.of(file[name]) for name in file}
        part = torch.zeros(6)
        file.read_into(part[1:5], "weight", 5)
        assert torch.equal(
            part, torch.cat([torch.zeros(1), tensors["weight"].flatten()[5:9], torch.zeros(1)])
        )


def test_a_file_in_memory_is_read_alike_and_keeps_no_hold_on_it(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"rank": "4"})
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    found = tensors_in(bytes(data))
    assert found.keys() == tensors.keys()
    assert all(_equal(found[name], value) for name, value in tensors.items())
    found["weight"].zero_()
    assert _equal(tensors_in(bytes(data))["weight"], tensors["weight"])


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_that_is_not_whole_in_memory_is_refused(tmp_path: Path, length: int) -> None:
    save_file(_tensors(), tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError):
        tensors_in((tmp_path / "x.safetensors").read_bytes()[:length])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = _tensors()
    specs = by_width({name: TensorSpec.of(value) for name, value in tensors.items()})
    write_tensor_file(
        tmp_path / "x.safetensors", specs, ((name, tensors[name]) for name in specs), metadata={"a": "b"}
    )
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(_equal(read[name], value) for name, value in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'touch hit'\ntR.", "a header of .* bytes in a file of"),
    "header beyond the file": (_file({}, length=1000), "a header of 1000 bytes in a file of 10"),
    "huge header": (_file({}, length=1 << 30), "a header of 1073741824 bytes"),
    "largest header": (_file({}, length=(1 << 64) - 1), "a header of 18446744073709551615 bytes"),
    "no JSON": (_file(b"{" * 10), r"a header that is none \(JSONDecodeError\)"),
    "no text": (_file(b'{"\xff": 1}'), r"a header that is none \(UnicodeDecodeError\)"),
    "deep JSON": (_file(b"[" * 100_000), r"a header that is none"),
    "a list": (_file([1]), "a header that is none"),
    "one name twice": (
        _file(
            b'{"a":%b,"a":%b}' % (json.dumps(_entry(0, 4)).encode(), json.dumps(_entry(4, 8)).encode()),
            b"\0" * 8,
        ),
        "a header that names something twice",
    ),
    "overlap": (
        _file({"a": _entry(0, 4), "b": _entry(2, 6)}, b"\0" * 6),
        r"offsets \[2, 6\) of b, which must be \[4, 8\)",
    ),
    "same bytes": (
        _file({"a": _entry(0, 4), "b": _entry(0, 4)}, b"\0" * 4),
        r"offsets \[0, 4\) of b, which must be \[4, 8\)",
    ),
    "gap": (_file({"a": _entry(0, 4), "b": _entry(8, 12)}, b"\0" * 12), r"offsets \[8, 12\) of b"),
    "backwards": (_file({"a": _entry(4, 0)}, b"\0" * 4), r"offsets \[4, 0\) of a"),
    "negative": (_file({"a": _entry(-4, 0)}, b"\0" * 4), "'-4' as a size"),
    "truncated": (_file({"a": _entry(0, 4)}, b"\0" * 3), "3 bytes of data where the header tells of 4"),
    "longer": (_file({"a": _entry(0, 4)}, b"\0" * 5), "5 bytes of data where the header tells of 4"),
    "shape and bytes": (
        _file({"a": _entry(0, 4, [2])}, b"\0" * 4),
        r"offsets \[0, 4\) of a, which must be \[0, 8\)",
    ),
    "large shape": (_file({"a": _entry(0, 4, [1 << 62, 1 << 62])}, b"\0" * 4), r"offsets \[0, 4\) of a"),
    "no size": (_file({"a": _entry(0, 4, [1.0])}, b"\0" * 4), "'1.0' as a size"),
    "unknown type": (_file({"a": _entry(0, 4, dtype="F31")}, b"\0" * 4), "a tensor of the type 'F31'"),
    "no offsets": (
        _file({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        r"a header that is none \(KeyError\)",
    ),
    "metadata": (_file({"__metadata__": {"a": 1}}), "metadata that is not text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match=message):
        TensorFile(path)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")  # the library is no less strict
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(b"{}", length=1 << 30))
    os.truncate(path, 2 << 30)  # sparse
    with pytest.raises(TensorFileError, match="a header of 1073741824 bytes in a file of 2147483648"):
        TensorFile(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, str], ids=["folder", "pipe", "nothing"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    with pytest.raises(TensorFileError, match=r"no regular file|No such file"):
        TensorFile(tmp_path / "x")


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(TensorFileError, match="a file that became shorter"):
            file["a"]
