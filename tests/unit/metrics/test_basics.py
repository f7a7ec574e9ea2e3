"""Metric table, stopwatch, mirror guard and environment."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.metric_names import METRICS, Reduction, find_metric, table_markdown
from aiprod_ds.metrics.sinks import MirrorSink
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.report import environment
from aiprod_ds.report.environment import describe_environment, peak_rss_bytes, rss_bytes


def test_metric_names_are_unique_and_each_has_one_row_in_the_table() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    rows = table_markdown().splitlines()
    assert len(rows) == len(METRICS) + 2
    assert all(row.count("|") == 5 for row in rows)


def test_open_groups_take_new_terms() -> None:
    added = find_metric("loss/edge_sharpness")
    assert (added.reduction, added.label) == (Reduction.MEAN, "edge sharpness")
    assert find_metric("evaluation/lpips").reduction is Reduction.SAME


@pytest.mark.parametrize("name", ["los/total", "loss/", "loss", "clock/month"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Add a row"):
        find_metric(name)


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_every_second_belongs_to_one_activity() -> None:
    hands = Hands()
    watch = Stopwatch(now=hands)
    hands.time += 3
    watch.switch(Activity.TRAIN)
    hands.time += 5
    with watch.during(Activity.EVALUATION):
        hands.time += 7
        assert watch.activity is Activity.EVALUATION
        assert watch.seconds(Activity.TRAIN) == 5
    hands.time += 11
    assert watch.seconds(Activity.TRAIN) == 16
    expected = {
        "start": 3.0,
        "train": 16.0,
        "data_wait": 0.0,
        "evaluation": 7.0,
        "transition": 0.0,
        "checkpoint": 0.0,
    }
    assert watch.breakdown() == expected
    assert watch.breakdown() == expected


def test_an_error_ends_a_pause() -> None:
    watch = Stopwatch(now=Hands())
    watch.switch(Activity.TRAIN)
    with pytest.raises(RuntimeError), watch.during(Activity.CHECKPOINT):
        raise RuntimeError
    assert watch.activity is Activity.TRAIN


class FailingSink:
    """Fails at the update it is told to, and counts what it was asked."""

    def __init__(self, *, fail_at: int) -> None:
        self.fail_at = fail_at
        self.asked: list[int] = []

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        assert metrics is not None
        self.asked.append(update)
        if update == self.fail_at:
            raise ConnectionError("no route")

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        assert folder == Path("run")
        self.log(record.update, {})

    def close(self) -> None:
        self.log(-1, {})


def test_a_failing_mirror_warns_once_and_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    sink = FailingSink(fail_at=2)
    mirror = MirrorSink(sink, name="tracker")
    with caplog.at_level(logging.WARNING):
        for update in (1, 2, 3):
            mirror.log(update, {})
        mirror.close()
    assert sink.asked == [1, 2]
    assert len(caplog.records) == 1
    assert "mirror=tracker update=2" in caplog.text


def test_a_mirror_that_fails_at_media_goes_on_with_metrics(caplog: pytest.LogCaptureFixture) -> None:
    sink = FailingSink(fail_at=2)
    mirror = MirrorSink(sink, name="tracker")
    record = EvaluationRecord(
        update=2, samples=2, phase="low", phase_index=0, reason="interval", seconds=0.1, metrics={}
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mirror.log_evaluation(record, Path("run"))
        mirror.log(3, {})
        mirror.close()
    assert sink.asked == [2, 3, -1]
    assert len(caplog.records) == 1
    assert "mirror=tracker update=2 media disabled" in caplog.text


def test_a_mirror_that_fails_to_close_warns(caplog: pytest.LogCaptureFixture) -> None:
    mirror = MirrorSink(FailingSink(fail_at=-1), name="tracker")
    mirror.close()
    mirror.close()
    assert len(caplog.records) == 1


def test_environment_is_json_ready_and_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/aiprod-ds", "train", "my config.yaml"])
    described = json.loads(json.dumps(describe_environment()))
    assert described["command"] == "aiprod-ds train 'my config.yaml'"
    assert described["versions"]["torch"] == torch.__version__
    assert described["hardware"]["cores"] >= 1


def test_a_module_run_is_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/aiprod_ds/__main__.py", "plan"])
    assert describe_environment()["command"].endswith("-m aiprod_ds plan")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_figures_are_bytes() -> None:
    """A Python process with torch takes between 50 MB and this machine's memory."""
    assert 50e6 < rss_bytes() <= peak_rss_bytes() * 1.05 < 1e12


def test_git_state_is_that_of_the_folder_and_none_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made in a repository of its own: one commit, then a change, then a folder that git does not track."""
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "tester")
    monkeypatch.setattr(environment, "_PACKAGE_FOLDER", tmp_path)
    assert describe_environment()["git"] is None
    file = tmp_path / "__init__.py"
    file.write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = describe_environment()["git"]
    assert len(state["commit"]) == 40
    assert state["has_changes"] is False
    file.write_text("changed")
    assert describe_environment()["git"] == {"commit": state["commit"], "has_changes": True}
