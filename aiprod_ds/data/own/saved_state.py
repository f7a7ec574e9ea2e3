"""The state of a user's loader as JSON, for checkpoints, without running code when it is read.

Owns which values such a state may hold. What they mean is the loader's own.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aiprod_ds.errors import CheckpointError, DataError

_PLAIN = (bool, int, float, str, type(None))


def encode_state(value: Any) -> Any:  # noqa: PLR0911  one return a kind of value
    """Returns a value of `state_dict()` JSON-ready; `decode_state` gives back an equal one.

    Args:
        value: Numbers, texts, None, bytes, tensors, arrays, and lists, tuples, sets and mappings of them.

    Raises:
        DataError: If it holds something else.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [encode_state(part) for part in value]
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {"kind": kind, "parts": [encode_state(part) for part in value]}
    if isinstance(value, Mapping):
        return {
            "kind": "mapping",
            "parts": [[encode_state(key), encode_state(part)] for key, part in value.items()],
        }
    if isinstance(value, bytes | bytearray):
        return {"kind": "bytes", "data": _text(bytes(value))}
    if isinstance(value, Tensor) and value.dtype != torch.bfloat16:  # which numpy does not have
        return {"kind": "tensor", "array": _array(value.detach().cpu().numpy())}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"kind": "array", "array": _array(value)}
    raise DataError(
        "dataset: state_dict() must hold numbers, texts, bytes, tensors and arrays, in lists, tuples and "
        f"mappings, got {type(value).__name__}. Leave it out or convert it."
    )


def decode_state(value: Any) -> Any:
    """Returns what `encode_state` was given.

    Raises:
        CheckpointError: If it is of no kind that `encode_state` makes.
    """
    if isinstance(value, list):
        return [decode_state(part) for part in value]
    if not isinstance(value, dict):
        return value
    try:
        return _decoded(value)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"state.json: streams: must hold a loader's state, got {error!r}. It is damaged."
        ) from error


def _decoded(value: dict[str, Any]) -> Any:
    kind = value["kind"]
    if kind == "mapping":
        return {decode_state(key): decode_state(part) for key, part in value["parts"]}
    if kind in {"tuple", "set"}:
        return {"tuple": tuple, "set": set}[kind](map(decode_state, value["parts"]))
    if kind == "bytes":
        return base64.b64decode(value["data"])
    array = _read_array(value["array"])
    return torch.from_numpy(array) if kind == "tensor" else array


def _array(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"dtype": values.dtype.str, "shape": list(values.shape), "data": _text(values.tobytes())}


def _read_array(found: dict[str, Any]) -> np.ndarray[Any, Any]:
    values = np.frombuffer(base64.b64decode(found["data"]), dtype=np.dtype(found["dtype"]))
    shaped: np.ndarray[Any, Any] = values.reshape(found["shape"]).copy()
    return shaped


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
