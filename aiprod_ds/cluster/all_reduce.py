"""A short all-reduce over all hosts, with figures: whether the ranks of a run will reach each other, and how
fast.

Run by ssh once on every host, where it starts one process per slot; each joins the group as a rank of the run
would (gloo on CPUs, NCCL on GPUs). Before that it looks for the files that the hosts' probes left in the run
folder. Prints JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from aiprod_ds.engine import dist

GROUP_SECONDS = 45.0
_SEEN_WITHIN_SECONDS = 10.0
_CPU_BYTES, _GPU_BYTES = 16 << 20, 256 << 20
_SMALL_TIMES, _LARGE_TIMES = 20, 5


def run_host(
    *,
    first_rank: int,
    slots: list[int],
    world_size: int,
    address: str,
    port: int,
    folder: str | None,
    tokens: list[str],
) -> dict[str, Any]:
    """Returns what this host's ranks measured and which probes' files it does not see.

    Args:
        first_rank: Rank of this host's first slot; the others follow.
        slots: The GPUs to use, one rank each.
        world_size: Ranks on all hosts; the group waits for every one of them.
        address: That of the first host, where rank 0 listens.
        port: Free there.
        folder: Where the probes left their files; None without a run folder.
        tokens: Names of the files of all hosts' probes.
    """
    missing = [] if folder is None else _missing(Path(folder), tokens)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "aiprod_ds.cluster.all_reduce"],
            env=_environment(
                first_rank + index, slots, index, world_size=world_size, address=address, port=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(len(slots))
    ]
    outputs = [(rank.communicate(), rank.returncode) for rank in ranks]
    problems = [_last_line(errors) or f"exit code {code}" for (_, errors), code in outputs if code != 0]
    measured = [json.loads(output) for (output, _), code in outputs if code == 0]
    return {"missing_tokens": missing, "problem": problems[0] if problems else None, "ranks": measured}


def measure() -> dict[str, float]:
    """Returns the time of a small all-reduce and the rate of a large one over all ranks. Collective.

    Returns:
        `seconds`: median of 4-byte all-reduces. `bytes_per_second`: size over the median time of large ones,
        times 2 (n - 1) / n for n ranks: what every rank sends and receives.
    """
    with dist.process_group(timeout_seconds=GROUP_SECONDS) as device:
        ranks = dist.world_size()
        small = torch.ones(1, device=device)
        large = torch.ones((_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4, device=device)
        torch_dist.all_reduce(small)
        if small.item() != ranks:
            raise RuntimeError(f"the sum over {ranks} ranks of 1 must be {ranks}, got {small.item():g}")
        torch_dist.all_reduce(large)
        seconds = statistics.median(_timed(lambda: torch_dist.all_reduce(small)) for _ in range(_SMALL_TIMES))
        large_seconds = statistics.median(
            _timed(lambda: torch_dist.all_reduce(large)) for _ in range(_LARGE_TIMES)
        )
        share = 2 * (ranks - 1) / ranks
        return {"seconds": seconds, "bytes_per_second": large.numel() * 4 * share / large_seconds}


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _environment(
    rank: int, slots: list[int], index: int, *, world_size: int, address: str, port: int
) -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(str(slot) for slot in slots),
        "RANK": str(rank),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _missing(folder: Path, tokens: list[str]) -> list[str]:
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while True:
        missing = sorted(set(tokens) - {path.name for path in folder.iterdir()})
        if not missing or time.monotonic() >= deadline:
            return missing
        time.sleep(0.2)  # NFS shows new files late


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(run_host(**json.loads(sys.argv[1]))) + "\n")
    else:
        sys.stdout.write(json.dumps(measure()) + "\n")
