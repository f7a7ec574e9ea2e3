"""How fast does the diffusion trainer train LTX-Video 2B on one GPU in the curriculum's three phases, and in how much memory?

Every run is a process of its own that trains diffusers' LTXVideoTransformer3DModel in its default size (1.92 billion parameters,
random weights) with `DiffusionTrainer`: the loop, ZeRO-1, AdamW with fp32 masters, flow matching, logging. `checkpointed`
recomputes the blocks in the backward pass, `eager` keeps everything, `compiled` keeps everything and compiles each block. Latents
and prompts (128 tokens) are noise from memory. A first phase warms up, a second one of the same shape is measured. TFLOP/s are
credited by `Family.flops_per_update`: 6 N B S + 12 L B S^2 D, recomputing not counted.

    python benchmarks/diffusion_throughput.py --output benchmarks/results/NAME.json

`--tiny` runs a small model in fp32 on any machine, to see that the script works. It does not show: several GPUs, reading from
disk, LoRA, a text mask, the quality of what is learned, or all of the time of compiling, of which the first update has most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.run import ModelConfig
from aiprod_ds.curriculum.plan import ModelStrides
from aiprod_ds.engine import dist
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.report.jsonl import read_metrics
from aiprod_ds.train.diffusion import DiffusionTrainer

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_STRIDES = ModelStrides(spatial=32, temporal=8)
_TEXT_TOKENS = 128
_DROPPED = 5  # the first updates of the measured phase, in which the loader's workers start
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
    parser = argparse.ArgumentParser(description="Speed and peak memory of the diffusion trainer on LTX-Video 2B.")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as low-compiled; all by default")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)  # the side of one run's process
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.output.write_text(json.dumps(_measure(arguments)))
        return
    phases = _TINY_PHASES if arguments.tiny else _PHASES
    cases = [f"{phase}-{mode}" for phase in phases for mode in _MODES]
    results: dict[str, list[dict[str, float]]] = {case: [] for case in arguments.only or cases}
    for _ in range(arguments.runs):
        for case, measured in results.items():
            measured.append(_in_own_process(case, arguments))
    rows = [row for case, measured in results.items() for row in _rows(case, measured, phases)]
    write_result(arguments.output, "diffusion_throughput", rows)


def _rows(case: str, measured: list[dict[str, float]], phases: dict[str, _Shape]) -> list[dict[str, Any]]:
    goal = phases[case.partition("-")[0]].goal_tflops
    return [
        figure(case, "credited speed", "TFLOP/s", [run["tflops"] for run in measured], goal=goal),
        figure(case, "clips per second", "clips/s", [run["clips_per_second"] for run in measured]),
        figure(case, "peak device memory", "GB", [run["peak_bytes"] / 1e9 for run in measured]),
        figure(case, "first update", "s", [run["first_seconds"] for run in measured]),
        figure(case, "waiting for data", "%", [run["data_wait_percent"] for run in measured]),
    ]


def _in_own_process(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--measure", case, "--output", str(output)]
        command += [f"--updates={arguments.updates}", f"--warm-up={arguments.warm_up}", *(["--tiny"] if arguments.tiny else [])]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {})}
        finished = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if finished.returncode:
            raise SystemExit(f"{case}: exited with {finished.returncode}\n{finished.stdout[-6000:]}")
        result: dict[str, float] = json.loads(output.read_text())
    print(f"{case}: {result['tflops']:.1f} TFLOP/s, {result['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return result


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    phase, _, mode = arguments.measure.partition("-")
    shape = (_TINY_PHASES if arguments.tiny else _PHASES)[phase]
    source = ModelConfig(source="LTXVideoTransformer3DModel", config=LTXVideo.tiny_config() if arguments.tiny else {})
    model = build_model(source, seed=0)
    family = LTXVideo.of(model, _STRIDES)
    tokens = _STRIDES.latents(shape.frames) * (shape.size // _STRIDES.spatial) ** 2
    flops = family.flops_per_update(model, batch_size=shape.batch, num_tokens={"video": tokens})
    if mode == "compiled":
        for block in family.repeated_blocks(model):
            block.compile()
    clips = _clips(shape, family)
    with tempfile.TemporaryDirectory() as folder, dist.process_group():
        config = _config(Path(folder) / "run", shape, mode, arguments)
        DiffusionTrainer(config, model=model, dataset=clips, validation=clips[:1]).train(resume="never")
        rows = [row for _, row in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss/total" in row]
    measured = rows[arguments.warm_up + _DROPPED :]
    seconds = sum(row["time/update_seconds"] for row in measured)
    return {
        "tflops": flops * len(measured) / seconds / 1e12,
        "clips_per_second": shape.batch * len(measured) / seconds,
        "peak_bytes": max(row.get("memory/device_peak_bytes", 0.0) for row in measured),
        "first_seconds": rows[0]["time/update_seconds"],
        "data_wait_percent": 100 * sum(row["time/data_wait_seconds"] for row in measured) / seconds,
    }


def _clips(shape: _Shape, family: LTXVideo) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    side = shape.size // _STRIDES.spatial
    sizes = {
        "latents": (family.token_width, _STRIDES.latents(shape.frames), side, side),
        "prompt_embeds": (_TEXT_TOKENS, family.text_width),
    }
    return [
        {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()} for _ in range(2 * shape.batch)
    ]


def _config(folder: Path, shape: _Shape, mode: str, arguments: argparse.Namespace) -> DiffusionTrainerConfig:
    settings = json.loads((_SETTINGS / ("zero1_fp32.json" if arguments.tiny else "zero1_bf16.json")).read_text())
    settings["activation_checkpointing"] = {"enabled": mode == "checkpointed"}
    phase = {
        "resolution": f"{shape.size}x{shape.size}",
        "duration": {"frames": shape.frames},
        "global_batch_size": shape.batch,
        "learning_rate": 1e-5,
    }
    lengths = {"warm_up": arguments.warm_up, "measured": _DROPPED + arguments.updates}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "LTXVideoTransformer3DModel"},
        "vae": {"source": "AutoencoderKLLTXVideo", "spatial_stride": _STRIDES.spatial, "temporal_stride": _STRIDES.temporal},
        "data": {"train": "unused", "num_workers": 0 if arguments.tiny else 2},
        "curriculum": {"phases": [{**phase, "name": name, "updates": updates} for name, updates in lengths.items()]},
        "engine": {"deepspeed_config": settings},
        "checkpoint": {"every_updates": 10_000},
        "evaluation": {"max_clips": 1, "num_pictures": 0, "noise_levels": [0.5]},
    }
    return DiffusionTrainerConfig.model_validate(values)


if __name__ == "__main__":
    main()
