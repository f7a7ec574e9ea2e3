"""The image: what its file says is linted anywhere, and built where a builder of images answers."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

_FILE = Path("launch") / "Dockerfile"
_BUILDERS = {"docker": ["docker", "info"], "buildah": ["buildah", "info"]}


def _instructions(text: str) -> list[tuple[str, str]]:
    """Returns each instruction with its arguments, continued lines joined and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def _faults(text: str) -> list[str]:
    """Returns what is wrong with a Dockerfile, in words."""
    found = []
    for name, rest in _instructions(text):
        if name == "FROM" and not re.fullmatch(r"[\w./-]+:[\w.-]+( AS \w+)?", rest):
            found.append(f"FROM must name a tag: {rest}")
        if name == "ADD":
            found.append(f"COPY does it: ADD {rest}")
        if name == "RUN" and "apt-get install" in rest:
            for part in ("apt-get update", "--yes", "--no-install-recommends", "rm -rf /var/lib/apt/lists/*"):
                found += [] if part in rest else [f"apt-get install without {part}"]
        if name == "RUN" and "pip install" in rest and "--no-cache-dir" not in rest:
            found.append("pip install keeps its cache")
    if next(name for name, _ in _instructions(text)) != "FROM":
        found.append("FROM must come first")
    return found


def test_the_dockerfile_has_no_faults(repository_root: Path) -> None:
    assert _faults((repository_root / _FILE).read_text()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("FROM python", "FROM must name a tag: python"),
        ("FROM python:3.12\nADD . .", "COPY does it: ADD . ."),
        ("FROM python:3.12\nRUN apt-get update \\\n    && apt-get install --yes --no-install-recommends g++",
         "apt-get install without rm -rf /var/lib/apt/lists/*"),
        ("FROM python:3.12\nRUN pip install .", "pip install keeps its cache"),
        ("RUN true\nFROM python:3.12", "FROM must come first"),
    ],
)  # fmt: skip
def test_faults_are_found(text: str, fault: str) -> None:
    assert _faults(text) == [fault]


def test_the_image_gets_what_the_build_needs_and_nothing_more(repository_root: Path) -> None:
    lines = (repository_root / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert [name for name in kept if not list(repository_root.glob(name))] == []
    project = (repository_root / "pyproject.toml").read_text()
    (packed,) = re.findall(r"^only-include = \[(.*)\]$", project, flags=re.MULTILINE)
    needed = {*re.findall(r'"(\w+)"', packed), "README.md", "LICENSE", "pyproject.toml", "constraints.txt"}
    assert {name for name in needed if not any(fnmatch(name, pattern) for pattern in kept)} == set()
    assert {".venv", "runs", "tests", ".git"} & set(kept) == set()


def _builder() -> str | None:
    for name, probe in _BUILDERS.items():
        if shutil.which(name) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return name
    return None


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(3600)  # PyTorch with CUDA is downloaded
def test_the_image_is_built_and_runs(repository_root: Path) -> None:
    builder = _builder()
    if builder is None:
        pytest.skip("neither docker nor buildah answers here")
    build = ["build"] if builder == "docker" else ["bud"]
    command = [builder, *build, "--file", str(_FILE), "--tag", "aiprod_ds:test", "."]
    built = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    if builder == "docker":
        run = ["docker", "run", "--rm", "aiprod_ds:test", "aiprod-ds", "check", "video_vae/tiny"]
        checked = subprocess.run(run, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
