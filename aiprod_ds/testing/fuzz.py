"""Inputs that nobody expects: odd values, and bytes of files with a known document changed here and there.

Owns what is drawn, by Hypothesis; what must hold of it is the tests' own. Called by tests/unit/test_fuzz.py.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 1000, 65_537, 2**31, 2**63 - 1, 2**63, 10**12, 10**20, 10**400, 16**20_000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 5e-324, 1e12, 1e20, 1e300, -1e300),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "0",
        "1e5",
        "null",
        "true",
        "nan",
        "256x256",
        "0x0",
        "9999999999999999999x1",
        "1" * 20_000,
    ),
    *("a\0b", "\ud800", "\u202e\0", "é" * 300, "n" * 300, "a/" * 3000, "{", "[", "%s %d {x}", "[red]x[/red]"),
    *("../../x", ".", "/dev/null", "/dev/zero", "/proc/self/mem", "/nowhere/at/all", "~/x", "file.yaml"),
    *("subprocess:getoutput", "os:abort", "sys:exit", "aiprod_ds.cli:main", "torch.nn:Linear", "a:b:c", ":"),
    *("aiprod_ds.testing.tiny:TinyVideoVAE", "aiprod_ds.models.registry:build_model", "diffusers:ModelMixin"),
    *("AutoencoderKLWan", "AutoencoderKL", "AutoencoderOobleck", "UNet2DModel", "DDPMScheduler", "AutoModel"),
    *(
        "Transformer2DModel",
        "VQModel",
        "T5EncoderModel",
        "video_vae",
        "audio_vae",
        "diffusion",
        "auto",
    ),
)
SHAPES: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [{}],
    [None],
    {"a": 1},
    {"": ""},
    {"a": {"b": [1]}},
)


class Deep(str):
    """Stands for a list in a list in a list, so deep that no writer writes it."""

    __slots__ = ()

    def __new__(cls, depth: int) -> Deep:
        """Returns the text of `depth` pairs of brackets."""
        return super().__new__(cls, "[" * depth + "]" * depth)

    def __deepcopy__(self, memo: dict[int, Any]) -> Deep:
        """Returns itself: a text does not change."""
        return self


ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(SHAPES),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=6).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.lists(st.sampled_from((*NUMBERS, *TEXTS)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.sampled_from((*NUMBERS, *TEXTS)), max_size=2),
    st.integers(50, 2000).map(Deep),
)
"""A number, a text or a shape that a key does not expect."""


def paths_of(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the path of every value in a document of mappings and lists."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from paths_of(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """Draws one of the documents with up to three changes: other values, losses, copies and new keys."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(paths_of(document))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        holder, last = _holder(document, path), path[-1]
        what = draw(st.sampled_from(("replace", "replace", "replace", "delete", "copy", "add")))
        if what == "delete":
            del holder[last]
        elif what == "copy":
            other = draw(st.sampled_from(paths))
            holder[last] = copy.deepcopy(_holder(document, other)[other[-1]])
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = copy.deepcopy(
                draw(ODD)
            )  # what is drawn is shared, and may be changed next
        elif what == "add":
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(draw(ODD))
    return document


@st.composite
def written(draw: st.DrawFn, documents: Sequence[Any]) -> bytes:
    """Draws the bytes of a file with a mutated document; of a part of them bytes are damaged, too."""
    data = text_of(draw(mutated(documents))).encode()
    return draw(damaged(data))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Draws `data`, mostly as it is, or cut, doubled, or with other bytes in it."""
    damage = draw(st.sampled_from(("none",) * 12 + ("cut", "insert", "twice", "tab")))
    at = draw(st.integers(0, len(data)))
    if damage == "cut":
        return data[:at]
    if damage == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    if damage == "twice":
        return data + data
    return data.replace(b"\n ", b"\n\t", 1) if damage == "tab" else data


def text_of(value: Any) -> str:
    """Returns `value` as YAML that is JSON, too, but for numbers that JSON lacks."""
    if isinstance(value, Deep):
        return str(value)
    if isinstance(value, dict):
        items = (f"{json.dumps(key)}: {text_of(each)}" for key, each in value.items())
        return "{" + ",\n ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", ".nan").replace("inf", ".inf")
    if isinstance(value, int) and abs(value) > 10**30:
        return hex(value)
    return json.dumps(value)


def cases(count: int) -> settings:
    """Returns the settings of a test of `count` cases, which are the same each time."""
    return settings(
        max_examples=count,
        deadline=None,  # the tests have a limit that also ends what hangs
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def _holder(document: Any, path: Sequence[str | int]) -> Any:
    for step in path[:-1]:
        document = document[step]
    return document
