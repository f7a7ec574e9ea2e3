"""How long does a checkpoint take to become fp32 safetensors, and how much memory, against DeepSpeed's
zero_to_fp32?

The same numbers are written twice: as a checkpoint of this project (chunks of two ranks, with both moments
and a manifest) and in DeepSpeed 0.19's layout (ZeRO-2, two ranks, bf16 model file; made with torch.save, not
by its engine, so that no training has to fit into memory). Each conversion runs in a process of its own; its
seconds begin after the imports and end when the result is on the disk, and the input is dropped from the page
cache before. Beside it stand the same conversion without the hashes of the manifest, and the time of a plain
copy of the result: on a slow disk it is the bound. The same is measured once more with fewer tensors and all
files in memory (/dev/shm), where no disk counts. Peak memory is what the process had resident at most, mapped
pages included, less what it had after the imports. In the end the results are compared: every tensor is
equal.

    python benchmarks/conversion.py --output benchmarks/results/NAME.json [--gigabytes 2] [--tiny]

It does not show ZeRO-3, network file systems, or checkpoints whose frozen weights are the larger part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from torch import Tensor

from aiprod_ds.checkpoint.shard_files import write_shards
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.convert.checkpoint_weights import CheckpointWeights
from aiprod_ds.convert.request import Request
from aiprod_ds.convert.run import convert
from aiprod_ds.convert.weights_folder import WeightsFolder, require_equal, write_weights
from aiprod_ds.snapshot import Chunk, EngineFacts, Snapshot, TensorMetadata, split_key

_RANKS = 2
_IN_MEMORY, _GIGABYTES_IN_MEMORY = Path("/dev/shm"), 0.5
_NAMES = {
    "ours": "aiprod-ds convert",
    "ours_unverified": "the same without hashing the manifest's files",
    "ours_foreign": "aiprod-ds convert of DeepSpeed's folder",
    "zero_to_fp32": "DeepSpeed's zero_to_fp32",
    "copy": "plain copy of the result",
}


def main() -> None:
    """Writes both checkpoints, converts each in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Conversion to fp32 safetensors against zero_to_fp32.")
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="of fp32 weights; about ten times as much is written"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="few small tensors, to see that the script works")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are written (default: the temporary folder)"
    )
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return
    width = 64 if arguments.tiny else 2048
    rows = []
    for where, place, gigabytes in (
        ("on disk", arguments.folder, arguments.gigabytes),
        ("in memory", _IN_MEMORY, min(arguments.gigabytes, _GIGABYTES_IN_MEMORY)),
    ):
        count = 8 if arguments.tiny else max(round(gigabytes * 1e9 / (4 * width * width)), _RANKS)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            rows += _measure(Path(folder), where, count=count, width=width, runs=arguments.runs)
    if arguments.output:
        write_result(arguments.output, "conversion", rows)


def _measure(folder: Path, where: str, *, count: int, width: int, runs: int) -> list[dict[str, Any]]:
    names = [f"blocks.{index}.weight" for index in range(count)]
    ours, foreign = (
        _write_ours(folder / "ours", names, width),
        _write_deepspeed(folder / "deepspeed", names, width),
    )
    results = {case: folder / f"result_{case}" for case in _NAMES}
    sources = {"ours": ours, "ours_unverified": ours, "ours_foreign": foreign, "zero_to_fp32": foreign}
    sources["copy"] = results["ours"]
    found: dict[str, list[dict[str, float]]] = {case: [] for case in _NAMES}
    for _ in range(runs):
        for case, out in results.items():
            shutil.rmtree(out, ignore_errors=True)
            found[case].append(_run(case, sources[case], out))
    weights = WeightsFolder(results["ours"])
    for case in ("ours_foreign", "zero_to_fp32"):
        require_equal(WeightsFolder(results[case]), weights.items())
    num_bytes = sum(spec.nbytes for spec in weights.specs.values())
    rows = []
    size = f"{num_bytes / 1e9:.2g} GB {where}"
    for case, name in ((case, f"{name}, {size}") for case, name in _NAMES.items()):
        seconds, memory = [run["seconds"] for run in found[case]], [run["peak"] / 1e9 for run in found[case]]
        rows.append(figure(name, "time", "s", seconds))
        rows.append(figure(name, "result per second", "GB/s", [num_bytes / 1e9 / each for each in seconds]))
        if case != "copy":
            rows.append(figure(name, "peak memory", "GB", memory))
    return rows


