"""Nothing is unpickled without restraint: every call in the package that could do so is looked at in its
source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_THE_PLACE = "aiprod_ds/convert/restricted_pickle.py"
# Reads a TorchScript file after its hash was found to be the expected one.
_HASHED = ("aiprod_ds/metrics/video_features.py", "torch.jit.load")
_FOLDERS = ("aiprod_ds", "tools", "benchmarks")
_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_HARMLESS = {"UnpicklingError", "dumps", "dump"}
_CALLS = {"eval", "exec"}


def _faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in _MODULES and node.attr not in _HARMLESS:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Call):
            yield from _call_faults(node)


def _call_faults(call: ast.Call) -> Iterator[tuple[int, str]]:
    name = ast.unparse(call.func)
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and settings.get("weights_only") != "True":
        yield call.lineno, "torch.load without weights_only=True"
    if settings.get("weights_only") == "False" or settings.get("allow_pickle") == "True":
        yield call.lineno, "a setting that unpickles"
    if name in _CALLS or name.endswith((".unsafe_load", "hub.load", "jit.load", "dcp_to_torch_save")):
        yield call.lineno, name


def test_nothing_is_unpickled_without_restraint(repository_root: Path) -> None:
    found = []
    for folder in _FOLDERS:
        for path in sorted((repository_root / folder).rglob("*.py")):
            name = str(path.relative_to(repository_root))
            faults = [
                fault for fault in _faults(ast.parse(path.read_text(encoding="utf-8"))) if name != _THE_PLACE
            ]
            found += [f"{name}:{line}: {what}" for line, what in faults if (name, what) != _HASHED]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "from pickle import loads",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_each_kind_is_found(source: str) -> None:
    assert list(_faults(ast.parse(source)))


def test_what_is_restrained_is_not_found() -> None:
    assert not list(
        _faults(ast.parse("torch.load(path, weights_only=True); pickle.UnpicklingError; safe_open(path)"))
    )
