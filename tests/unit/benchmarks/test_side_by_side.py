"""The scripts that put the trainer beside bare loops: what they refuse, leave out and write."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.testing.dist import run_forked

_ROOT = Path(__file__).resolve().parents[3]
_ROW = {"case", "metric", "unit", "value", "spread", "runs", "goal"}


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(_ROOT / folder))


def _oracle(**gradients: Tensor) -> Any:
    from gradient_check import Oracle

    return Oracle(gradients=gradients, precision="bf16")


def test_the_worst_gradient_is_named() -> None:
    oracle = _oracle(first=torch.tensor([3.0, 0.0]), second=torch.tensor([0.0, 4.0]))
    # Adam's beta1 is 0.9 and nothing is clipped, so moments are a tenth of gradients.
    moments = {"first": torch.tensor([0.3, 0.0]), "second": torch.tensor([0.0, 0.416])}
    worst = oracle.compare(moments, beta1=0.9, is_clipped=False, case="plain")
    assert worst.name == "second"
    assert worst.error == pytest.approx(0.16 / 4, rel=1e-5)
    assert worst.error_of_all == pytest.approx(0.16 / 5, rel=1e-5)


def test_gradients_are_compared_as_they_are_clipped() -> None:
    # The norm is 5, so that clipping to 1 leaves a fifth; 1e-6 is what clipping adds to the norm.
    oracle = _oracle(first=torch.tensor([3.0]), second=torch.tensor([4.0]))
    moments = {"first": torch.tensor([0.06]), "second": torch.tensor([0.08])}
    assert oracle.compare(moments, beta1=0.9, is_clipped=True, case="flat").error < 1e-5


@pytest.mark.parametrize(
    ("found", "what"),
    [(0.0, "lost"), (0.8, "counted twice"), (0.2, "a half of it"), (math.nan, "not a number")],
)
def test_a_wrong_gradient_ends_the_benchmark_with_its_name(found: float, what: str) -> None:
    oracle = _oracle(first=torch.tensor([3.0]), second=torch.tensor([4.0]))
    moments = {"first": torch.tensor([0.3]), "second": torch.tensor([found])}
    with pytest.raises(SystemExit, match=r"flat: gradients must be plain autograd's.* of second and.*1 of 2"):
        oracle.compare(moments, beta1=0.9, is_clipped=False, case="flat")


def test_a_parameter_without_a_moment_had_no_gradient() -> None:
    oracle = _oracle(first=torch.tensor([3.0]), second=torch.tensor([4.0]))
    with pytest.raises(SystemExit, match="difference of 1 of second"):
        oracle.compare({"first": torch.tensor([0.3])}, beta1=0.9, is_clipped=False, case="plain")


def test_gradients_that_are_all_a_little_wrong_are_refused() -> None:
    oracle = _oracle(first=torch.tensor([3.0]), second=torch.tensor([4.0]))
    moments = {"first": torch.tensor([0.33]), "second": torch.tensor([0.44])}
    with pytest.raises(SystemExit, match=r"and of 0\.1 together; 0 of 2"):
        oracle.compare(moments, beta1=0.9, is_clipped=False, case="flat")


def test_a_stopwatch_counts_the_updates_of_each_run() -> None:
    from update_timer import Length, UpdateTimer

    timer, told = UpdateTimer(Length(warm_up=2, runs=2, updates=3, alone=1)), []
    while not timer.after_update():
        told.append(timer.is_measuring)
    assert told == [False, False, *[True] * 6], "and the last update, which stands alone, ended the loop"
    assert (len(timer.seconds), len(timer.cpu_seconds), len(timer.host_seconds)) == (2, 2, 1)


@pytest.mark.slow
def test_a_measured_training_ends_where_it_would_save(run_folder: Path) -> None:
    from trainer_runs import measured_training
    from workload import Choices
    from workloads import TINY_WORKLOADS

    workload, choices = TINY_WORKLOADS["ltx"], Choices(precision="fp32", engine="local", workers=0)
    trainer = workload.trainer_of(
        workload.shapes["low"], run_folder, choices, model=workload.model("cpu"), performance={}
    )
    phase = trainer.config.curriculum.phases[0].model_copy(update={"updates": 3})
    curriculum = trainer.config.curriculum.model_copy(update={"phases": (phase,)})
    trainer.config = trainer.config.model_copy(update={"curriculum": curriculum})
    with dist.process_group():
        found = measured_training(trainer)
    assert [row["clock/samples"] for row in found["rows"]] == [4, 8, 12]
    assert found["memory"] == {"reserved": 0, "used": 0}, "read where the end of the phase would be saved"
    assert not list((run_folder / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["trainer", pytest.param("flat", marks=pytest.mark.exhaustive)])
def test_training_speed_writes_figures_of_a_case(case: str, tmp_path: Path) -> None:
    result = _result("training_speed", tmp_path, "--tiny", "--cases", case, "--phases", "low")
    name, rows = f"low, {case}", {(row["case"], row["metric"]): row for row in result["rows"]}
    assert rows.keys() >= {
        (name, "time of an update"),
        (name, "updates per second"),
        (name, "samples per second"),
        (name, "tokens per second"),
        (name, "credited speed"),
        (name, "MFU, measured matrix product"),
        (name, "peak device memory"),
        (name, "host time of an update"),
        (name, "first update"),
    }
    assert len(rows[name, "time of an update"]["runs"]) == 2
    assert rows[name, "largest difference of a gradient"]["value"] < 1e-3  # fp32: the script's own tolerance
    assert ((name, "waiting for data") in rows) == (case == "trainer")


@pytest.mark.slow
def test_host_time_writes_a_ratio_of_a_case(tmp_path: Path) -> None:
    result = _result(
        "host_time",
        tmp_path,
        *(
            "--tiny",
            "--compile",
            "off",
            "--rounds",
            "1",
            "--updates",
            "2",
            "--cases",
            "trainer, local engine",
        ),
    )
    rows = {(row["case"], row["metric"]): row for row in result["rows"]}
    own, base = (rows[case, "CPU time of an update"]["value"] for case in ("trainer, local engine", "bare"))
    ratio = rows["trainer, local engine", "CPU time over bare"]
    assert ratio["value"] == pytest.approx(own / base)
    assert (ratio["unit"], ratio["goal"]) == ("times", 1.2)


def _result(script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Returns what a script wrote, after checking its form and that a table can be made of it."""
    written = folder / "results" / "one.json"
    arguments = {"name": script, "options": [*options, "--output", str(written)]}
    run_forked(run_script, arguments=arguments, timeout_seconds=600)
    result: dict[str, Any] = json.loads(written.read_text())
    assert result["name"] == script
    assert result.keys() == {"name", "date", "hardware", "versions", "command", "commit", "rows"}
    for row in result["rows"]:
        assert row.keys() - {"peer", "peer_value"} == _ROW
        assert math.isfinite(row["value"])

    from performance_tables import tables

    shutil.copy(_ROOT / "benchmarks" / f"{script}.py", folder)
    assert f"### {script}" in tables(folder)
    return result


def run_script(name: str, options: list[str]) -> str:
    """Runs a script of benchmarks/ in a fork of a process that has imported everything, and returns what it
    said; where it starts processes of its own, they are real."""
    script = _ROOT / "benchmarks" / f"{name}.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *options]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        runpy.run_path(str(script), run_name="__main__")
    return told.getvalue()
