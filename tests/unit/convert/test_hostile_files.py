"""Folders of pickles from someone else: refused before anything is opened, and harmless where they are
opened."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

from aiprod_ds.convert.deepspeed_folder import DeepSpeedFolder, find_tag_folder
from aiprod_ds.convert.distributed_folder import DistributedFolder
from aiprod_ds.convert.restricted_pickle import load_metadata, load_saved
from aiprod_ds.convert.weights_folder import WeightsFolder
from aiprod_ds.data.latents import read_entry
from aiprod_ds.errors import CheckpointError, DataError
from aiprod_ds.models.lora_opened import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[Callable[[Path], None], Path]:
    """How to write a bomb into a path, and what is there once one went off."""
    mark = tmp_path / "hit"

    def write(path: Path) -> None:
        blob = io.BytesIO()
        torch.save({"module": _Bomb(mark)}, blob)
        path.write_bytes(blob.getvalue())

    return write, mark


def test_the_bomb_goes_off_where_nothing_restrains_it(
    tmp_path: Path, bomb: tuple[Callable[[Path], None], Path]
) -> None:
    write, mark = bomb
    write(tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("mp_rank_00_model_states.pt", load_saved, CheckpointError),
        ("x.safetensors", read_tensors, CheckpointError),
        ("diffusion_pytorch_model.safetensors", lambda path: WeightsFolder(path.parent), CheckpointError),
        ("x.pt", read_entry, DataError),
        ("x.safetensors", read_entry, DataError),
        (".metadata", load_metadata, CheckpointError),
    ],
)
def test_a_pickle_bomb_is_refused_and_does_nothing(
    tmp_path: Path, bomb: tuple[Callable[[Path], None], Path], name: str, read: Any, error: type[Exception]
) -> None:
    write, mark = bomb
    write(tmp_path / name)
    with pytest.raises(error, match=str(tmp_path)):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb(mark), protocol=2))  # without the archive around it
    with pytest.raises(error, match=str(tmp_path)):
        read(tmp_path / name)
    assert not mark.exists()


def test_no_class_beside_tensors_and_deepspeeds_own_is_made(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"x\.pt: must hold tensors and nothing else that is loaded, got: .*pathlib"
    ):
        load_saved(tmp_path / "x.pt")
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="must hold a dictionary, got list"):
        load_saved(tmp_path / "x.pt")


def test_untrusted_folders_are_refused_before_anything_is_opened(
    tmp_path: Path, bomb: tuple[Callable[[Path], None], Path]
) -> None:
    write, mark = bomb
    files = [tmp_path / name for name in ("mp_rank_00_model_states.pt", ".metadata")]
    for path in files:
        write(path)
        path.chmod(0)  # to open one would be another error, unless the tests run as root
    before = [path.stat().st_atime_ns for path in files]
    with pytest.raises(
        CheckpointError,
        match=r"is a checkpoint of DeepSpeed, whose files are pickles.*give --trust-checkpoint",
    ):
        DeepSpeedFolder(tmp_path, is_trusted=False)
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint of torch\.distributed\.checkpoint, whose files are pickles"
    ):
        DistributedFolder(tmp_path, is_trusted=False)
    assert [path.stat().st_atime_ns for path in files] == before
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp/x", "..", ".", "", "a/b", "a\\b", "a" * 2000, "x\0y"])
def test_latest_cannot_lead_out(tmp_path: Path, tag: str) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "mp_rank_00_model_states.pt").touch()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="latest: must be the name of a folder beside it"):
        find_tag_folder(folder)


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A checkpoint of two tensors, one of which is nested."""
    folder = tmp_path / "dcp"
    checkpoint.save(
        {"model": {"a": torch.arange(6.0)}, "b": torch.ones(2, 2)}, checkpoint_id=str(folder), no_dist=True
    )
    return folder


def _edit(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = load_metadata(folder / ".metadata")
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _first(metadata: Any) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "b")


def test_a_checkpoint_saved_by_one_process_is_read(distributed: Path) -> None:
    source = DistributedFolder(distributed, is_trusted=True)
    assert source.top_level == ("model",)
    assert {name: value.tolist() for name, value in source.items()} == {
        "model.a": [*range(6)],
        "b": [[1, 1], [1, 1]],
    }


def _without_storage(metadata: Any) -> None:
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "b"}


METADATA_DEFECTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a file outside": (
        lambda metadata: setattr(_first(metadata), "relative_path", "../x"),
        r"got the file '\.\./x'",
    ),
    "an absolute file": (
        lambda metadata: setattr(_first(metadata), "relative_path", "/etc/passwd"),
        "got the file '/etc/passwd'",
    ),
    "compressed": (
        lambda metadata: setattr(_first(metadata), "transform_descriptors", ["zstd"]),
        "transformed by",
    ),
    "a chunk is missing": (_without_storage, "b must have all its chunks"),
    "a chunk outside": (
        lambda metadata: setattr(metadata.state_dict_metadata["b"].chunks[0], "sizes", torch.Size([3, 2])),
        "b must have all its chunks",
    ),
    "too few numbers": (
        lambda metadata: setattr(metadata.state_dict_metadata["b"].chunks[0], "sizes", torch.Size([1, 2])),
        "b must have 4 numbers, got chunks with 2",
    ),
    "no tensors": (lambda metadata: setattr(metadata, "state_dict_metadata", 3), "must describe tensors"),
}


@pytest.mark.parametrize("defect", METADATA_DEFECTS)
def test_metadata_that_lies_is_refused(distributed: Path, defect: str) -> None:
    change, message = METADATA_DEFECTS[defect]
    _edit(distributed, change)
    with pytest.raises(CheckpointError, match=message):
        DistributedFolder(distributed, is_trusted=True)


def test_a_chunk_of_another_kind_is_refused(distributed: Path) -> None:
    def swap(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "model.a")
        metadata.storage_data[MetadataIndex("b", torch.Size([0, 0]), 0)] = metadata.storage_data[index]

    _edit(distributed, swap)
    with pytest.raises(CheckpointError, match="of b, got TensorSpec"):
        dict(DistributedFolder(distributed, is_trusted=True))


def test_a_bomb_inside_a_chunk_does_nothing(
    distributed: Path, bomb: tuple[Callable[[Path], None], Path]
) -> None:
    _, mark = bomb
    blob = io.BytesIO()
    torch.save(_Bomb(mark), blob)
    (distributed / "bomb.distcp").write_bytes(blob.getvalue())

    def point(metadata: Any) -> None:
        info = _first(metadata)
        info.relative_path, info.offset, info.length = "bomb.distcp", 0, len(blob.getvalue())

    _edit(distributed, point)
    source = DistributedFolder(distributed, is_trusted=True)
    with pytest.raises(CheckpointError, match=r"bomb\.distcp: must hold tensors and nothing else"):
        source["b"]
    assert not mark.exists()


def test_an_archive_with_paths_that_lead_out_writes_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("../../hit", "x")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=r"x\.pt: must hold tensors"):
        load_saved(tmp_path / "x.pt")
    assert sorted(tmp_path.parent.rglob("*")) == before
