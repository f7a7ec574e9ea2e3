"""Chunks on disk: any range comes back bit for bit, and a folder that is not exactly its `engine.json` is
refused.

Oracle of the ranges: the whole tensors. Chunks begin and end at any place, chosen by a seeded generator.
Moments have files of their own; checkpoints from before have them beside the weights, and are read too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_ds.checkpoint.manifest import FileRecord
from aiprod_ds.checkpoint.shard_files import ShardReader, holds_moments_only, write_shards
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import (
    MOMENTS,
    Chunk,
    EngineFacts,
    LossScale,
    ShardSlice,
    Snapshot,
    TensorMetadata,
    fill,
    split_key,
    tensor_key,
)

WHOLE = {
    "master/a.weight": torch.randn(5, 7),
    "exp_avg/a.weight": torch.randn(5, 7),
    "frozen/b/odd name": torch.randn(11).bfloat16(),
    "frozen/scale": torch.tensor(2.5, dtype=torch.float16),
    "buffer/count": torch.tensor([2**40, -1]),
    "buffer/mask": torch.tensor([True, False, True]),
    "buffer/none": torch.empty(0, 3),
}
RANK_0, RANK_1 = "rank_00000_of_00002.safetensors", "rank_00001_of_00002.safetensors"
MOMENTS_0, MOMENTS_1 = "rank_00000_of_00002.moments.safetensors", "rank_00001_of_00002.moments.safetensors"


def _facts(world_size: int = 2) -> EngineFacts:
    return EngineFacts(
        engine="deepspeed",
        zero_stage=2,
        precision="bf16",
        world_size=world_size,
        adam_steps={"a.weight": 3},
        loss_scale=LossScale(scale=2.0, updates=3, last_overflow=-1, tolerance=1),
        tensors={key: TensorMetadata.of(value.shape, value.dtype) for key, value in WHOLE.items()},
    )


def _write(folder: Path, *, cut_at: dict[str, int] | None = None, as_before: bool = False) -> Path:
    """Writes the first `cut_at[key]` elements as rank 0 and the others as rank 1; without a number rank 0 has
    all.

    With `as_before` each rank's moments stand in the file of its weights.
    """
    folder.mkdir(exist_ok=True)
    for rank in range(2):
        tensors, chunks = [], []
        for key, value in WHOLE.items():
            middle = (cut_at or {}).get(key, value.numel())
            start, end = (0, middle) if rank == 0 else (middle, value.numel())
            if start < end:
                kind, name = split_key(key)
                chunks.append(
                    Chunk(
                        kind=kind,
                        name=name,
                        tensor=len(tensors),
                        start=start,
                        offset=start,
                        length=end - start,
                    )
                )
                tensors.append(value)
        written = write_shards(
            folder, Snapshot(rank=rank, facts=_facts(), tensors=tuple(tensors), chunks=tuple(chunks))
        )
        for name, record in written.items():
            content = (folder / name).read_bytes()
            assert record == FileRecord(bytes=len(content), sha256=sha256(content).hexdigest())
    if as_before:
        for moments in folder.glob("*.moments.safetensors"):
            _join(moments, moments.with_name(moments.name.replace(".moments", "")))
            moments.unlink()
    return folder


def _join(source: Path, target: Path) -> None:
    """Writes the chunks of both files into the second."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for path in (path for path in (target, source) if path.exists()):
        with safe_open(path, "pt") as opened:
            starts |= json.loads(opened.metadata()["starts"])
        tensors |= {key: value.clone() for key, value in load_file(path).items()}
    save_file(tensors, target, metadata={"starts": json.dumps(starts)})


