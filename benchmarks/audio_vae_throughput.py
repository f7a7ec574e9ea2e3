"""How many clips a second does the audio VAE trainer train on one GPU, and in how much memory? Eager against
torch.compile.

Every run is a process of its own that trains diffusers' AutoencoderOobleck in its default size (weight norm
and channels as they are) with `AudioVAETrainer`: the loop, ZeRO-1, AdamW, all terms of the default loss,
batch 8 x 65,536 samples in stereo, no activation checkpointing. `compiled` compiles the encoder and the
decoder; the loss stays eager. A first phase warms up and compiles, a second one of the same shape is
measured. Clips are noise from memory, so no decoding is measured.

    python benchmarks/audio_vae_throughput.py --output benchmarks/results/NAME.json

`--tiny` runs a small model in fp32 and bf16 on any machine, to see that the script works. It does not show:
several GPUs, decoding, the quality of what is learned, or all of the time of compiling, of which the first
update has most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from torch import Tensor
from trainer_runs import run_in_own_process

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.engine import dist
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.tiny import tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_FILES = {"fp32": "zero1_fp32.json", "bf16": "zero1_bf16.json", "fp16": "zero1_fp16_v100.json"}
_GOAL_CLIPS_PER_SECOND = 125.0
_DROPPED = 5  # the first updates of the measured phase, in which the loader's workers start
_TINY_MODEL = tiny_oobleck(width=16, latent_channels=8)


def main() -> None:
    """Measures every case in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Clips per second and peak memory of the audio VAE trainer.")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=65_536)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as bf16-compiled; all by default")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)  # the side of one run's process
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.output.write_text(json.dumps(_measure(arguments)))
        return
    if arguments.tiny:
        arguments.batch, arguments.samples = 2, 4096
    precisions = ("fp32", "bf16") if arguments.tiny else ("bf16", "fp16")
    cases = [f"{precision}-{mode}" for precision in precisions for mode in ("eager", "compiled")]
    options = [
        f"--{name}={getattr(arguments, name.replace('-', '_'))}"
        for name in ("updates", "warm-up", "batch", "samples")
    ]
    options += ["--tiny"] if arguments.tiny else []
    results: dict[str, list[dict[str, float]]] = {case: [] for case in arguments.only or cases}
    for _ in range(arguments.runs):
        for case, measured in results.items():
            measured.append(run_in_own_process(__file__, case, *options))
            speed, peak = measured[-1]["clips_per_second"], measured[-1]["peak_bytes"]
            print(f"{case}: {speed:.2f} clips/s, {peak / 1e9:.2f} GB", flush=True)
    rows = [
        row for case, measured in results.items() for row in _rows(case, measured, is_tiny=arguments.tiny)
    ]
    write_result(arguments.output, "audio_vae_throughput", rows)


def _rows(case: str, measured: list[dict[str, float]], *, is_tiny: bool) -> list[dict[str, Any]]:
    goal = None if is_tiny else _GOAL_CLIPS_PER_SECOND
    return [
        figure(case, "clips per second", "clips/s", [run["clips_per_second"] for run in measured], goal=goal),
        figure(case, "peak device memory", "GB", [run["peak_bytes"] / 1e9 for run in measured]),
        figure(case, "first update", "s", [run["first_seconds"] for run in measured]),
        figure(case, "waiting for data", "%", [run["data_wait_percent"] for run in measured]),
    ]


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    precision, _, mode = arguments.measure.partition("-")
    model: Any = build_model(
        ModelConfig(source="AutoencoderOobleck", config=_TINY_MODEL if arguments.tiny else {}), seed=0
    )
    if mode == "compiled":
        model.encoder.compile()
        model.decoder.compile()
    clips = _clips(arguments)
    with tempfile.TemporaryDirectory() as folder, dist.process_group():
        config = _config(Path(folder) / "run", precision, arguments)
        AudioVAETrainer(config, model=model, dataset=clips, validation=clips[:1]).train(resume="never")
        rows = [row for _, row in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss/total" in row]
    measured = rows[arguments.warm_up + _DROPPED :]
    seconds = sum(row["time/update_seconds"] for row in measured)
    return {
        "clips_per_second": arguments.batch * len(measured) / seconds,
        "peak_bytes": max(row.get("memory/device_peak_bytes", 0.0) for row in measured),
        "first_seconds": rows[0]["time/update_seconds"],
        "data_wait_percent": 100 * sum(row["time/data_wait_seconds"] for row in measured) / seconds,
    }


def _clips(arguments: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(2, 2 * arguments.samples, generator=generator) - 0.5 for _ in range(2 * arguments.batch)
    ]


def _config(folder: Path, precision: str, arguments: argparse.Namespace) -> AudioVAETrainerConfig:
    settings = json.loads((_SETTINGS / _FILES[precision]).read_text())
    settings["activation_checkpointing"] = {"enabled": False}
    phase = {
        "duration": {"frames": arguments.samples},
        "global_batch_size": arguments.batch,
        "learning_rate": 1e-4,
    }
    lengths = {"warm_up": arguments.warm_up, "measured": _DROPPED + arguments.updates}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "AutoencoderOobleck"},
        "data": {"train": "unused", "num_workers": 0 if arguments.tiny else 4},
        "curriculum": {
            "phases": [{**phase, "name": name, "updates": updates} for name, updates in lengths.items()]
        },
        "engine": {"deepspeed_config": settings},
        "checkpoint": {"every_updates": 10_000},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
    }
    return AudioVAETrainerConfig.model_validate(values)


if __name__ == "__main__":
    main()
