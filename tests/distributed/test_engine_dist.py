"""The process-group helpers on two ranks through the real launcher, and what the launcher for tests does with
failures."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.dist import run_on_ranks

pytestmark = pytest.mark.dist


def use_every_helper(offset: float) -> dict[str, Any]:
    rank = dist.rank()
    dist.barrier()
    return {
        "rank": rank,
        "world_size": dist.world_size(),
        "is_main": dist.is_main(),
        "mean": dist.reduce_mean(torch.tensor([rank + offset, 2.0])).tolist(),
        "broadcast": dist.broadcast_object({"rank": rank}),
        "gathered": dist.gather_objects(rank * 10),
        "agree": [dist.all_agree(True), dist.all_agree(rank == 0)],
    }


def fail_on_rank_1() -> None:
    if dist.rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def hang(folder: str) -> None:
    Path(folder, str(dist.rank())).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def test_every_helper_agrees_on_two_ranks() -> None:
    results = run_on_ranks(use_every_helper, ranks=2, arguments={"offset": 1.0})
    common = {
        "world_size": 2,
        "mean": [1.5, 2.0],
        "broadcast": {"rank": 0},
        "gathered": [0, 10],
        "agree": [True, False],
    }
    assert results == [{"rank": 0, "is_main": True, **common}, {"rank": 1, "is_main": False, **common}]


def test_a_failing_rank_is_an_error_that_shows_its_output() -> None:
    with pytest.raises(EngineError, match=r"(?s)no result of ranks \[0, 1\].*rank 1 has had enough"):
        run_on_ranks(fail_on_rank_1, ranks=2, timeout_seconds=120)


def test_a_hanging_rank_is_killed_after_the_time_limit(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ran out of time"):
        run_on_ranks(hang, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=20)
    pids = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert len(pids) == 2, "both ranks were running when the limit came"
    deadline = time.monotonic() + 10  # a signal is delivered, not waited for
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


def _is_alive(pid: str) -> bool:
    """A killed process whose parent has not asked for it yet is a zombie, not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
