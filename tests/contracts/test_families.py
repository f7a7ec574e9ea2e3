"""A family is one file and one line: nothing else in the package knows which families there are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiprod_ds.models.families.registry import FAMILIES

_CLASSES = {family.__name__ for family in FAMILIES}
_NAMES = {family.name for family in FAMILIES} | {family.transformer_class for family in FAMILIES}
_REGISTRY = "aiprod_ds/models/families/registry.py"
_QUESTIONS = {"isinstance", "issubclass", "getattr", "hasattr"}


def _faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name in _CLASSES)
        elif isinstance(node, ast.Constant) and node.value in _NAMES:
            yield f"names {node.value}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _QUESTIONS and node.args:
            asked = ast.unparse(node.args[0])
            if asked.rpartition(".")[2] == "family":
                yield f"asks {ast.unparse(node)}"


def test_no_file_but_its_own_asks_which_family_it_has(repository_root: Path) -> None:
    own = {Path(str(family.__module__).replace(".", "/") + ".py").as_posix() for family in FAMILIES}
    found = []
    for path in sorted((repository_root / "aiprod_ds").rglob("*.py")):
        name = path.relative_to(repository_root).as_posix()
        if name not in own | {_REGISTRY}:
            found += [f"{name}: {fault}" for fault in _faults(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from aiprod_ds.models.families.ltx2 import LTX2",
        "if family.name == 'ltx2': pass",
        "rules = {'WanTransformer3DModel': 1}",
        "isinstance(self.family, Joint)",
        "getattr(family, 'audio_token_width', None)",
    ],
)
def test_each_kind_of_question_is_found(source: str) -> None:
    assert list(_faults(ast.parse(source)))
