"""What must hold for the repository as a whole: commands that are true, no leaked paths, small samples."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

_MAX_SAMPLES_BYTES = 5_000_000
_MAX_FILE_BYTES = 2_000_000
# Brackets keep this file from matching itself.
_FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~}])/(?:[w]ork|[r]oot)/|/opt/[p]ypi"),
    "a package registry": re.compile(
        r"p[y]pi\.(?:org|python)|p[y]thonhosted|conda\.a[n]aconda", re.IGNORECASE
    ),
    "an index option": re.compile(r"--(?:extra-)?i[n]dex-url|--find-l[i]nks"),
}


def _tracked_files(root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def _make_targets(text: str) -> list[str]:
    return re.findall(r"^\s*(?:stage\s+)?make ([a-z]+)\s*(?:#.*)?$", text, flags=re.MULTILINE)


def _shell_blocks(markdown: str) -> str:
    return "\n".join(re.findall(r"^```(?:bash|sh)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL))


def test_pytest_and_ruff_leave_no_file_out(repository_root: Path, pytestconfig: pytest.Config) -> None:
    """Both skip folders of certain names by default, `dist` among them, and say nothing."""
    files = {
        path.relative_to(repository_root) for path in _tracked_files(repository_root) if path.suffix == ".py"
    }
    tests = {path for path in files if path.parts[0] == "tests" and path.name.startswith("test_")}
    skipped = pytestconfig.getini("norecursedirs")
    assert len(tests) > 100
    assert [
        path for path in tests for part in path.parent.parts for name in skipped if fnmatch(part, name)
    ] == []
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    linted = subprocess.run(
        command, cwd=repository_root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert files - {Path(name).relative_to(repository_root) for name in linted} == set()


def test_ci_runs_the_commands_of_the_readme(repository_root: Path) -> None:
    documented = _make_targets(_shell_blocks((repository_root / "README.md").read_text()))
    run_by_ci = _make_targets((repository_root / ".ci" / "run").read_text())
    assert {"quickstart", "test"} <= set(documented)
    assert set(documented) <= set(run_by_ci)


def test_make_knows_every_target_that_ci_and_the_readme_name(repository_root: Path) -> None:
    makefile = (repository_root / "Makefile").read_text()
    known = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = _make_targets((repository_root / ".ci" / "run").read_text())
    named += _make_targets(_shell_blocks((repository_root / "README.md").read_text()))
    assert set(named) <= known


def test_readme_names_only_files_that_exist(repository_root: Path) -> None:
    readme = (repository_root / "README.md").read_text()
    named = set(
        re.findall(
            r"(?:^|[\s`(])((?:configs|ds_configs|docs|launch|samples|tools|benchmarks)/[\w./-]*\w)", readme
        )
    )
    assert named
    assert {name for name in named if not (repository_root / name).exists()} == set()


def test_no_file_names_a_machine_or_a_registry(repository_root: Path) -> None:
    found = []
    for path in _tracked_files(repository_root):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # media and pictures
            continue
        found += [
            f"{path.relative_to(repository_root)}:{number}: {what}"
            for number, line in enumerate(lines, start=1)
            for what, pattern in _FORBIDDEN.items()
            if pattern.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("cd /" + "work/main", "a path of one machine"),
        ("https://" + "pypi" + ".org/simple", "a package registry"),
        ("pip install --" + "index-url X", "an index option"),
    ],
)
def test_forbidden_patterns_find_what_they_are_for(line: str, what: str) -> None:
    assert [name for name, pattern in _FORBIDDEN.items() if pattern.search(line)] == [what]


def test_nothing_large_or_generated_is_in_the_repository(repository_root: Path) -> None:
    files = [path.relative_to(repository_root) for path in _tracked_files(repository_root)]
    generated = {name.parts[0] for name in files} & {".venv", "runs", "build", "dist", "wandb"}
    assert generated == set()
    assert [
        name
        for name in files
        if (repository_root / name).stat().st_size > _MAX_FILE_BYTES and name.parts[0] != "samples"
    ] == []


def test_constraints_are_exact_pins(repository_root: Path) -> None:
    lines = (repository_root / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    exact = re.compile(r'^[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version >= "3\.\d+")?$')
    assert [pin for pin in pins if not exact.match(pin)] == []
    assert len(pins) == len({pin.partition("==")[0] for pin in pins})


def test_samples_are_small_and_attributed(repository_root: Path) -> None:
    files = [path for path in (repository_root / "samples").rglob("*") if path.is_file()]
    assert any(path.suffix == ".mp4" for path in files)
    assert sum(path.stat().st_size for path in files) < _MAX_SAMPLES_BYTES
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"]
    assert any("Blender Foundation" in text and "CC BY 3.0" in text for text in texts)
