"""Files, modules, commands and options that pages, docstrings and comments name are there."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from aiprod_ds.cli import main

_ROOT = Path(__file__).resolve().parents[2]
_PAGES = [_ROOT / "README.md", _ROOT / "ds_configs" / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_DOTTED = re.compile(r"(?<![\w./])aiprod_ds((?:\.[A-Za-z_]\w*)+)")
_PATH = re.compile(
    r"(?<![\w./-])((?:aiprod_ds|benchmarks|configs|docs|ds_configs|launch|tests|tools)/[\w.,{}/-]*[\w}])"
)
_FILE = re.compile(r"`([\w/]+\.py)`")
# Files of others, named beside the project that they are of.
_OF_OTHERS = {"contperceptual.py", "dac/nn/loss.py", "runtime/fp16/loss_scaler.py", "scripts/evaluate.py"}
_COMMAND = re.compile(r"(?:^|`)aiprod-ds ([a-z]+)([^`\n#]*)", flags=re.MULTILINE)


@cache
def _files() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(name for name in listed.stdout.split("\0") if name and (_ROOT / name).is_file())


def _texts() -> Iterator[tuple[str, str]]:
    """Yields a place and a text: a page or script as a whole, of Python files each docstring and comment."""
    for name in _files():
        path = _ROOT / name
        if path in _PAGES or path.suffix in (".sh", ".sbatch", ".yaml", ".toml") or name == "Makefile":
            yield name, path.read_text(encoding="utf-8")
        elif path.suffix == ".py":
            yield from ((f"{name}:{line}", text) for line, text in _prose(path.read_text(encoding="utf-8")))


def _prose(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and token.string.startswith('"""')
        ):
            yield token.start[0], token.string


def _resolves(dotted: str) -> bool:
    """Returns whether `.a.b.Name.attribute` leads from the package to a module, or to a name in one."""
    here, parts = _ROOT / "aiprod_ds", dotted.strip(".").split(".")
    while parts and (here / parts[0]).is_dir():
        here /= parts.pop(0)
    if parts and here.joinpath(f"{parts[0]}.py").is_file():
        source = here / f"{parts.pop(0)}.py"
    else:
        source = here / "__init__.py"
    body = ast.parse(source.read_text(encoding="utf-8")).body
    for part in parts:
        found = [entry for entry in _entries(body) if part in _names(entry)]
        if not found:
            return False
        body = found[0].body if isinstance(found[0], ast.ClassDef) else []
    return True


def _entries(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for entry in body:
        yield from _entries(entry.body) if isinstance(entry, ast.If) else [entry]


def _names(entry: ast.stmt) -> set[str]:
    if isinstance(entry, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {entry.name}
    if isinstance(entry, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in entry.names}
    targets = entry.targets if isinstance(entry, ast.Assign) else [getattr(entry, "target", None)]
    return {
        node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)
    }


def _spelled_out(name: str) -> list[str]:
    """Returns a/{b,c}.py as a/b.py and a/c.py."""
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", name))]
    return ["".join(each) for each in product(*parts)]


def _exists(path: str) -> bool:
    """Returns whether all that `path` spells is there; a part in capitals is for the reader to name, and
    what a wheel holds in `shipped` is here at the top."""
    path = path.removeprefix("aiprod_ds/shipped/")
    return re.search(r"/[A-Z]+\b(?!\.md)", path) is not None or all(
        (_ROOT / name).exists() for name in _spelled_out(path.rstrip(","))
    )


def _is_file(name: str, place: str) -> bool:
    """Returns whether `place` may call a file `name`: the end of a path; alone it is beside what names it, or
    the only one that is called so. `my_package` is the reader's."""
    if name.startswith("my_package/"):
        return True
    beside = (_ROOT / place.partition(":")[0]).parent / name
    found = [file for file in _files() if file == name or file.endswith(f"/{name}")]
    return beside.is_file() or len(found) == 1


def test_modules_and_attributes_that_are_named_exist() -> None:
    named = [(place, dotted) for place, text in _texts() for dotted in _DOTTED.findall(text)]
    assert len(named) > 100
    assert [f"{place}: aiprod_ds{dotted}" for place, dotted in named if not _resolves(dotted)] == []


def test_paths_that_are_named_exist() -> None:
    named = [(place, path) for place, text in _texts() for path in _PATH.findall(text)]
    assert len(named) > 100
    assert [f"{place}: {path}" for place, path in named if not _exists(path)] == []


def test_files_that_are_named_exist() -> None:
    named = [(place, name) for place, text in _texts() for name in _FILE.findall(text)]
    assert len(named) > 100
    assert {name for _, name in named} >= _OF_OTHERS
    assert [
        f"{place}: {name}" for place, name in named if name not in _OF_OTHERS and not _is_file(name, place)
    ] == []


@pytest.mark.parametrize(
    ("dotted", "is_there"),
    [
        (".train.loop", True),
        (".train.loop.TrainingLoop.run", True),
        (".VideoVAETrainer", True),
        (".models.families", True),
        (".config.curriculum.CurriculumPhase", True),
        (".train.no_such_module", False),
        (".train.loop.NoSuchClass", False),
        (".train.loop.TrainingLoop.no_such_method", False),
    ],
)
def test_what_is_looked_up_is_found_or_not(dotted: str, is_there: bool) -> None:
    assert _resolves(dotted) == is_there


def test_paths_and_files_are_found_or_not() -> None:
    assert _exists("aiprod_ds/losses/{video,kl}.py")
    assert not _exists("aiprod_ds/losses/{video,no_such_file}.py")
    assert _is_file("kl.py", "aiprod_ds/losses/video.py:1")
    assert _is_file("train/run.py", "README.md")
    assert not _is_file("run.py", "README.md"), "several are called so"
    assert not _is_file("no_such_file.py", "README.md")


def test_commands_and_options_of_the_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = {
        (command, option)
        for page in _PAGES
        for command, rest in _COMMAND.findall(page.read_text(encoding="utf-8"))
        for option in ("--help", *re.findall(r"--[a-z][a-z-]*", rest))
    }
    assert len(named) > 20
    unknown = []
    for command, option in sorted(named):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        if end.value.code != 0 or option not in capsys.readouterr().out:
            unknown.append(f"{command} {option}")
    assert unknown == []
