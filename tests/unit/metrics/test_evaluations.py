"""The file of a run's evaluations: every record comes back, and what a kill leaves is read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import (
    FILE,
    EvaluationRecord,
    Medium,
    NotJudged,
    append_evaluation,
    keep_evaluations,
    read_evaluations,
)

RECORD = EvaluationRecord(
    update=50,
    samples=400,
    phase="low",
    phase_index=0,
    reason="interval",
    seconds=1.5,
    metrics={"psnr_db": 21.5},
    headline="PSNR 21.5 dB",
    clips=("a.mp4", "b.mp4"),
    not_judged=(NotJudged(clip="b.mp4", measure="si_sdr_db", reason="digital silence"),),
    media=(
        Medium(path="samples/x.mp4", kind="film", role="original", caption="clip 1", clip=1, source="a.mp4"),
    ),
)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == ()
    later = replace(RECORD, update=100, reason="phase_end")
    append_evaluation(tmp_path, RECORD)
    append_evaluation(tmp_path, later)
    assert read_evaluations(tmp_path) == (RECORD, later)
    keep_evaluations(tmp_path, [RECORD])
    assert read_evaluations(tmp_path) == (RECORD,)


def test_what_is_not_finite_is_nan_afterwards(tmp_path: Path) -> None:
    append_evaluation(tmp_path, replace(RECORD, metrics={"psnr_db": math.inf}))
    assert math.isnan(read_evaluations(tmp_path)[0].metrics["psnr_db"])


def test_a_line_that_a_kill_cut_is_left_out_and_another_is_an_error(tmp_path: Path) -> None:
    append_evaluation(tmp_path, RECORD)
    path = tmp_path / FILE
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole[:40], encoding="utf-8")
    assert read_evaluations(tmp_path) == (RECORD,)
    path.write_text(whole[:40] + "\n" + whole, encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluations\.jsonl:1: must be an evaluation's record"):
        read_evaluations(tmp_path)


def test_keys_of_a_later_version_are_left_out() -> None:
    assert EvaluationRecord.from_dict({**RECORD.to_dict(), "later": 1}) == RECORD
