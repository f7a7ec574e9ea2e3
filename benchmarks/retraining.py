"""How long does a run take from LoRA adapters to all weights, against stopping it, merging with the tool and
starting anew?

Both sides train diffusers' LTXVideoTransformer3DModel in its default size (1.92 billion parameters, random
weights from a folder in bf16) with adapters of rank 32 and then all of its weights, on ZeRO-1 in bf16,
256x256 and 9 frames, batch 4 a GPU. `inside` changes the phase in the run. `restart` trains the adapters,
ends, calls tools/merge_lora.py, and a new process trains what that wrote. Both times are read from outside:
from the row of the last update of the adapters in metrics.jsonl to the row of the first update of all
weights, less that update. Evaluation of one clip and the checkpoint of the adapters are part of both. The
last process is ended after that row, so that nobody waits for its checkpoint. GPU memory is the peak between
the two probes.

    python benchmarks/retraining.py --gpus 1 2 --output benchmarks/results/NAME.json

`--tiny` runs a small model in fp32 on any machine, one process unless `--gpus` says more. It does not show:
ZeRO-2 and 3, several nodes, models that fill the card, several runs of the same case.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.engine import dist
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.trainers.diffusion import DiffusionTrainer

_ROOT = Path(__file__).parents[1]
_UPDATES = 4  # of the adapters
_FRAMES, _SIZE, _TINY_SIZE, _BATCH, _TEXT_TOKENS = 9, 256, 64, 4, 128
_SPATIAL, _TEMPORAL = 32, 8
_ADAPTERS, _WHOLE = "adapters", "whole"
_METRIC = "seconds between the phases"


def main() -> None:
    """Measures every case and writes one result file."""
    parser = argparse.ArgumentParser(description="From LoRA to all weights inside a run, against a restart.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--train", nargs="+", metavar="PHASE", help=argparse.SUPPRESS
    )  # the side of a run's processes
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        _write_base(base, is_tiny=arguments.tiny)
        for gpus in arguments.gpus:
            own = Path(folder) / f"{gpus}"
            for side in (_inside, _restarted):
                rows += side(own, base, gpus, arguments)
                write_result(
                    arguments.output, "retraining", rows
                )  # what is measured is kept if a later side fails


def _inside(folder: Path, base: Path, gpus: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    case, run = f"inside the run, GPUs: {gpus}", folder / "inside"
    seen = _watch(_start(run, base, (_ADAPTERS, _WHOLE), gpus, arguments), run, until=_UPDATES + 1)
    yield figure(case, _METRIC, "s", [seen[_UPDATES + 1] - seen[_UPDATES] - _seconds_of(run, _UPDATES + 1)])
    line = next(line for line in (run / "log").read_text().splitlines() if "retrained phase=" in line)
    told = dict(word.split("=", 1) for word in line.split() if "=" in word)
    yield figure(case, "of these, the change itself", "s", [float(told["seconds"])])
    yield figure(case, "peak device memory of the change", "GB", [float(told["device_peak_bytes"]) / 1e9])
    yield figure(case, "relative difference of the answer", "1", [float(told["relative_difference"])])


def _restarted(
    folder: Path, base: Path, gpus: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    first, second, merged = (folder / name for name in ("first", "second", "merged"))
    adapters = _start(first, base, (_ADAPTERS,), gpus, arguments)
    seen = _watch(adapters, first, until=_UPDATES)
    if adapters.wait():
        raise SystemExit((first / "log").read_text()[-6000:])
    began = time.monotonic()
    tool = [
        sys.executable,
        _ROOT / "tools" / "merge_lora.py",
        base,
        first / "run" / "export" / "peft",
        merged,
    ]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    merging = time.monotonic() - began
    after = _watch(_start(second, merged, (_WHOLE,), gpus, arguments), second, until=1)
    case = f"stop, merge, restart, GPUs: {gpus}"
    yield figure(case, _METRIC, "s", [after[1] - seen[_UPDATES] - _seconds_of(second, 1)])
    yield figure(case, "of these, the merge", "s", [merging])


def _seconds_of(run: Path, update: int) -> float:
    return next(row["time/update_seconds"] for row_update, row in _rows(run) if row_update == update)


def _start(
    run: Path, model: Path, phases: tuple[str, ...], gpus: int, arguments: argparse.Namespace
) -> subprocess.Popen[bytes]:
    run.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        gpus,
        "--master_port",
        port,
        "--no_local_rank",
    ]
    own = [
        __file__,
        "--model",
        model,
        "--output",
        run,
        *(["--tiny"] if arguments.tiny else []),
        "--train",
        *phases,
    ]
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {})}
    with (run / "log").open("w") as log:
        command = [sys.executable, *(launcher if gpus > 1 else []), *own]
        return subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _watch(process: subprocess.Popen[bytes], run: Path, *, until: int) -> dict[int, float]:
    """Returns when the row of each update was first seen, once that of `until` is; a run that goes on to all
    weights is ended."""
    seen: dict[int, float] = {}
    while until not in seen:
        for update, _ in _rows(run):
            seen.setdefault(update, time.monotonic())
        if (
            process.poll() is not None
            and until not in seen
            and not any(update == until for update, _ in _rows(run))
        ):
            raise SystemExit(f"{run}: exited with {process.returncode}\n{(run / 'log').read_text()[-6000:]}")
        time.sleep(0.02)
    if until != _UPDATES:
        os.killpg(process.pid, 9)
        process.wait()
    return seen


def _rows(run: Path) -> list[tuple[int, dict[str, float]]]:
    metrics = run / "run" / "metrics.jsonl"
    return (
        [(update, row) for update, row in read_metrics(metrics) if "loss/total" in row]
        if metrics.is_file()
        else []
    )


def _write_base(folder: Path, *, is_tiny: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelConfig(
        source="LTXVideoTransformer3DModel", config=LTXVideo.tiny_config() if is_tiny else {}
    )
    model: Any = build_model(source, seed=0, device=device)
    model.to(torch.float32 if is_tiny else torch.bfloat16).save_pretrained(folder)


def _train(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = _config(arguments)
    with dist.process_group():
        clips = _clips(arguments.model, is_tiny=arguments.tiny)
        DiffusionTrainer(config, dataset=clips, validation=clips[:1]).train(resume="never")


def _clips(model: Path, *, is_tiny: bool) -> list[dict[str, Tensor]]:
    config = json.loads((model / "config.json").read_text())
    side = (_TINY_SIZE if is_tiny else _SIZE) // _SPATIAL
    latents = (config["in_channels"], 1 + (_FRAMES - 1) // _TEMPORAL, side, side)
    generator = torch.Generator().manual_seed(0)
    sizes = {"latents": latents, "prompt_embeds": (_TEXT_TOKENS, config["caption_channels"])}
    return [
        {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}
        for _ in range(2 * _BATCH)
    ]


def _config(arguments: argparse.Namespace) -> DiffusionTrainerConfig:
    size = _TINY_SIZE if arguments.tiny else _SIZE
    phase = {
        "resolution": f"{size}x{size}",
        "duration": {"frames": _FRAMES},
        "micro_batch_size": _BATCH,
        "accumulation": 1,
        "learning_rate": 1e-5,
    }
    phases = {
        _ADAPTERS: {
            **phase,
            "name": _ADAPTERS,
            "updates": _UPDATES,
            "training_mode": "lora",
            "lora": {"rank": 32},
        },
        _WHOLE: {**phase, "name": _WHOLE, "updates": 1000, "training_mode": "full"},
    }
    values: dict[str, Any] = {
        "output_dir": str(arguments.output / "run"),
        "model": {"source": "LTXVideoTransformer3DModel", "pretrained": str(arguments.model)},
        "vae": {"source": "AutoencoderKLLTXVideo", "spatial_stride": _SPATIAL, "temporal_stride": _TEMPORAL},
        "data": {"train": "unused", "num_workers": 0},
        "curriculum": {"phases": [phases[name] for name in arguments.train]},
        "engine": {
            "deepspeed_config": str(
                _ROOT / "ds_configs" / f"zero1_{'fp32' if arguments.tiny else 'bf16'}.json"
            )
        },
        "checkpoint": {"every_updates": 1000},
        "evaluation": {"max_clips": 1, "num_pictures": 0, "noise_levels": [0.5]},
        "report": {"flush_updates": 1},
    }
    return DiffusionTrainerConfig.model_validate(values)


if __name__ == "__main__":
    main()
