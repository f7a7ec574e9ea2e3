"""Every public name stands on docs/python.md, in an example that runs there as it is printed."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import aiprod_ds

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
_FENCED = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def _code() -> str:
    """Returns the page with what is not Python left empty, so that failures name its lines."""
    text = _PAGE.read_text(encoding="utf-8")
    lines = [""] * len(text.splitlines())
    for block in _FENCED.finditer(text):
        first = text.count("\n", 0, block.start(1))
        inside = block[1].splitlines()
        lines[first : first + len(inside)] = inside
    return "\n".join(lines) + "\n"


@pytest.mark.slow  # it loads diffusers
def test_every_example_of_the_page_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(_code(), {}, _PAGE.name, str(_PAGE), 0)
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert told == [], "".join(told)
    assert len(test.examples) > 40
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_has_an_example_and_a_row() -> None:
    examples = "".join(example.source for example in doctest.DocTestParser().get_examples(_code()))
    used = {name for name in aiprod_ds.__all__ if re.search(rf"import .*\b{name}\b", examples)}
    called = {
        name
        for name in aiprod_ds.__all__
        if re.search(rf"\b{name}\b[.(,) ]", examples.replace("import ", "#"))
    }
    assert set(aiprod_ds.__all__) - used == set()
    assert set(aiprod_ds.__all__) - called == set()
    rows = {
        name
        for row in re.findall(r"^\|.*\|$", _PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert set(aiprod_ds.__all__) - rows == set()
