"""How much memory and time does an update take on one GPU, and what does the planner predict?

Measures through the project's own trainers (ZeRO-1, bf16, AdamW with fp32 masters, eager): LTX-Video 2B in
the curriculum's three shapes (128 text tokens; the last with and without activation checkpointing), its LoRA
of rank 32, AutoencoderKLLTXVideo (419 million parameters, without and with the perceptual loss, whose network
has random weights here) and AutoencoderOobleck. One process for each model runs its cases; checkpoints and
export are left out. The raw measurements are kept, so that the planner can be compared with them again
without a GPU (peak of a run, mean of the updates after the warm-up; one run):

    python benchmarks/planner_accuracy.py --raw RAW.json
    python benchmarks/planner_accuracy.py --raw RAW.json --compare benchmarks/results/NAME.json

`--tiny` runs small models in fp32 on any machine, to see that the script works. It does not show: several
GPUs, ZeRO-2 and 3, offload, compiled models, reading from disk, other cards.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vgg16
from trainer_runs import measured_training, run_in_own_process, seconds_per_update

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.trainers import trainer_class, trainer_config_class
from aiprod_ds.engine import dist
from aiprod_ds.losses import perceptual
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.report.environment import describe_environment
from aiprod_ds.testing.tiny import tiny_ltx_vae, tiny_oobleck
from aiprod_ds.train.planning.estimate import estimate_run
from aiprod_ds.trainers.base import Trainer

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_SPATIAL, _TEMPORAL, _TEXT_TOKENS = 32, 8, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of one phase.

    Attributes:
        length: Frames; of sound, samples.
        size: Height and width; 0 for sound.
        updates: How many are run.
        dropped: Of those, the first ones that are not measured.
    """

    length: int
    size: int
    batch: int
    updates: int
    dropped: int
    is_recomputed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One process.

    Attributes:
        trainer: As in a configuration.
        settings: What its configuration says beside the phases.
    """

    trainer: str
    source: str
    cases: dict[str, Case]
    settings: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)


_LOW, _MEDIUM = (
    Case(length=9, size=256, batch=16, updates=30, dropped=10),
    Case(length=17, size=512, batch=8, updates=24, dropped=8),
)
_HIGH = {"length": 49, "size": 1024, "batch": 4, "updates": 7, "dropped": 3}
_VAE_CASES = {
    "low": Case(length=9, size=256, batch=4, updates=24, dropped=8),
    "medium": Case(length=17, size=512, batch=2, updates=14, dropped=5),
}
_TINY_VIDEO_VAE = tiny_ltx_vae(width=16, latent_channels=8, patch_size=4, scaling=(True, False, False))
_TINY_OOBLECK = tiny_oobleck(width=16, latent_channels=8)
MODELS = {
    "ltx": Model(
        trainer="diffusion",
        source="LTXVideoTransformer3DModel",
        tiny=LTXVideo.tiny_config(),
        cases={
            "low": _LOW,
            "medium": _MEDIUM,
            "high_checkpointed": Case(**_HIGH, is_recomputed=True),
            "high": Case(**_HIGH),
        },
    ),
    "ltx_lora": Model(
        trainer="diffusion",
        source="LTXVideoTransformer3DModel",
        tiny=LTXVideo.tiny_config(),
        cases={"medium": _MEDIUM},
        settings={"training_mode": "lora", "lora": {"rank": 32}},
    ),
    "video_vae": Model(
        trainer="video_vae",
        source="AutoencoderKLLTXVideo",
        tiny=_TINY_VIDEO_VAE,
        cases=_VAE_CASES,
        settings={"loss": {"perceptual_weight": 0.0}},
    ),
    "audio_vae": Model(
        trainer="audio_vae",
        source="AutoencoderOobleck",
        tiny=_TINY_OOBLECK,
        cases={"clips": Case(length=65_536, size=0, batch=8, updates=14, dropped=5)},
    ),
    "video_vae_perceptual": Model(
        trainer="video_vae",
        source="AutoencoderKLLTXVideo",
        tiny=_TINY_VIDEO_VAE,
        cases=_VAE_CASES,
    ),
}
_FITTED = {
    ("ltx", "low"),
    ("ltx", "high"),
    ("ltx_lora", "medium"),
    ("video_vae", "medium"),
    ("audio_vae", "clips"),
}
"""The cases to which the constants of `aiprod_ds.planner.roofline` were fitted; nothing of memory was."""
_TINY_FRAMES, _TINY_SIZES, _TINY_SAMPLES = 9, {256: 64, 512: 96, 1024: 128}, 4096


def main() -> None:
    """Measures every model in turn, or reads what was measured."""
    parser = argparse.ArgumentParser(description="Memory and time of an update, predicted and measured.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--raw", type=Path, required=True, help="where the measurements are written, or read with --compare"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="RESULT",
        help="measure nothing: predict what RAW holds and write both",
    )
    parser.add_argument(
        "--measure", metavar="MODEL", help=argparse.SUPPRESS
    )  # the side of one model's process
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.output.write_text(json.dumps(_measure(arguments.measure, is_tiny=arguments.tiny)))
        return
    if arguments.compare:
        _compare(json.loads(arguments.raw.read_text()), arguments.compare)
        return
    options = [f"--raw={arguments.raw}", *(["--tiny"] if arguments.tiny else [])]
    environment = describe_environment()
    raw: dict[str, Any] = {key: environment[key] for key in ("hardware", "versions", "command", "git")} | {
        "models": {}
    }
    for name in arguments.only:
        began = time.perf_counter()
        raw["models"][name] = run_in_own_process(__file__, name, *options)
        arguments.raw.write_text(json.dumps(raw, indent=1))  # what is measured is kept if a later model fails
        _tell(name, raw["models"][name], time.perf_counter() - began, is_tiny=arguments.tiny)


def _compare(raw: dict[str, Any], output: Path) -> None:
    rows = [
        row
        for name, cases in raw["models"].items()
        for case, found in cases.items()
        for row in _both(name, case, found)
    ]
    result = {
        "name": "planner_accuracy",
        "date": raw.get("date", date.today().isoformat()),
        **{key: raw[key] for key in ("hardware", "versions")},
        "command": "planner_accuracy.py --raw RAW.json",
        "commit": (raw["git"] or {}).get("commit"),
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['case']}: {row['metric']} {row['value']:.4g} {row['unit']}, {row['peer']} "
            f"{row['peer_value']:.4g}"
        )


def _both(name: str, case: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the case's measured memory and time, with what the planner predicts for an H200 beside them."""
    kind, shape = MODELS[name], MODELS[name].cases[case]
    model = build_model(_source(kind, is_tiny=False), seed=0, device="meta")
    config = _config(kind, shape, Path("unused"), is_tiny=False)
    trainer = trainer_class(kind.trainer)(config, model=model)
    plan = trainer.plan(world_size=1)
    (cost,) = estimate_run(trainer, plan, MACHINES["h200-141gb"]).configured
    label = f"{name} {case}: {cost.shape}{', recomputed' if shape.is_recomputed else ''}"
    fit = "in the fit" if (name, case) in _FITTED else "not in the fit"
    peak = max(row["memory/device_peak_bytes"] for row in found["rows"]) / 1e9
    seconds = seconds_per_update(found["rows"], dropped=shape.dropped)
    return [
        _against(label, "peak device memory", "GB", peak, cost.memory.peak / 1e9),
        _against(label, f"seconds per update ({fit})", "s", seconds, cost.seconds_per_update),
    ]


