"""Imports point downwards, and importing a module does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Heavy packages and the only modules that may load them.
_OWNERS = {
    "deepspeed": {
        f"aiprod_ds.engine.deepspeed_{name}" for name in ("engine", "internals", "parameters", "state")
    },
    "wandb": {"aiprod_ds.metrics.wandb"},
    "peft": {"aiprod_ds.models.lora"},
}

# Imports every module but the owners in one fresh interpreter and reports what changed in it.
_PROBE = """
import importlib, json, logging, os, sys, threading
def state():
    import torch
    return {
        "environment": sorted(os.environ.items()),
        "threads": threading.active_count(),
        "log handlers": [type(handler).__name__ for handler in logging.getLogger().handlers],
        "random state": torch.random.get_rng_state().tolist(),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "children": len(__import__("multiprocessing").active_children()),
    }
import torch, numpy, diffusers, transformers, torchmetrics  # what these change on import is theirs, not ours
for package in PACKAGES:
    assert package not in sys.modules, package + " is loaded by a library"
before, findings = state(), []
for name in MODULES:
    importlib.import_module(name)
    after = state()
    findings += [f"{name} changes {key}" for key in before if before[key] != after[key]]
    findings += [f"{name} loads {package}" for package in PACKAGES if package in sys.modules]
    if findings:
        break
sys.stdout.write(json.dumps(findings))
"""


def _modules(root: Path) -> list[str]:
    names = []
    for path in sorted((root / "aiprod_ds").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name != "aiprod_ds.__main__"]


def _run(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_imports_point_downwards(repository_root: Path) -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    finished = _run([str(tool), "--no-cache", "--no-logo"], repository_root)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.slow
def test_importing_a_module_does_nothing_else(repository_root: Path) -> None:
    modules = [
        name for name in _modules(repository_root) if not any(name in owners for owners in _OWNERS.values())
    ]
    assert len(modules) > 10
    probe = _PROBE.replace("MODULES", repr(modules)).replace("PACKAGES", repr(sorted(_OWNERS)))
    finished = _run([sys.executable, "-W", "error", "-c", probe], repository_root)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == []  # nothing but the answer on stdout: no module prints


@pytest.mark.slow
def test_looking_at_a_configuration_loads_no_training_engine(repository_root: Path) -> None:
    # peft is not looked for: diffusers loads it when it makes an autoencoder.
    probe = (
        "import sys\n"
        "from aiprod_ds.cli import main\n"
        "for command in ('check', 'plan'):\n"
        "    try:\n"
        "        code = main([command, 'configs/video_vae/tiny.yaml'])\n"
        "    except SystemExit as error:\n"
        "        code = error.code\n"
        "    assert not code, code\n"
        "    loaded = [name for name in ('deepspeed', 'wandb') if name in sys.modules]\n"
        "    assert not loaded, f'{command} loads {loaded}'\n"
    )
    finished = _run([sys.executable, "-c", probe], repository_root)
    assert finished.returncode == 0, finished.stdout + finished.stderr
