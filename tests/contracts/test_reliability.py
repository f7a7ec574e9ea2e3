"""The table of docs/reliability.md: each of the sixteen promises has a test that is there, and a figure with
its date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "reliability.md"
_PROMISES = [f"R{number}" for number in range(1, 17)]
_ROW = re.compile(r"^\| (R\d+) \| (.*) \|$", flags=re.MULTILINE)
_PATH = re.compile(r"`((?:aiprod_ds|benchmarks|docs|tests)/[\w./-]+)`")
_DATE = re.compile(r"\(.*\b20\d\d-\d\d-\d\d\b.*\)")


def _rows() -> dict[str, list[str]]:
    """Returns promise, how, tests and figure of each row."""
    return {name: cells.split(" | ") for name, cells in _ROW.findall(_PAGE.read_text(encoding="utf-8"))}


def test_the_promises_are_all_there_and_in_order() -> None:
    assert list(_rows()) == _PROMISES


@pytest.mark.parametrize("name", _PROMISES)
def test_a_promise_has_a_test_and_a_dated_figure(name: str) -> None:
    promise, how, tests, figure = _rows()[name]
    assert promise
    assert _PATH.search(how) or "](" in how, "it must say where it is kept"
    assert [path for path in _PATH.findall(tests) if path.startswith("tests/")], "it must name a test"
    assert re.search(r"\d", figure), "it must have a figure"
    assert _DATE.search(figure), "its figure must have a date in brackets"


def test_files_that_the_page_names_are_there() -> None:
    named = _PATH.findall(_PAGE.read_text(encoding="utf-8"))
    assert [path for path in named if not (_ROOT / path).exists()] == []


def test_the_pages_lead_to_it() -> None:
    for page in ("README.md", "docs/README.md"):
        assert "reliability.md" in (_ROOT / page).read_text(encoding="utf-8"), page
