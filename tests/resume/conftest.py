"""Where runs of a sweep are to be resumed: at what the tests of this session read, no more. And the runs of
files that only differ in what a case is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aiprod_ds.testing.runs import alike_on_ranks


@pytest.fixture(scope="module")
def points_to_resume(request: pytest.FixtureRequest) -> Callable[..., dict[str, list[Any]]]:
    """Returns by case the points that the tests of this file read.

    A case is the values of `names` among a test's parameters, a point that of `point`; tests with other
    values than `only` has do not count.
    """
    tests = [item for item in request.session.items if item.path == request.path]
    parameters: list[dict[str, Any]] = [test.callspec.params for test in tests if hasattr(test, "callspec")]

    def points(*names: str, point: str = "resumed", **only: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for values in parameters:
            if point in values and only.items() <= values.items():
                of_case = found.setdefault("_".join(str(values[name]) for name in names), [])
                of_case += [values[point]] if values[point] not in of_case else []
        return found

    return points


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    points_to_resume: Callable[..., dict[str, list[str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Returns what `run_every_case` of the test's file returns on two ranks, for the points that are read."""
    folder, points = tmp_path_factory.mktemp("ranks"), points_to_resume("case")
    return alike_on_ranks(request.module.run_every_case, ranks=2, folder=folder, points=points)


@pytest.fixture(scope="module")
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns what `run_locally` of the test's file returns."""
    return alike_on_ranks(request.module.run_locally, ranks=1, folder=tmp_path_factory.mktemp("local"))
