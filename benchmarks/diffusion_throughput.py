"""How fast does the diffusion trainer train LTX-Video 2B on one GPU in the curriculum's three phases, and in
how much memory?

Every case is a process of its own that trains diffusers' LTXVideoTransformer3DModel in its default size (1.92
billion parameters, random weights) with `DiffusionTrainer`: the loop, ZeRO-1, AdamW with fp32 masters, flow
matching, logging. `checkpointed` recomputes the blocks in the backward pass, `eager` keeps everything,
`compiled` keeps everything and compiles each block. Latents and prompts (128 tokens) are noise from memory.
After the warm-up, the runs are consecutive stretches of updates of the one process; then it is ended, so that
nobody waits for its checkpoint. TFLOP/s are credited by `Family.flops_per_update`: 6 N B S + 12 L B S^2 D,
recomputing not counted.

    python benchmarks/diffusion_throughput.py --output benchmarks/results/NAME.json

`--tiny` runs a small model in fp32 on any machine, to see that the script works. It does not show: several
GPUs, reading from disk, LoRA, a text mask, the quality of what is learned, how far two processes differ, or
all of the time of compiling, of which the first update has most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine import dist
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.trainers.diffusion import DiffusionTrainer

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_STRIDES = ModelStrides(spatial=32, temporal=8)
_TEXT_TOKENS = 128
_MODES = ("checkpointed", "eager", "compiled")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    frames: int
    size: int
    batch: int
    goal_tflops: float | None = None


_PHASES = {
    "low": _Shape(frames=9, size=256, batch=16, goal_tflops=445.0),
    "medium": _Shape(frames=17, size=512, batch=8, goal_tflops=593.0),
    "high": _Shape(frames=49, size=1024, batch=4, goal_tflops=593.0),
}
_TINY_PHASES = {"low": _Shape(frames=9, size=64, batch=4), "medium": _Shape(frames=17, size=64, batch=2)}


def main() -> None:
    """Measures every case in turn and writes one result file."""
    parser = argparse.ArgumentParser(
        description="Speed and peak memory of the diffusion trainer on LTX-Video 2B."
    )
    parser.add_argument("--updates", type=int, default=12, help="of a run")
    parser.add_argument("--warm-up", type=int, default=10, help="updates before the first run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as low-compiled; all by default")
    parser.add_argument("--train", metavar="CASE", help=argparse.SUPPRESS)  # the side of one case's process
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments)
        return
    phases = _TINY_PHASES if arguments.tiny else _PHASES
    cases = arguments.only or [f"{phase}-{mode}" for phase in phases for mode in _MODES]
    rows = [row for case in cases for row in _rows(case, _metrics_of_own_process(case, arguments), arguments)]
    write_result(arguments.output, "diffusion_throughput", rows)


def _rows(case: str, metrics: list[dict[str, float]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape = (_TINY_PHASES if arguments.tiny else _PHASES)[case.partition("-")[0]]
    starts = range(
        arguments.warm_up, arguments.warm_up + arguments.runs * arguments.updates, arguments.updates
    )
    runs = [metrics[start : start + arguments.updates] for start in starts]
    seconds = [sum(row["time/update_seconds"] for row in run) for run in runs]
    waited = [sum(row["time/data_wait_seconds"] for row in run) for run in runs]
    flops = _flops_per_update(shape, is_tiny=arguments.tiny) * arguments.updates
    rows = [
        figure(
            case,
            "credited speed",
            "TFLOP/s",
            [flops / value / 1e12 for value in seconds],
            goal=shape.goal_tflops,
        ),
        figure(
            case,
            "clips per second",
            "clips/s",
            [shape.batch * arguments.updates / value for value in seconds],
        ),
        figure(
            case,
            "peak device memory",
            "GB",
            [run[-1].get("memory/device_peak_bytes", 0.0) / 1e9 for run in runs],
        ),
        figure(case, "first update", "s", [metrics[0]["time/update_seconds"]]),
        figure(
            case,
            "waiting for data",
            "%",
            [100 * part / whole for part, whole in zip(waited, seconds, strict=True)],
        ),
    ]
    print(f"{case}: {rows[0]['value']:.1f} TFLOP/s, {rows[2]['value']:.1f} GB", flush=True)
    return rows


def _flops_per_update(shape: _Shape, *, is_tiny: bool) -> float:
    model = build_model(_source(is_tiny=is_tiny), seed=0, device="meta")
    tokens = _STRIDES.latents(shape.frames) * (shape.size // _STRIDES.spatial) ** 2
    family = LTXVideo.of(model, _STRIDES)
    return family.flops_per_update(model, batch_size=shape.batch, num_tokens={"video": tokens})


def _metrics_of_own_process(case: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Returns the metrics of as many updates as are wanted, and ends the process that trains."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--train",
            case,
            "--output",
            folder,
            *(["--tiny"] if arguments.tiny else []),
        ]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {})}
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                while process.poll() is None:
                    rows = _training_rows(Path(folder) / "run" / "metrics.jsonl")
                    if len(rows) >= arguments.warm_up + arguments.runs * arguments.updates:
                        return rows
                    time.sleep(0.2)
                log.seek(0)
                raise SystemExit(f"{case}: exited with {process.returncode}\n{log.read()[-6000:]}")
            finally:
                process.kill()
                process.wait()


def _training_rows(metrics: Path) -> list[dict[str, float]]:
    return [row for _, row in read_metrics(metrics) if "loss/total" in row] if metrics.is_file() else []


def _train(arguments: argparse.Namespace) -> None:
    phase, _, mode = arguments.train.partition("-")
    shape = (_TINY_PHASES if arguments.tiny else _PHASES)[phase]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(_source(is_tiny=arguments.tiny), seed=0, device=device)
    family = LTXVideo.of(model, _STRIDES)
    if mode == "compiled":
        for block in family.repeated_blocks(model):
            block.compile()
    clips = _clips(shape, family)
    config = _config(arguments.output / "run", shape, mode, is_tiny=arguments.tiny)
    with dist.process_group():
        DiffusionTrainer(config, model=model, dataset=clips, validation=clips[:1]).train(resume="never")


def _source(*, is_tiny: bool) -> ModelConfig:
    return ModelConfig(source="LTXVideoTransformer3DModel", config=LTXVideo.tiny_config() if is_tiny else {})


def _clips(shape: _Shape, family: LTXVideo) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    side = shape.size // _STRIDES.spatial
    sizes = {
        "latents": (family.token_width, _STRIDES.latents(shape.frames), side, side),
        "prompt_embeds": (_TEXT_TOKENS, family.text_width),
    }
    return [
        {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}
        for _ in range(2 * shape.batch)
    ]


def _config(folder: Path, shape: _Shape, mode: str, *, is_tiny: bool) -> DiffusionTrainerConfig:
    settings = json.loads((_SETTINGS / ("zero1_fp32.json" if is_tiny else "zero1_bf16.json")).read_text())
    settings["activation_checkpointing"] = {"enabled": mode == "checkpointed"}
    phase = {
        "name": "measured",
        "resolution": f"{shape.size}x{shape.size}",
        "duration": {"frames": shape.frames},
        "global_batch_size": shape.batch,
        "learning_rate": 1e-5,
        "updates": 100_000,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "LTXVideoTransformer3DModel"},
        "vae": {
            "source": "AutoencoderKLLTXVideo",
            "spatial_stride": _STRIDES.spatial,
            "temporal_stride": _STRIDES.temporal,
        },
        "data": {"train": "unused", "num_workers": 0 if is_tiny else 2},
        "curriculum": {"phases": [phase]},
        "engine": {"deepspeed_config": settings},
        "checkpoint": {"every_updates": 100_000},
        "evaluation": {"max_clips": 1, "num_pictures": 0, "noise_levels": [0.5]},
    }
    return DiffusionTrainerConfig.model_validate(values)


if __name__ == "__main__":
    main()
