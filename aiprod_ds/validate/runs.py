"""The runs that `training.py` compares, each a process of its own.

Owns the tiny configurations, their clips, and the kill. Executed as a module; its folder gets `codes.json`,
and of each run what a resumed one must repeat.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.engine import dist
from aiprod_ds.models.families import registry
from aiprod_ds.testing.forked import fork_ranks, import_for_ranks, wait_for_ranks
from aiprod_ds.testing.runs import record_of, without_plots
from aiprod_ds.testing.tiny import tiny_ltx_vae, tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer
from aiprod_ds.validate.training import KINDS, UPDATES

_BATCH = 2
_CLIPS = _BATCH * UPDATES
_RUN_SECONDS = 300.0
_NAMES = ("whole", "killed", "resumed")


class TensorClips:
    """Clips in memory, which any trainer takes as its dataset.

    Args:
        items: Tensors or mappings.
        kills_after: Folder of a checkpoint; once it is there, the next clip that is read ends the process.
    """

    def __init__(self, items: list[Any], *, kills_after: Path | None = None) -> None:
        self._items = items
        self._kills_after = kills_after

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        if self._kills_after is not None and self._kills_after.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return self._items[index]


def serve(folder: Path) -> None:
    """Does all runs, of each kind the whole one, the killed one and the one that goes on.

    On a CPU they are forks of this process, one after the other. A GPU cannot be used in a fork of a process
    that has asked for it, so there each run is a process of its own, and the kinds run side by side.
    """
    if dist.choose_device().type == "cpu":
        import_for_ranks()
        found = [_runs_of(folder, _fork, kind) for kind in KINDS]
    else:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(partial(_runs_of, folder, _spawn), KINDS))
    codes = {name: {kind: own[name] for kind, (own, _) in zip(KINDS, found, strict=True)} for name in _NAMES}
    seconds = {kind: taken for kind, (_, taken) in zip(KINDS, found, strict=True)}
    (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


def _runs_of(folder: Path, start: Callable[[str, str, Path], int], kind: str) -> tuple[dict[str, int], float]:
    """Returns the exit codes of the runs of a kind, by name, and how long they took."""
    began = time.monotonic()
    return {name: start(name, kind, folder) for name in _NAMES}, time.monotonic() - began


def _fork(name: str, kind: str, folder: Path) -> int:
    processes = fork_ranks(partial(_train, name, kind, folder), ranks=1, is_launched=False)
    return wait_for_ranks(processes, timeout_seconds=_RUN_SECONDS)[0]


def _spawn(name: str, kind: str, folder: Path) -> int:
    command = [sys.executable, "-m", "aiprod_ds.validate.runs", str(folder), name, kind]
    return subprocess.run(command, timeout=_RUN_SECONDS, check=False).returncode


# Below runs in the runs' own processes.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    config: Any
    items: list[Any]
    trainer: Callable[..., Trainer[Any]]


def _train(name: str, kind: str, folder: Path) -> int:
    """Trains one run in its folder, and writes what a resumed run must repeat."""
    settings = _settings()
    # the killed run and the one that goes on are one
    run_folder = folder / f"{'whole' if name == 'whole' else 'killed'}_{kind}"
    first = run_folder / "checkpoints" / "update_000001"
    run = _RUNS[kind](str(run_folder), settings)
    data = TensorClips(run.items, kills_after=first if name == "killed" else None)
    with dist.process_group(), without_plots():
        trainer = run.trainer(config=run.config, dataset=data, validation=TensorClips(run.items[:_BATCH]))
        record = record_of(trainer.train(), run_folder)
        record |= {"device": _device_name(), "settings": settings}
    (folder / f"{name}_{kind}.json").write_text(json.dumps(record), encoding="utf-8")
    return 0


def _settings() -> str:
    """Returns the name of shipped settings for this process's device."""
    if dist.choose_device().type == "cpu":
        return "zero1_fp32"
    return "zero1_bf16" if torch.cuda.get_device_capability() >= (8, 0) else "zero1_fp16_v100"


def _device_name() -> str:
    device = dist.choose_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _common(run_folder: str, settings: str, phase: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": run_folder,
        "curriculum": {
            "phases": [
                {
                    "name": "only",
                    "global_batch_size": _BATCH,
                    "updates": UPDATES,
                    "learning_rate": 1e-3,
                    **phase,
                }
            ]
        },
        "engine": {"deepspeed_config": settings},
        "performance": {"compile": "off", "deterministic": True},
        "checkpoint": {"every_updates": 1},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
    }


def _video_vae(run_folder: str, settings: str) -> _Run:
    values = {
        **_common(run_folder, settings, {"resolution": "32x32", "duration": {"frames": 5}}),
        "model": {"source": "AutoencoderKLLTXVideo", "config": tiny_ltx_vae()},
        "data": {"train": "in memory", "num_workers": 0},
        "loss": {"perceptual_weight": 0.1, "perceptual": {"mode": "l2"}},
    }
    clips = [torch.rand(3, 5, 32, 32, generator=_generator(index)) * 2 - 1 for index in range(_CLIPS)]
    return _Run(config=VAETrainerConfig.model_validate(values), items=clips, trainer=VideoVAETrainer)


def _audio_vae(run_folder: str, settings: str) -> _Run:
    values = {
        **_common(run_folder, settings, {"duration": {"frames": 2048}}),
        "trainer": "audio_vae",
        "model": {"source": "AutoencoderOobleck", "config": {**tiny_oobleck(), "audio_channels": 1}},
        "data": {"train": "in memory", "num_workers": 0, "sample_rate_hz": 44_100, "channels": 1},
        "loss": {"spectral": {"fft_sizes": [256]}},
    }
    clips = [torch.rand(1, 2048, generator=_generator(index)) - 0.5 for index in range(_CLIPS)]
    return _Run(config=AudioVAETrainerConfig.model_validate(values), items=clips, trainer=AudioVAETrainer)


def _diffusion(run_folder: str, settings: str) -> _Run:
    transformer = registry.FIRST.tiny_config()
    values = {
        **_common(run_folder, settings, {"resolution": "32x32", "duration": {"frames": 9}}),
        "trainer": "diffusion",
        "model": {"source": registry.FIRST.transformer_class, "config": transformer},
        "vae": {"source": "AutoencoderKLLTXVideo", "config": tiny_ltx_vae()},
        "data": {"train": "in memory", "num_workers": 0, "caption_dropout": 0.0},
    }
    items = [
        {
            "latents": torch.randn(transformer["in_channels"], 3, 4, 4, generator=_generator(index)),
            "prompt_embeds": torch.randn(3, transformer["caption_channels"], generator=_generator(index)),
            "fps": 24.0,
        }
        for index in range(_CLIPS)
    ]
    return _Run(config=DiffusionTrainerConfig.model_validate(values), items=items, trainer=DiffusionTrainer)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_RUNS: Mapping[str, Callable[[str, str], _Run]] = {
    "video_vae": _video_vae,
    "audio_vae": _audio_vae,
    "diffusion": _diffusion,
}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_train(sys.argv[2], sys.argv[3], Path(sys.argv[1])))
    serve(Path(sys.argv[1]))