def _against(case: str, metric: str, unit: str, measured: float, predicted: float) -> dict[str, Any]:
    peer = f"predicted, {100 * (predicted / measured - 1):+.1f} %"
    row = {
        "case": case,
        "metric": metric,
        "value": measured,
        "unit": unit,
        "spread": None,
        "runs": [],
        "goal": None,
    }
    return {**row, "peer": peer, "peer_value": predicted}


def _tell(name: str, phases: dict[str, Any], seconds: float, *, is_tiny: bool) -> None:
    print(f"{name}: took {seconds:.0f} s", flush=True)
    for case, found in phases.items():
        dropped = 1 if is_tiny else MODELS[name].cases[case].dropped
        peak = found["memory"].get("update_peak", 0) / 1e9
        print(
            f"{name} {case}: {seconds_per_update(found['rows'], dropped=dropped):.4f} s/update, {peak:.2f} "
            "GB",
            flush=True,
        )


def _measure(name: str, *, is_tiny: bool) -> dict[str, dict[str, Any]]:
    model, found = MODELS[name], {}
    device = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )  # random weights of 1.9 billion parameters take a CPU 15 s
    module = build_model(_source(model, is_tiny=is_tiny), seed=0, device=device)
    with tempfile.TemporaryDirectory() as folder, dist.process_group():
        if model.trainer == "video_vae":
            _make_random_vgg(Path(folder) / "vgg.pth")
        for case in model.cases:
            trainer = trainer_for(name, case, Path(folder) / case, model=module, is_tiny=is_tiny)
            found[case] = measured_training(trainer)
    return found


