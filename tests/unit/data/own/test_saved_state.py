"""States of loaders as JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from aiprod_ds.data.own.saved_state import decode_state, encode_state
from aiprod_ds.errors import CheckpointError, DataError


def test_states_come_back_equal() -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "plain": [None, True, 3, 1 / 3, "text", 2**70],
        "nested": {"order": (2, (1, 0)), 7: {"a"}, ("b", 1): b"\x00\xff"},
        "generator": generator.get_state(),
        "half": torch.tensor([[1.5, -2.0]], dtype=torch.float16),
        "numpy": np.random.RandomState(1).get_state(),
        "scalar": np.int64(4),
        "empty": np.zeros((0, 3), np.float32),
    }
    found = decode_state(json.loads(json.dumps(encode_state(state))))
    assert torch.equal(found.pop("generator"), state.pop("generator"))  # type: ignore[call-overload]
    assert torch.equal(found["half"], state["half"])  # type: ignore[call-overload]
    assert found.pop("half").dtype == torch.float16
    assert found.pop("empty").shape == (0, 3)
    kind, keys, *rest = found.pop("numpy")
    assert (kind, rest) == ("MT19937", list(np.random.RandomState(1).get_state()[2:]))
    assert np.array_equal(keys, np.random.RandomState(1).get_state()[1])
    assert found == {name: state[name] for name in ("plain", "nested", "scalar")}


@pytest.mark.parametrize(
    "value", [object(), {"a": [lambda: 0]}, np.array(["a"]), 1j, torch.zeros(1).bfloat16()]
)
def test_what_json_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(DataError, match=r"state_dict\(\) must hold numbers, texts, bytes, tensors"):
        encode_state(value)


@pytest.mark.parametrize(
    "value", [{"a": 1}, {"kind": "mapping", "parts": [1]}, {"kind": "other"}, {"kind": "array", "array": {}}]
)
def test_damage_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state.json: streams: must hold a loader's state"):
        decode_state(value)
