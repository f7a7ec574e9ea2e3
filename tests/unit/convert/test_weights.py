"""LoRA from and into weights: closed forms, and folders that are whole or refused."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_ds.checkpoint.disk import DiskFullError
from aiprod_ds.convert.derived import Cast, Merged, Renamed
from aiprod_ds.convert.weights import Extracted, extract, merge, other_differences, total_error
from aiprod_ds.convert.weights_folder import (
    WeightsFolder,
    require_equal,
    write_like,
    write_one_file,
    write_weights,
)
from aiprod_ds.errors import CheckpointError
from aiprod_ds.tensor_file import TensorSource, TensorSpec

WEIGHTS = "diffusion_pytorch_model"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _extract(difference: Tensor, rank: int) -> Extracted:
    (part,) = extract(
        {"x.weight": torch.zeros_like(difference)}, {"x.weight": difference}, rank, layers=["x"]
    )
    return part


def test_the_worked_number_of_merging() -> None:
    base = {
        "x.weight": torch.ones(1, 1),
        "x.bias": torch.zeros(1),
        "norm": torch.ones(2, dtype=torch.bfloat16),
    }
    adapters = {"x.lora_A.weight": torch.full((1, 1), 2.0), "x.lora_B.weight": torch.full((1, 1), 3.0)}
    merged = dict(merge(base, adapters, {"x": 0.5}))
    assert list(merged) == list(base)
    assert merged["x.weight"].item() == 4.0
    assert merged["x.bias"] is base["x.bias"]
    assert merged["norm"].dtype == torch.bfloat16


def test_16_bit_weights_are_merged_in_fp32() -> None:
    base = {"x.weight": _random(6, 5).bfloat16()}
    adapters = {
        "x.lora_A.weight": _random(2, 5, seed=1).half(),
        "x.lora_B.weight": _random(6, 2, seed=2).half(),
    }
    ((_, merged),) = merge(base, adapters, {"x": 0.7})
    exact = base["x.weight"].double() + 0.7 * (
        adapters["x.lora_B.weight"].double() @ adapters["x.lora_A.weight"].double()
    )
    assert merged.dtype == torch.float32
    torch.testing.assert_close(
        merged.double(), exact, rtol=1e-6, atol=1e-6
    )  # oracle: fp64; numbers of order 1


def test_adapters_that_do_not_fit_are_not_merged() -> None:
    adapters = {"x.lora_A.weight": torch.ones(1, 3), "x.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match=r"must belong to layers of the base model, got y\. Take"):
        next(merge({"x.weight": torch.ones(2, 3)}, adapters, {"y": 1.0}))
    with pytest.raises(
        CheckpointError, match=r"x: B A must have the weight's shape \[3, 2\], got B \[2, 1\] and A \[1, 3\]"
    ):
        next(merge({"x.weight": torch.ones(3, 2)}, adapters, {"x": 1.0}))


def test_the_worked_number_of_extracting() -> None:
    part = _extract(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    assert part.error_norm == pytest.approx(math.sqrt(5), rel=1e-6)
    assert part.relative_error == pytest.approx(0.598, abs=5e-4)
    torch.testing.assert_close(
        part.up @ part.down, torch.diag(torch.tensor([3.0, 0.0, 0.0])), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (1100, 1030)], ids=["tall", "wide", "randomized"])
def test_a_difference_of_the_rank_is_recovered(shape: tuple[int, int]) -> None:
    difference = _random(shape[0], 4, seed=1) @ _random(4, shape[1], seed=2)
    part = _extract(difference, 4)
    assert (part.up.shape, part.down.shape) == ((shape[0], 4), (4, shape[1]))
    # fp32 rounds at 6e-8; the SVD of a thousand columns adds up some tens of it.
    assert part.relative_error < 5e-6
    torch.testing.assert_close(part.up @ part.down, difference, rtol=1e-4, atol=1e-4)
    # Balanced, so that both train at one learning rate: the singular values are shared out.
    torch.testing.assert_close(part.up.norm(dim=0), part.down.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [1, 3, 11])
def test_the_error_is_the_norm_of_the_singular_values_left_out(rank: int) -> None:
    difference = _random(20, 12, seed=3)
    left_out = (
        torch.linalg.svdvals(difference.double())[rank:].square().sum().sqrt()
    )  # oracle: fp64, Eckart and Young
    assert _extract(difference, rank).error_norm == pytest.approx(float(left_out), rel=1e-5)


def test_the_randomized_error_is_near_the_least_one_and_repeats() -> None:
    left, right = torch.linalg.qr(_random(1100, 64, seed=4))[0], torch.linalg.qr(_random(1030, 64, seed=5))[0]
    values = 1 / torch.arange(1.0, 65.0)
    difference = (left * values) @ right.T
    before = torch.get_rng_state()
    first, second = _extract(difference, 16), _extract(difference, 16)
    assert torch.equal(first.up, second.up)
    assert torch.equal(before, torch.get_rng_state())
    least = float(values[16:].square().sum().sqrt())
    assert (
        least * (1 - 1e-4) < first.error_norm < least * 1.001
    )  # 0.1 % as the docstring has it for such spectra


def test_merging_what_was_extracted_gives_the_tuned_weights() -> None:
    base = {"x.weight": _random(10, 8), "x.bias": _random(10)}
    tuned = {**base, "x.weight": base["x.weight"] + _random(10, 3, seed=1) @ _random(3, 8, seed=2)}
    (part,) = extract(base, tuned, 3, layers=["x"])
    merged = dict(merge(base, {"x.lora_A.weight": part.down, "x.lora_B.weight": part.up}, {"x": 1.0}))
    torch.testing.assert_close(merged["x.weight"], tuned["x.weight"], rtol=1e-5, atol=1e-5)


def test_the_worked_number_of_the_total_error() -> None:
    nothing = torch.zeros(1, 1)
    exact = Extracted(layer="a", down=nothing, up=nothing, difference_norm=3.0, error_norm=0.0)
    missed = Extracted(layer="b", down=nothing, up=nothing, difference_norm=4.0, error_norm=4.0)
    assert total_error([exact, missed]) == pytest.approx(0.8)
    assert total_error([exact], [4.0]) == pytest.approx(0.8)
    assert total_error([]) == 0.0


def test_differences_beside_the_layers_are_told() -> None:
    base = {"x.weight": torch.zeros(2, 2), "x.bias": torch.zeros(2), "norm": torch.ones(3)}
    tuned = {"x.weight": torch.ones(2, 2), "x.bias": torch.tensor([3.0, 4.0]), "norm": torch.ones(3)}
    assert dict(other_differences(base, tuned, layers=["x"])) == {"x.bias": 5.0}
    with pytest.raises(CheckpointError, match="only one of them has norm"):
        list(other_differences(base, {"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}, layers=["x"]))


@pytest.mark.parametrize(
    ("tuned", "rank", "message"),
    [
        (
            {"x.weight": torch.ones(2, 3)},
            1,
            r"x\.weight: must have one shape, got \[2, 2\] in base and \[2, 3\] in tuned",
        ),
        ({"y.weight": torch.ones(2, 2)}, 1, r"tuned: must hold x\.weight"),
        ({"x.weight": torch.full((2, 2), torch.nan)}, 1, r"x\.weight: must hold finite numbers"),
        (
            {"x.weight": torch.ones(2, 2)},
            3,
            r"x: must be a matrix with sides of at least the rank \(3\), got \[2, 2\]",
        ),
    ],
)
def test_what_cannot_be_extracted_is_refused(tuned: dict[str, Tensor], rank: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        list(extract({"x.weight": torch.zeros(2, 2)}, tuned, rank, layers=["x"]))


def test_equal_weights_have_no_error() -> None:
    assert _extract(torch.zeros(3, 3), 1).relative_error == 0.0


class _Tensors(TensorSource):
    """Tensors in memory; `broken` is one that cannot be read."""

    def __init__(self, tensors: dict[str, Tensor], broken: str = "", error: Exception | None = None) -> None:
        self._tensors, self._broken, self._error = tensors, broken, error or CheckpointError("x")
        self.specs = {name: TensorSpec.of(value) for name, value in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name == self._broken:
            raise self._error
        return self._tensors[name]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of three tensors in two files."""
    folder = tmp_path / "base"
    folder.mkdir()
    files = {
        f"{WEIGHTS}-00001-of-00002.safetensors": {"b": _random(4, 3), "a": _random(3)},
        f"{WEIGHTS}-00002-of-00002.safetensors": {"c": _random(2, 2, seed=1).half()},
    }
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def test_a_folder_is_written_as_its_source_is_cut(sharded: Path, tmp_path: Path) -> None:
    source = WeightsFolder(sharded)
    (tmp_path / "out.pending").mkdir()
    (tmp_path / "out.pending" / "rest").write_text("of a killed call")
    write_like(
        source, tmp_path / "out", _Tensors({name: value.float() + 1 for name, value in source.items()})
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in sharded.iterdir()}
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out.pending").exists()
    written = WeightsFolder(tmp_path / "out")
    assert {name: written.file_of(name) for name in written} == {
        name: source.file_of(name) for name in source
    }
    require_equal(written, ((name, value.float() + 1) for name, value in source.items()))
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * (12 + 3 + 4)}
    with pytest.raises(CheckpointError, match="must be what was computed"):
        require_equal(written, source.items())
    with pytest.raises(CheckpointError, match=r"out: must not exist yet, got a folder"):
        write_like(source, tmp_path / "out", source)