def _run(case: str, source: Path, out: Path) -> dict[str, float]:
    _drop_from_cache(source)
    command = [sys.executable, __file__, "--child", case, str(source), str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def _child(case: str, source: str, out: str) -> None:
    work = _work(case, Path(source), Path(out))
    before, began = _peak_bytes(restart=True), time.perf_counter()
    work()
    for path in Path(out).rglob("*"):
        _flush(path)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": _peak_bytes() - before}))


def _work(case: str, source: Path, out: Path) -> Callable[[], object]:
    """Returns what is measured, with everything imported."""
    if case == "copy":
        return lambda: shutil.copytree(source, out)
    if case == "zero_to_fp32":
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert_theirs

        return lambda: convert_theirs(str(source.parent), str(out), safe_serialization=True, tag=source.name)
    if case == "ours_unverified":
        return lambda: write_weights(CheckpointWeights(source), out, stem="model")
    return lambda: convert(Request(source=source, out=out, form="safetensors", is_trusted=True))


def _peak_bytes(*, restart: bool = False) -> int:
    """Returns the highest resident memory of this process; getrusage's figure can be the parent's, from
    before the exec."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _tensors(names: list[str], width: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        yield name, torch.randn(width, width, generator=generator)


def _write_ours(folder: Path, names: list[str], width: int) -> Path:
    kinds = ("master", "exp_avg", "exp_avg_sq")
    facts = EngineFacts(
        engine="deepspeed",
        zero_stage=2,
        precision="bf16",
        world_size=_RANKS,
        adam_steps=dict.fromkeys(names, 1),
        tensors={
            f"{kind}/{name}": TensorMetadata.of((width, width), torch.float32)
            for kind in kinds
            for name in names
        },
    )
    store = CheckpointStore(folder)
    pending = store.open_pending(1)
    half = len(names) // _RANKS
    for rank, own in enumerate((names[:half], names[half:])):
        tensors, chunks = [], []
        for seed, kind in enumerate(kinds):
            for name, value in _tensors(names, width, seed):
                if name in own:
                    found, key = split_key(f"{kind}/{name}")
                    chunks.append(
                        Chunk(
                            kind=found, name=key, tensor=len(tensors), start=0, offset=0, length=value.numel()
                        )
                    )
                    tensors.append(value)
        write_shards(
            pending / "engine", Snapshot(rank=rank, facts=facts, tensors=tuple(tensors), chunks=tuple(chunks))
        )
        del tensors
    layout = {"engine": "deepspeed", "world_size": _RANKS, "zero_stage": 2, "precision": "bf16"}
    clock = Clock(updates=1, phase_updates=1, micro_batches=1, samples=1)
    state = RunState(clock=clock, scheduler={}, fingerprint="", phase_fingerprints=("",), layout=layout)
    return store.commit(1, state)


def _write_deepspeed(folder: Path, names: list[str], width: int) -> Path:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    model = {
        "module": {name: value.bfloat16() for name, value in _tensors(names, width, 0)},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [dict.fromkeys(names, torch.Size((width, width)))],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "global_steps": 1,
        "ds_version": "0.19.8",
    }
    torch.save(model, tag / "mp_rank_00_model_states.pt")
    del model
    half = len(names) // _RANKS
    for rank in range(_RANKS):
        own = set(names[:half] if rank == 0 else names[half:])
        flats = [
            torch.cat([value.flatten() for name, value in _tensors(names, width, seed) if name in own])
            for seed in range(3)
        ]
        state = {
            "loss_scaler": LossScaler(scale=1.0),
            "zero_stage": ZeroStageEnum(2),
            "partition_count": [_RANKS],
            "base_optimizer_state": {"state": {0: {"exp_avg": flats[1], "exp_avg_sq": flats[2]}}},
            "single_partition_of_fp32_groups": [flats[0]],
        }
        torch.save(
            {"optimizer_state_dict": state, "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        del flats, state
    for path in tag.iterdir():
        _flush(path)
    return tag


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