def _make_random_vgg(path: Path) -> None:
    torch.save(vgg16(weights=None).state_dict(), path)
    perceptual.locate_weights = lambda *_args, **_named: path  # type: ignore[assignment]


def trainer_for(name: str, case: str, folder: Path, *, model: nn.Module, is_tiny: bool) -> Trainer[Any]:
    """Returns the trainer of one case with its clips of noise."""
    kind, shape = MODELS[name], MODELS[name].cases[case]
    if is_tiny:
        shape = _tiny(shape)
    make = {
        "diffusion": partial(_latents, config=_source(kind, is_tiny=is_tiny).config),
        "video_vae": _video,
        "audio_vae": _sound,
    }
    clips = [
        make[kind.trainer](torch.Generator().manual_seed(seed), shape) for seed in range(2 * shape.batch)
    ]
    config = _config(kind, shape, folder, is_tiny=is_tiny)
    trainer: Trainer[Any] = trainer_class(kind.trainer)(
        config, model=model, dataset=clips, validation=clips[-1:]
    )
    return trainer


def _source(model: Model, *, is_tiny: bool) -> ModelConfig:
    return ModelConfig(source=model.source, config=model.tiny if is_tiny else {})


def _tiny(case: Case) -> Case:
    length, size = (_TINY_FRAMES, _TINY_SIZES[case.size]) if case.size else (_TINY_SAMPLES, 0)
    return Case(length=length, size=size, batch=2, updates=3, dropped=1, is_recomputed=case.is_recomputed)


def _config(model: Model, case: Case, folder: Path, *, is_tiny: bool) -> RunConfig:
    phase = {
        "name": "measured",
        "duration": {"frames": case.length},
        **({"resolution": f"{case.size}x{case.size}"} if case.size else {}),
        "global_batch_size": case.batch,
        "learning_rate": 1e-5,
        "updates": case.updates,
        "activation_checkpointing": case.is_recomputed,
    }
    values: dict[str, Any] = {
        "trainer": model.trainer,
        "output_dir": str(folder),
        "model": _source(model, is_tiny=is_tiny).model_dump(),
        "data": {"train": "unused", "num_workers": 0 if is_tiny else 2},
        "curriculum": {"phases": [phase]},
        "engine": {
            "deepspeed_config": json.loads(
                (_SETTINGS / f"zero1_{'fp32' if is_tiny else 'bf16'}.json").read_text()
            )
        },
        "checkpoint": {"every_updates": 10_000},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        **model.settings,
    }
    if model.trainer == "diffusion":
        vae = {"source": "AutoencoderKLLTXVideo", "spatial_stride": _SPATIAL, "temporal_stride": _TEMPORAL}
        values |= {"vae": vae, "evaluation": {**values["evaluation"], "noise_levels": [0.5]}}
    return trainer_config_class(model.trainer).model_validate(values)


def _sound(generator: torch.Generator, case: Case) -> Tensor:
    return torch.rand(2, case.length, generator=generator) - 0.5


def _video(generator: torch.Generator, case: Case) -> Tensor:
    return torch.rand(3, case.length, case.size, case.size, generator=generator) * 2 - 1


def _latents(generator: torch.Generator, case: Case, *, config: dict[str, Any]) -> dict[str, Tensor]:
    channels, width = (
        config.get(key, default) for key, default in (("in_channels", 128), ("caption_channels", 4096))
    )
    side = case.size // _SPATIAL
    sizes = {
        "latents": (channels, 1 + (case.length - 1) // _TEMPORAL, side, side),
        "prompt_embeds": (_TEXT_TOKENS, width),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in sizes.items()}


if __name__ == "__main__":
    main()