def test_a_failure_leaves_no_folder(sharded: Path, tmp_path: Path) -> None:
    source = WeightsFolder(sharded)
    with pytest.raises(CheckpointError, match="x"):
        write_like(source, tmp_path / "out", _Tensors(dict(source.items()), broken="c"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("write", [write_weights, write_one_file])
def test_a_full_disk_leaves_nothing(tmp_path: Path, write: Callable[[TensorSource, Path], None]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFullError, match=r"out\.safetensors: must have room"):
        write(
            _Tensors({"a": _random(3), "b": _random(3)}, broken="b", error=full), tmp_path / "out.safetensors"
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_are_cut_where_a_tensor_does_not_fit_and_read_by_others(tmp_path: Path) -> None:
    tensors = {
        "a": _random(5),
        "b": _random(2, 2).half(),
        "c": _random(4, seed=1),
        "d": torch.tensor(True),
        "e": _random(0, 3),
    }
    write_weights(_Tensors(tensors), tmp_path / "out", shard_bytes=28, config="{}")
    folder = WeightsFolder(tmp_path / "out")
    files = {name: folder.file_of(name)[-27:-12] for name in tensors}
    assert files == {
        "a": "-00001-of-00002",
        "b": "-00001-of-00002",
        "c": "-00002-of-00002",
        "d": "-00002-of-00002",
        "e": files["d"],
    }
    read = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        read |= load_file(file)  # oracle: the library
    assert read.keys() == tensors.keys()
    assert all(
        read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items()
    )
    require_equal(folder, tensors.items())
    with pytest.raises(CheckpointError, match="out: must not exist yet"):
        write_weights(folder, tmp_path / "out")


def test_one_file_has_its_metadata_and_is_not_overwritten(tmp_path: Path) -> None:
    write_one_file(
        _Tensors({"a": _random(3).half(), "b": _random(2)}),
        tmp_path / "x.safetensors",
        metadata={"rank": "4"},
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert (file.metadata(), set(file.keys())) == ({"format": "pt", "rank": "4"}, {"a", "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(CheckpointError, match=r"x\.safetensors: must not exist yet, got a file"):
        write_one_file(_Tensors({"a": _random(1)}), tmp_path / "x.safetensors")


def test_tensors_are_renamed_and_cast_when_they_are_read() -> None:
    source = _Tensors({"a": _random(3), "step": torch.tensor(7)})
    derived = Cast(Renamed(source, {"x": "step", "y": "a"}), torch.bfloat16)
    assert list(derived) == ["x", "y"]
    assert {name: TensorSpec.of(value) for name, value in derived.items()} == derived.specs
    assert torch.equal(derived["y"], source["a"].bfloat16())
    assert derived["x"].item() == 7


def test_numbers_beyond_fp16_are_refused() -> None:
    source = _Tensors({"a": torch.tensor([1.0, 7e4]), "b": torch.tensor([float("inf"), 65504.0])})
    with pytest.raises(
        CheckpointError, match=r"a: must be within \+-65504 to become fp16, got 70000\. Use bf16"
    ):
        Cast(source, torch.float16)["a"]
    assert Cast(source, torch.float16)["b"].tolist() == [float("inf"), 65504.0]
    assert Cast(source, torch.bfloat16)["a"].isfinite().all()


def test_a_merge_that_is_read_tensor_by_tensor_is_that_of_the_whole() -> None:
    base = {"x.weight": _random(4, 3).half(), "x.bias": _random(4)}
    adapters = {"x.lora_A.weight": _random(2, 3, seed=1), "x.lora_B.weight": _random(4, 2, seed=2)}
    merged = Merged(_Tensors(base), adapters, {"x": 0.7}, None)
    whole = dict(merge(base, adapters, {"x": 0.7}))
    assert torch.equal(merged["x.weight"], whole["x.weight"].half())
    assert torch.equal(merged["x.bias"], base["x.bias"])
    with pytest.raises(CheckpointError, match=r"must belong to layers of the base model, got y\."):
        Merged(_Tensors(base), adapters, {"y": 1.0}, None)


def test_shapes_are_compared_without_reading(sharded: Path) -> None:
    folder, shapes = WeightsFolder(sharded), {"a": (3,), "b": (4, 3), "c": (2, 2)}
    folder.require_shapes(shapes)
    with pytest.raises(
        CheckpointError,
        match=r"got b \(4, 3\) instead of \(4, 4\); c \(2, 2\) instead of none; d none instead of",
    ):
        folder.require_shapes({"a": (3,), "b": (4, 4), "d": (1,)})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "must hold a weight_map"),
        ("[]", "must hold a weight_map"),
        ("[" * 100_000, "must hold a weight_map"),
        ('{"weight_map": ["a"]}', "must hold a weight_map"),
        (
            '{"weight_map": {"a": "../other.safetensors"}}',
            r"must name safetensors files beside it, got '\.\./other\.safetensors'",
        ),
        (
            '{"weight_map": {"a": "weights.bin"}}',
            r"must name safetensors files beside it, got 'weights\.bin'",
        ),
        ('{"weight_map": {"a": "missing.safetensors"}}', r"missing\.safetensors: must be a safetensors file"),
        (
            f'{{"weight_map": {{"a": "{WEIGHTS}-00002-of-00002.safetensors"}}}}',
            "must say what the files hold, got a, c",
        ),
    ],
)
def test_an_index_that_lies_is_refused(sharded: Path, index: str, message: str) -> None:
    (sharded / f"{WEIGHTS}.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        WeightsFolder(sharded)


def test_a_folder_without_weights_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"must hold diffusion_pytorch_model\.safetensors or .*index\.json, got neither"
    ):
        WeightsFolder(tmp_path)
    (tmp_path / f"{WEIGHTS}.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        WeightsFolder(tmp_path)
