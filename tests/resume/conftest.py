"""Where runs of a sweep are to be resumed: at what the tests of this session read, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


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
