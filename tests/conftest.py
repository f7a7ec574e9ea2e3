"""Fixtures that every folder of tests shares, and the rule for `gpu` tests. Imports nothing heavy: collection
stays quick."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout that these tests belong to."""
    return _ROOT


@pytest.fixture
def in_repository_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout as working folder, as the README's commands have it."""
    monkeypatch.chdir(_ROOT)
    return _ROOT


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _own_probe_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the probes of tests out of the user's cache folder."""
    monkeypatch.setenv("AIPROD_DS_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "probes"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where no CUDA device may be used."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_items else None
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "DS_ACCELERATOR=cpu"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"
