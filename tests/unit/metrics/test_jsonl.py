"""metrics.jsonl: every update exactly once, also after a kill and a resume; strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.jsonl import JsonlSink, read_metrics


def write(path: Path, updates: range, *, resume_from_update: int | None = None) -> None:
    sink = JsonlSink(path, resume_from_update=resume_from_update)
    for update in updates:
        sink.log(update, {"loss/total": 1.0 / update})
    sink.close()


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", range(1, 4))
    assert read_metrics(tmp_path / "m.jsonl") == [
        (update, {"loss/total": 1.0 / update}) for update in (1, 2, 3)
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"loss/total": 1.0})
    assert read_metrics(tmp_path / "m.jsonl") == [(1, {"loss/total": 1.0})]
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="after close"):
        sink.log(2, {})


def test_non_finite_values_are_strict_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"loss/total": float("nan"), "gradient/norm": float("inf"), "loss/kl": float("-inf")})
    sink.close()
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert line == {"update": 1, "loss/total": "nan", "gradient/norm": "inf", "loss/kl": "-inf"}
    ((_, metrics),) = read_metrics(path)
    assert math.isnan(metrics["loss/total"])
    assert (metrics["gradient/norm"], metrics["loss/kl"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("torn", ["", '{"update": 6, "loss/to', '{"update": 6, "loss/total": 1.0}'])
def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path, torn: str) -> None:
    """Oracle: the file of an uninterrupted run. A line without its newline is torn, whatever it holds."""
    write(tmp_path / "whole.jsonl", range(1, 8))
    path = tmp_path / "m.jsonl"
    write(path, range(1, 6))
    with path.open("a") as file:
        file.write(torn)
    write(path, range(4, 8), resume_from_update=3)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_fresh_run_starts_a_new_file_and_resume_needs_none(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 6))
    write(path, range(1, 3))
    assert [update for update, _ in read_metrics(path)] == [1, 2]
    path.unlink()
    write(path, range(3, 5), resume_from_update=2)
    assert [update for update, _ in read_metrics(path)] == [3, 4]


@pytest.mark.parametrize(
    "line", ["[1]", "{}", '{"update": 1, "loss/total": []}', "\x00\x00", '{"update": null}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"update": 1}\n' + line + '\n{"update": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: must be a JSON object"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        JsonlSink(path, resume_from_update=2)
    assert path.read_bytes() == before
