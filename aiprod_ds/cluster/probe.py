"""What one host can tell about itself, as JSON on its standard output: run by ssh on every host before a run.

Owns the measuring; what is wrong with the answers is judged in `findings`. Writes one file into the run
folder, if one is named, and leaves it there for the other hosts to find; `examine` removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aiprod_ds.report.environment import describe_environment

_PACKAGE = Path(__file__).resolve().parents[1]
_TOOLS = ("g++", "ninja", "nvcc", "numactl", "pdsh")
_WRITTEN_BYTES = 64 << 20
_MATMUL_SECONDS = 0.5


def probe(*, folder: str | None = None, token: str = "", measures: bool = True) -> dict[str, Any]:
    """Returns what is known of this host, JSON-ready.

    Args:
        folder: The run folder, which need not exist.
        token: Name of the file to leave in the nearest existing folder.
        measures: Also time a matrix product on every device and a write into the folder.
    """
    environment = describe_environment()
    versions = environment["versions"]
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    return {
        "hostname": socket.gethostname(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "addresses": _addresses(),
        "reached_at": (os.environ.get("SSH_CONNECTION", "").split() + [""] * 3)[2],
        "free_port": _free_port(),
        "python": sys.executable,
        "versions": versions,
        "code_sha256": package_sha256(),
        "commit": (environment["git"] or {}).get("commit"),
        "cores": environment["hardware"]["cores"],
        "memory_bytes": environment["hardware"]["memory_bytes"],
        "shared_memory_bytes": _free_bytes(Path("/dev/shm")),
        "is_cpu_run": uses_cpu(os.environ),
        "gpus": [] if uses_cpu(os.environ) else [_gpu(index) for index in range(torch.cuda.device_count())],
        "tools": {name: _which(name) for name in _TOOLS},
        "folder": None if folder is None else _folder(Path(folder), token, measures=measures),
        "matmul": _matmuls() if measures else [],
    }


def uses_cpu(environment: Mapping[str, str]) -> bool:
    """Returns whether ranks with this environment train on the CPU."""
    return environment.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def package_sha256() -> str:
    """Returns one hash over the names and contents of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def nearest_folder(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that exists."""
    return next(candidate for candidate in (path.absolute(), *path.absolute().parents) if candidate.is_dir())


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": list(capability),
        "memory_bytes": total,
        "free_bytes": free,
        "has_bf16": capability >= (8, 0),  # torch says yes from 7.0 on, because it emulates
        "has_fp16": capability >= (7, 0),
        "has_kernels": has_kernels(capability, torch.cuda.get_arch_list()),
    }


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Returns whether a torch build for `architectures` (`sm_70`, `compute_90`, ...) runs on a GPU of this
    compute capability.

    Machine code runs on GPUs of the same major and no lower minor version; `compute_` code is compiled for
    newer ones.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind == "compute" and built <= capability:
            return True
    return False


def _matmuls() -> list[dict[str, Any]]:
    if uses_cpu(os.environ):
        return [_matmul(torch.device("cpu"), torch.float32, 1024)]
    kinds = [
        torch.bfloat16 if torch.cuda.get_device_capability(index) >= (8, 0) else torch.float16
        for index in _devices()
    ]
    return [
        _matmul(torch.device("cuda", index), kind, 8192)
        for index, kind in zip(_devices(), kinds, strict=True)
    ]


def _devices() -> range:
    return range(torch.cuda.device_count())


def _matmul(device: torch.device, kind: torch.dtype, size: int) -> dict[str, Any]:
    left = torch.randn(size, size, device=device, dtype=kind)
    _multiply(left, 1)
    took, times = 0.0, 1
    while took < _MATMUL_SECONDS:
        took = _multiply(left, times)
        rate = 2.0 * size**3 * times / took
        times *= 2
    return {"device": str(device), "type": str(kind).removeprefix("torch."), "flops_per_second": rate}


def _multiply(left: torch.Tensor, times: int) -> float:
    is_gpu = left.device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(left.device)
    began = time.perf_counter()
    for _ in range(times):
        left @ left
    if is_gpu:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - began


def _folder(folder: Path, token: str, *, measures: bool) -> dict[str, Any]:
    place = nearest_folder(folder)
    found: dict[str, Any] = {"place": str(place), "free_bytes": _free_bytes(place)}
    data = os.urandom(1 << 20)  # some file systems compress
    try:
        began = time.perf_counter()
        with (place / token).open("wb") as file:
            for _ in range(_WRITTEN_BYTES >> 20 if measures else 1):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    except OSError as error:
        (place / token).unlink(missing_ok=True)
        return {**found, "problem": str(error)}
    return {**found, "bytes_per_second": _WRITTEN_BYTES / seconds} if measures else found


def _free_bytes(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.is_dir() else None


def _which(tool: str) -> str | None:
    """Returns where a tool is, first beside this Python, as the ranks find it."""
    return shutil.which(
        tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    )


def _addresses() -> list[str]:
    """Returns this host's addresses on networks, as its own name gives them."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("", 0))
        port: int = trial.getsockname()[1]
        return port


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(**json.loads(sys.argv[1]))) + "\n")
