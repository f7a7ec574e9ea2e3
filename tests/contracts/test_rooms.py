"""The rooms of the package: none is too large, each says what it is for, and docs/architecture.md draws them
as they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = _ROOT / "aiprod_ds"
_ROOMS = sorted(path.parent for path in _PACKAGE.rglob("__init__.py"))
_MAP = _ROOT / "docs" / "architecture.md"
_MAX_FILES, _MAX_SHARE = 20, 0.10
_MIN_LINES, _MAX_LINES = 3, 9
_NODE = re.compile(r'^\s*(\w+)\["<b>(\w+)</b>(?:<br/>[^"]+)?"\]$')
_ARROWS = re.compile(r"^\s*(\w+) (-->|-\.->) ([\w &]+)$")


def _name(room: Path) -> str:
    return str(room.relative_to(_ROOT))


def _num_lines(room: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in room.glob("*.py"))


@pytest.mark.parametrize("room", _ROOMS, ids=_name)
def test_no_room_has_too_many_files(room: Path) -> None:
    assert len(list(room.glob("*.py"))) <= _MAX_FILES


def test_no_room_holds_too_much_of_the_package() -> None:
    lines = {_name(room): _num_lines(room) for room in _ROOMS}
    total = sum(lines.values())
    assert {name: count / total for name, count in lines.items() if count / total >= _MAX_SHARE} == {}


def test_every_folder_of_code_is_a_room() -> None:
    assert {path.parent for path in _PACKAGE.rglob("*.py")} == set(_ROOMS)


@pytest.mark.parametrize("room", _ROOMS, ids=_name)
def test_each_room_says_what_it_is_for(room: Path) -> None:
    source = (room / "__init__.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    assert _MIN_LINES <= len(text.splitlines()) <= _MAX_LINES
    if room == _PACKAGE:
        return
    for begin in ("Read ", "Called ", "Not here: "):
        assert re.search(rf"^{begin}", text, flags=re.MULTILINE), f"{begin!r} begins no line"
    first = re.findall(r"^Read `(\w+\.py)` first", text, flags=re.MULTILINE)
    assert [name for name in first if not (room / name).is_file()] == []
    assert len(first) == 1


def test_unit_tests_are_in_the_rooms_of_what_they_test() -> None:
    unit = _ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    assert len(folders) > 10
    scripts = Path("benchmarks")  # beside the package
    assert {folder for folder in folders if _PACKAGE / folder not in _ROOMS} - {scripts} == set()


def _layers() -> list[set[str]]:
    """Returns the names in each row of the contract, from the top."""
    text = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(
        r'^containers = \["aiprod_ds"\]\n.*?^layers = (\[.*?^\])', text, flags=re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return [set(re.findall(r"\w+", layer)) for layer in ast.literal_eval(found[1])]


def _picture() -> tuple[list[set[str]], dict[tuple[str, str], bool]]:
    """Returns the names in each row of the picture, from the top, and whether each arrow is solid; refuses
    what it cannot read."""
    (text,) = re.findall(
        r"^```mermaid\n(.*?)^```", _MAP.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    rows: list[set[str]] = []
    arrows: dict[tuple[str, str], bool] = {}
    for line in text.splitlines():
        node, ends = _NODE.match(line), _ARROWS.match(line)
        if re.match(r'^\s*subgraph \w+ \["[^"]+"\]$', line):
            rows.append(set())
        elif node:
            assert node[1] == node[2], line
            rows[-1].add(node[1])
        elif ends:
            new = {(ends[1], target.strip()): ends[2] == "-->" for target in ends[3].split("&")}
            assert not new.keys() & arrows.keys(), line
            arrows |= new
        else:
            assert line.strip() in {"flowchart TD", "end"}, line
    return rows, arrows


def _imports(source: str, target: str) -> bool:
    """Returns whether a file of the room, or the file, `source` imports from `target`, at any place in it."""
    files = [_PACKAGE / f"{source}.py", *(_PACKAGE / source).rglob("*.py")]
    named = re.compile(rf"^\s*from aiprod_ds\.{target}\b", flags=re.MULTILINE)
    return any(named.search(path.read_text(encoding="utf-8")) for path in files if path.is_file())


def test_the_picture_has_every_room_in_its_row() -> None:
    rows, _ = _picture()
    drawn = set().union(*rows)
    rooms = {room.name for room in _ROOMS if room.parent == _PACKAGE}
    assert rooms - drawn == set()
    assert {name for name in drawn - rooms if not (_PACKAGE / f"{name}.py").is_file()} == set()
    contract = [names & drawn for names in _layers()]
    assert rows == [names for names in contract if names]


def test_arrows_of_the_picture_are_imports_and_point_downwards() -> None:
    rows, arrows = _picture()
    place = {name: index for index, row in enumerate(rows) for name in row}
    assert len(arrows) > 20
    assert [(source, target) for source, target in arrows if place[source] >= place[target]] == []
    assert [ends for ends, is_solid in arrows.items() if _imports(*ends) != is_solid] == []
    assert set(place) - {name for ends in arrows for name in ends} == set()


def test_the_eight_files_to_read_exist() -> None:
    _, _, section = _MAP.read_text(encoding="utf-8").partition("\n## Read these eight files in this order\n")
    named = re.findall(r"^(\d)\. `(aiprod_ds/[\w/]+\.py)`: \S", section, flags=re.MULTILINE)
    assert [int(number) for number, _ in named] == list(range(1, 9))
    assert [file for _, file in named if not (_ROOT / file).is_file()] == []
    assert len({file for _, file in named}) == 8


def test_readers_find_the_map() -> None:
    assert "(docs/architecture.md)" in (_ROOT / "README.md").read_text(encoding="utf-8")
    assert "(architecture.md)" in (_ROOT / "docs" / "README.md").read_text(encoding="utf-8")
