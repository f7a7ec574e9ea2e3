"""What the run ran on: versions, hardware, commit, command. Read once at the start; nothing here changes the
process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aiprod_ds.report.command import ranks_of, starting_command

_PACKAGES = (
    "aiprod-ds",
    "torch",
    "torchvision",
    "torchaudio",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "av",
    "numpy",
    "torchmetrics",
    "pydantic",
)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def describe_environment() -> dict[str, Any]:
    """Returns versions, hardware, git state and command, JSON-ready.

    Returns:
        `versions`: name -> version of what is installed; `hardware`: cpu, cores, memory_bytes, gpus; `git`:
        commit and has_changes of the source tree, None for an installed package; `command`: what started all
        ranks, as it was typed; `ranks` and `hosts`: how many there are; `platform`.
    """
    return {
        "versions": _versions(),
        "hardware": _hardware(),
        "git": _git_state(_PACKAGE_FOLDER),
        "command": starting_command(),
        **ranks_of(),
        "platform": platform.platform(),
    }


def peak_rss_bytes() -> int:
    """Returns the highest resident memory of this process so far; 0 where the system does not tell
    (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rss_bytes() -> int:
    """Returns the resident memory of this process now; 0 where the system does not tell (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_peak_bytes() -> int:
    """Returns the highest GPU memory that this process's tensors took since `reset_device_peak`; 0 without a
    GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]


def reset_device_peak() -> None:
    """Begins a new measurement of `device_peak_bytes`."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The wheel's metadata leaves out the build (+cu130, +cpu) that decides what torch can do.
    versions["torch"] = str(torch.__version__)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit that `folder` is tracked in; None if it is not (an installed package, no git)."""
    if not _git(folder, "ls-files", "__init__.py"):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {
        "commit": commit,
        "has_changes": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str:
    """Returns the output of a git command, empty if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