@pytest.mark.parametrize("as_before", [False, True], ids=["moments apart", "one file a rank"])
def test_any_cut_gives_back_any_range_bitwise(tmp_path: Path, as_before: bool) -> None:
    draw = random.Random(0)
    for case in range(20):
        cut_at = {key: draw.randint(0, value.numel()) for key, value in WHOLE.items()}
        with ShardReader(_write(tmp_path / str(case), cut_at=cut_at, as_before=as_before)) as reader:
            assert reader.facts == _facts()
            for key, value in WHOLE.items():
                kind, name = split_key(key)
                whole = reader.whole(kind, name)
                assert whole.dtype == value.dtype
                assert whole.shape == value.shape
                assert torch.equal(whole, value)
                start = draw.randint(0, value.numel())
                length = draw.randint(0, value.numel() - start)
                assert torch.equal(
                    reader.read(kind, name, start, length), value.flatten()[start : start + length]
                )


@pytest.mark.parametrize(
    ("cut_at", "files"),
    [
        ({}, [MOMENTS_0, RANK_0]),
        ({"exp_avg/a.weight": 0}, [RANK_0, MOMENTS_1]),
        ({"exp_avg/a.weight": 1, "frozen/scale": 0}, [MOMENTS_0, RANK_0, MOMENTS_1, RANK_1]),
    ],
)
def test_what_a_rank_has_no_chunks_of_leaves_no_file(
    tmp_path: Path, cut_at: dict[str, int], files: list[str]
) -> None:
    folder = _write(tmp_path, cut_at=cut_at)
    assert sorted(path.name for path in folder.iterdir()) == ["engine.json", *files]
    for file in files:
        assert {split_key(key)[0] in MOMENTS for key in load_file(folder / file)} == {
            holds_moments_only(file)
        }


def test_what_is_read_outlives_the_reader(tmp_path: Path) -> None:
    with ShardReader(_write(tmp_path)) as reader:
        value = reader.whole("master", "a.weight")
    (tmp_path / RANK_0).unlink()
    assert torch.equal(value, WHOLE["master/a.weight"])


def test_fill_copies_into_shards_and_leaves_padding(tmp_path: Path) -> None:
    shard, alone = torch.full((9,), -1.0), torch.zeros(5, 7)
    spans = [
        [ShardSlice(name="a.weight", start=30, offset=2, length=5)],
        [ShardSlice(name="a.weight", start=0, offset=0, length=35)],
    ]
    with ShardReader(_write(tmp_path, cut_at={"master/a.weight": 32})) as reader:
        fill(reader, "master", [shard, alone], spans)
    assert torch.equal(alone, WHOLE["master/a.weight"])
    assert torch.equal(
        shard, torch.cat([torch.full((2,), -1.0), alone.flatten()[30:], torch.full((2,), -1.0)])
    )


def test_one_more_kind_is_cut_like_the_masters(tmp_path: Path) -> None:
    facts = replace(_facts(1), tensors={"master/w": TensorMetadata.of((3,), torch.float32)})
    master, average = torch.arange(3.0), torch.arange(3.0) + 5
    spans = [[ShardSlice(name="w", start=0, offset=0, length=3)]]
    cut = Chunk(kind="master", name="w", tensor=0, start=0, offset=0, length=3)
    state = Snapshot(rank=0, facts=facts, tensors=(master,), chunks=(cut,)).plus("ema", [average], spans)
    write_shards(tmp_path, state)
    with ShardReader(tmp_path) as reader:
        assert torch.equal(reader.whole("ema", "w"), average)
        assert torch.equal(reader.whole("master", "w"), master)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda reader: reader.whole("ema", "a.weight"), "must hold ema/a.weight, got no such tensor"),
        (lambda reader: reader.read("master", "a.weight", 30, 6), "has 35 elements, got the range 30\\+6"),
        (lambda reader: reader.read("master", "a.weight", -1, 2), "has 35 elements"),
    ],
)
def test_what_is_not_there_cannot_be_read(
    tmp_path: Path, ask: Callable[[ShardReader], Tensor], message: str
) -> None:
    with ShardReader(_write(tmp_path)) as reader, pytest.raises(CheckpointError, match=message):
        ask(reader)


def _rewrite(
    folder: Path, change: Callable[[dict[str, Tensor], dict[str, int]], None], *, file: str = RANK_0
) -> None:
    with safe_open(folder / file, "pt") as opened:
        starts = json.loads(opened.metadata()["starts"])
    tensors = {key: value.clone() for key, value in load_file(folder / file).items()}
    change(tensors, starts)
    save_file(tensors, folder / file, metadata={"starts": json.dumps(starts)})


