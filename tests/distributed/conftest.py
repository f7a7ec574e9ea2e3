"""What of a sweep is to be measured: what the tests of this session read, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> Callable[[str], list[Any]]:
    """Returns the values that a parameter has in the tests of this file, each once and in their order."""
    tests = [item for item in request.session.items if item.path == request.path]
    parameters: list[dict[str, Any]] = [test.callspec.params for test in tests if hasattr(test, "callspec")]

    def values(name: str) -> list[Any]:
        return list(dict.fromkeys(each[name] for each in parameters if name in each))

    return values
