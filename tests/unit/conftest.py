"""What tests of one process share that train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_FOLDERS_THAT_TRAIN = ("checkpoint", "convert", "train", "trainers")


@pytest.fixture(scope="module", autouse=True)
def _without_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves the plots out of reports: to draw them takes longer than a small training. tests/unit/report
    draws them, and a run in tests/unit/train/test_run.py does."""
    if request.path.parent.name not in _FOLDERS_THAT_TRAIN:
        yield
        return
    from aiprod_ds.testing.runs import without_plots  # loads torch, which other folders need not

    with without_plots():
        yield
