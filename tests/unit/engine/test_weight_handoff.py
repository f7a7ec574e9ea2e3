"""Values on their way between engines, on one process; tests/distributed/test_engine_rebuild.py has two."""

from __future__ import annotations

import pytest
import torch

from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import EngineError


def test_one_rank_carries_everything_in_fp32_and_in_order() -> None:
    carried = WeightHandoff()
    given = {
        "second": torch.arange(6.0).reshape(3, 2),
        "first": torch.tensor(0.1, dtype=torch.bfloat16),
        "none": torch.ones(0, 4),
    }
    for name, value in given.items():
        carried.add(name, value)
    assert len(carried) == 3
    for _ in range(2):  # they can be asked for again
        returned = dict(carried.whole())
        assert list(returned) == list(given)
        assert all(value.dtype == torch.float32 for value in returned.values())
        assert all(torch.equal(value, given[name].float()) for name, value in returned.items())


def test_what_is_carried_is_a_copy() -> None:
    value = torch.ones(3, requires_grad=True)
    carried = WeightHandoff()
    carried.add("value", value)
    with torch.no_grad():
        value.zero_()
    ((_, returned),) = carried.whole()
    assert torch.equal(returned, torch.ones(3))
    assert not returned.requires_grad
    returned.zero_()
    ((_, again),) = carried.whole()
    assert torch.equal(again, torch.ones(3))


def test_a_name_is_carried_once() -> None:
    carried = WeightHandoff()
    carried.add("value", torch.ones(3))
    with pytest.raises(EngineError, match="value: must be carried once"):
        carried.add("value", torch.ones(3))
