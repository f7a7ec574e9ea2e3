"""The benchmark of several GPUs: what it starts, what it makes of times, and what it does after a failure."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.testing.dist import run_forked

_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))


def _arguments(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    import scaling

    monkeypatch.setattr(sys, "argv", ["scaling.py", "--tiny", "--output", "unused", *options])
    return scaling._arguments()


def _run(case: str, stage: int, gpus: int, seconds: float, batch: int = 4) -> Any:
    from scaling import Run
    from scaling_ranks import Work

    found = {
        "seconds": [seconds, seconds],
        "first_seconds": 1.0,
        "peak_bytes": 0,
        "flops": 1e12,
        "first_loss": None,
        "first_norm": None,
    }
    return Run(work=Work(case=case, stage=stage, phase="low", batch=batch), gpus=gpus, found=found)


def test_one_gpu_runs_one_stage_and_the_batches_that_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    import scaling

    options = ("--gpus", "1", "2", "--phases", "low", "--zero-stages", "1", "3", "--strong")
    arguments = _arguments(monkeypatch, *options)

    def planned(case: str, gpus: int) -> list[tuple[int, int]]:
        return [(work.stage, work.batch) for work in scaling._works(case, gpus, arguments)]

    assert planned("trainer", 1) == [(1, 4), (1, 2)]
    assert planned("trainer", 2) == [(1, 4), (1, 2), (3, 4), (3, 2)]
    assert planned("fsdp2", 2) == [(2, 4), (2, 2), (3, 4), (3, 2)]


def test_figures_are_put_beside_one_gpu_and_the_fastest_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    import scaling

    arguments = _arguments(monkeypatch, "--gpus", "1", "2", "--phases", "low", "--strong")
    runs = [
        _run("trainer", 1, 1, 1.0),
        _run("trainer", 1, 1, 0.6, batch=2),
        _run("trainer", 1, 2, 1.25),
        _run("trainer", 1, 2, 0.8, batch=2),
        _run("trainer", 3, 2, 2.5),
        _run("fsdp2", 2, 2, 1.0),
        _run("deepspeed", 1, 2, 1.5),
    ]
    rows = {(row["case"], row["metric"]): row for row in scaling._rows(runs, arguments)}
    weak, strong, stage_3 = (runs[index].name for index in (2, 3, 4))
    weak_metric, strong_metric = (f"{kind} scaling, of one GPU's speed" for kind in ("weak", "strong"))
    assert rows[weak, weak_metric]["value"] == pytest.approx(80)
    assert rows[weak, "communication that is not hidden"]["value"] == pytest.approx(20)
    assert rows[strong, strong_metric]["value"] == pytest.approx(100 * 1.0 / (2 * 0.8))
    assert rows[strong, "communication that is not hidden"]["value"] == pytest.approx(100 * 0.2 / 0.8)
    assert rows[stage_3, "speed of ZeRO 1"]["value"] == pytest.approx(50)
    assert rows[weak, "samples per second"]["value"] == pytest.approx(8 / 1.25)
    assert rows[weak, "updates per second"]["peer"] == "fsdp2, ZeRO 2, which is 1.25 times as fast"
    assert (weak, strong_metric) not in rows
    assert (strong, weak_metric) not in rows


def test_ranks_that_fail_say_why_and_lines_before_that_count(tmp_path: Path) -> None:
    from own_ranks import LINES, run_ranks

    lines: list[Any] = []
    script = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path / LINES)!r}).write_text('{{\"one\": 1}}\\n')\n"
        "time.sleep(0.3) if os.environ['RANK'] == '0' else sys.exit('the second is ill')\n"
    )
    error = run_ranks(["-c", script], tmp_path, ranks=2, seconds_per_line=30, on_line=lines.append)
    assert error == "rank 1 exited with 1\nthe second is ill\n"
    assert lines == [{"one": 1}]


def test_ranks_that_hang_are_ended_and_say_where(tmp_path: Path) -> None:
    from own_ranks import run_ranks

    script = "import time\ntime.sleep(60)\n"
    error = run_ranks(["-c", script], tmp_path, ranks=1, seconds_per_line=0.5, on_line=print)
    assert error is not None
    assert error.startswith("nothing was measured in 0 s\nFatal Python error: Aborted")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "case",
    ["trainer", *(pytest.param(case, marks=pytest.mark.exhaustive) for case in ("deepspeed", "fsdp2"))],
)
def test_figures_of_two_ranks_are_written(case: str, tmp_path: Path) -> None:
    written = tmp_path / "one.json"
    options = ["--tiny", "--gpus", "2", "--cases", case, "--phases", "low", "--zero-stages", "1"]
    arguments = {"name": "scaling", "options": [*options, "--output", str(written)]}
    code, told = run_forked(run_script, arguments=arguments, timeout_seconds=600)
    assert code == 0, told
    name = f"low, {case}, ZeRO {2 if case == 'fsdp2' else 1}, 2 GPUs, 4 clips each"
    assert name in told
    rows = {row["metric"]: row for row in json.loads(written.read_text())["rows"] if row["case"] == name}
    assert rows.keys() >= {"updates per second", "samples per second", "credited speed of a GPU"}
    assert len(rows["time of an update"]["runs"]) == 2
    assert all(math.isfinite(row["value"]) for row in rows.values())
    assert ("first loss" in rows) == (case == "trainer")


def run_script(name: str, options: list[str]) -> tuple[int, str]:
    """Runs a script of benchmarks/ in a fork of a process that has imported everything, and returns its exit
    code and what it said; the processes that it starts are real."""
    script = _ROOT / "benchmarks" / f"{name}.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *options]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    return int(left.value.code or 0), told.getvalue()