def _facts_with(folder: Path, **values: Any) -> None:
    path = folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _overlap(folder: Path) -> None:
    _rewrite(folder, lambda _, starts: starts.update({"master/a.weight": 10}), file=RANK_1)


def _gap(folder: Path) -> None:
    _rewrite(folder, lambda tensors, _: tensors.update({"master/a.weight": tensors["master/a.weight"][:-1]}))


def _twice(folder: Path) -> None:
    (folder / RANK_1).write_bytes((folder / RANK_0).read_bytes())


def _surplus(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], starts: dict[str, int]) -> None:
        tensors["master/../../x"], starts["master/../../x"] = torch.ones(1), 0

    _rewrite(folder, change)


def _weights_as_moments(folder: Path) -> None:
    (folder / MOMENTS_1).unlink()
    (folder / RANK_1).rename(folder / MOMENTS_1)


def _without_starts(folder: Path) -> None:
    save_file(load_file(folder / RANK_0), folder / RANK_0)


def _huge_header(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[:8] = (1 << 30).to_bytes(8, "little")
    (folder / file).write_bytes(bytes(data))


def _overlapping_offsets(folder: Path) -> None:
    header = {"__metadata__": {"starts": '{"a": 0, "b": 0}'}} | {
        key: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for key in "ab"
    }
    text = json.dumps(header).encode()
    (folder / RANK_0).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def _link(folder: Path, file: str) -> None:
    (folder / file).rename(folder.parent / "elsewhere")
    (folder / file).symlink_to(folder.parent / "elsewhere")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (lambda f: (f / RANK_1).unlink(), "master/a.weight must have 35 elements, got 17"),
    "pieces overlap": (_overlap, f"{RANK_1}: master/a.weight must go on at element 17, got a piece from 10"),
    "a piece is short": (_gap, f"{RANK_1}: master/a.weight must go on at element 16, got a piece from 17"),
    "ranks are swapped": (_twice, f"{RANK_1}: .* must go on at element .*, got a piece from 0"),
    "a surplus key": (_surplus, f"{RANK_0}: must hold tensors of engine.json only, got 'master/../../x'"),
    "another type": (
        lambda f: _rewrite(
            f, lambda tensors, _: tensors.update({"master/a.weight": tensors["master/a.weight"].double()})
        ),
        f"{RANK_0}: master/a.weight must be float32, got float64",
    ),
    "two dimensions": (
        lambda f: _rewrite(f, lambda tensors, _: tensors.update({"master/a.weight": torch.ones(1, 17)})),
        f"{RANK_0}: master/a.weight must be a range of numbers",
    ),
    "a start below 0": (
        lambda f: _rewrite(f, lambda _, starts: starts.update({"master/a.weight": -3})),
        f"{RANK_0}: master/a.weight must start at an element, got -3",
    ),
    "starts name others": (
        lambda f: _rewrite(f, lambda _, starts: starts.update(x=0)),
        "starts must name the tensors",
    ),
    "no starts": (_without_starts, f"{RANK_0}: metadata must hold starts"),
    "a header of 1 GB": (
        lambda f: _huge_header(f, RANK_0),
        f"{RANK_0}: must be a safetensors file, got a header of 1073741824",
    ),
    "overlapping offsets": (_overlapping_offsets, f"{RANK_0}: must be a safetensors file"),
    "truncated": (
        lambda f: (f / RANK_0).write_bytes((f / RANK_0).read_bytes()[:-1]),
        f"{RANK_0}: must be a safetensors file",
    ),
    "empty": (lambda f: (f / RANK_0).write_bytes(b""), f"{RANK_0}: must be a safetensors file"),
    "another world size": (
        lambda f: (f / RANK_1).rename(f / "rank_00001_of_00003.safetensors"),
        "rank_00001_of_00003.safetensors: must be a file of one of 2 ranks",
    ),
    "a rank too many": (
        lambda f: (f / RANK_1).rename(f / "rank_00002_of_00002.safetensors"),
        "rank_00002_of_00002.safetensors: must be a file of one of 2 ranks",
    ),
    "a pickle": (lambda f: (f / "state.pt").write_bytes(b"x"), "state.pt: must be a file of one of 2 ranks"),
    "a link": (lambda f: _link(f, RANK_0), f"{RANK_0}: must be a file of one of 2 ranks"),
    "moments of a rank are missing": (
        lambda f: (f / MOMENTS_1).unlink(),
        "exp_avg/a.weight must have 35 elements, got 9",
    ),
    "moments of a rank twice": (
        lambda f: _join(f / MOMENTS_0, f / RANK_0),
        "exp_avg/a.weight must go on at element 9, got a piece from 0",
    ),
    "weights called moments": (
        _weights_as_moments,
        f"{MOMENTS_1}: must hold exp_avg and exp_avg_sq only, got master/a.weight",
    ),
    "moments of 1 GB header": (
        lambda f: _huge_header(f, MOMENTS_1),
        f"{MOMENTS_1}: must be a safetensors file, got a header of",
    ),
    "moments as a link": (lambda f: _link(f, MOMENTS_0), f"{MOMENTS_0}: must be a file of one of 2 ranks"),
    "moments of another kind of file": (
        lambda f: (f / MOMENTS_0).rename(f / "rank_00000_of_00002.moments.moments.safetensors"),
        "moments.moments.safetensors: must be a file of one of 2 ranks",
    ),
    "no facts": (lambda f: (f / "engine.json").unlink(), "engine.json: missing"),
    "facts that are no JSON": (lambda f: (f / "engine.json").write_text("{"), "engine.json: unreadable"),
    "another format": (lambda f: _facts_with(f, format=1), "engine.json: format: must be 2, got 1"),
    "a surplus field": (lambda f: _facts_with(f, x=1), "engine.json: fields: must be"),
    "a wrong field": (
        lambda f: _facts_with(f, world_size="2"),
        "engine.json: world_size: must be of type int",
    ),
    "a wrong number": (
        lambda f: _facts_with(f, adam_steps={"a": "x"}),
        "engine.json: adam_steps: must be a mapping to whole",
    ),
    "half a loss scale": (
        lambda f: _facts_with(f, loss_scale={"scale": 1.0}),
        "engine.json: loss_scale: must be null or have",
    ),
    "a loss scale in words": (
        lambda f: _facts_with(f, loss_scale={"scale": "1", "updates": 1, "last_overflow": 1, "tolerance": 1}),
        "engine.json: loss_scale: must be a number",
    ),
    "tensors as a list": (lambda f: _facts_with(f, tensors=[]), "engine.json: tensors: must be a mapping"),
    "an unknown kind": (
        lambda f: _facts_with(f, tensors={"x/y": {}}),
        "engine.json: 'x/y': must be <kind>/<name>",
    ),
    "a negative size": (
        lambda f: _facts_with(f, tensors={"master/x": {"shape": [-1], "dtype": "float32"}}),
        "engine.json: tensors: master/x must have a shape and a dtype",
    ),
    "a dtype that is none": (
        lambda f: _facts_with(f, tensors={"frozen/x": {"shape": [1], "dtype": "nn"}}),
        "engine.json: tensors: frozen/x must have a shape and a dtype",
    ),
    "masters in 16 bits": (
        lambda f: _facts_with(f, tensors={"master/x": {"shape": [1], "dtype": "float16"}}),
        "engine.json: tensors: master/x must be float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_exactly_the_whole_is_refused(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    folder = _write(tmp_path / "engine", cut_at={"master/a.weight": 17, "exp_avg/a.weight": 9})
    ShardReader(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        ShardReader(folder)
    assert str(folder) in str(caught.value)


def test_a_tensor_has_one_key() -> None:
    assert split_key(tensor_key("frozen", "a/b")) == ("frozen", "a/b")
