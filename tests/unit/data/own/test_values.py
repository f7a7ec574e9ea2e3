"""Ranges of values: exact conversion, and what is found on the first items."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from aiprod_ds.data.dataset import ClipRequest, TensorVideoDataset
from aiprod_ds.data.own.values import FIRST_ITEMS, ValueCheck, require_range, to_signed
from aiprod_ds.errors import ConfigError, DataError

NOISE = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_conversion_has_its_closed_form() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    expected = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert torch.equal(to_signed(every, None), expected)
    assert torch.equal(to_signed(every, (-1.0, 1.0)), expected), "a declared range is of floats"
    assert torch.equal(to_signed(every.float(), (0.0, 255.0)), expected)
    assert torch.equal(to_signed(torch.tensor([0.0, 0.25, 1.0]), (0.0, 1.0)), torch.tensor([-1.0, -0.5, 1.0]))
    assert torch.equal(
        to_signed(torch.tensor([-32768, 16384], dtype=torch.int16), None), torch.tensor([-1, 0.5])
    )
    assert to_signed(expected, None) is expected


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (16, 12)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 3, 0)])
def test_bytes_are_fitted_as_their_floats_are(size: tuple[int, int], order: tuple[int, ...]) -> None:
    pixels = (NOISE * 255).to(torch.uint8)
    height, width = size
    request = ClipRequest(sample_index=0, epoch=2, frames=3, height=height, width=width, flip=True)
    of_bytes = TensorVideoDataset([pixels.permute(order)], seed=3)[request]["video"]
    of_floats = TensorVideoDataset([pixels.float() / 127.5 - 1], seed=3)[request]["video"]
    assert torch.equal(of_bytes, of_floats)


@pytest.mark.parametrize("declared", [None, (-1, 1), (0, 1), [0, 255.0]])
def test_known_ranges_are_taken(declared: Any) -> None:
    assert require_range(declared) == (None if declared is None else tuple(map(float, declared)))


@pytest.mark.parametrize("declared", [(0, 2), 255, (0,), ("a", "b"), (1, -1)])
def test_other_ranges_are_refused(declared: Any) -> None:
    with pytest.raises(ConfigError, match=r"value_range: must be \(-1, 1\) or \(0, 1\) or \(0, 255\), got"):
        require_range(declared)


def _check(what: str, declared: Any, *items: torch.Tensor, is_held_out: bool = False) -> tuple[str, ...]:
    check = ValueCheck(what, require_range(declared), is_held_out=is_held_out)
    for number, item in enumerate(items):
        check.see(item, f"dataset[{number}]")
    return check.judge()


@pytest.mark.parametrize(
    ("what", "declared", "item"),
    [
        ("video", None, NOISE * 2 - 1),
        ("video", (0, 1), NOISE),
        ("video", (0, 255), NOISE * 255),
        ("video", None, (NOISE * 255).to(torch.uint8)),
        ("audio", None, NOISE - 0.5),
        ("audio", None, ((NOISE - 0.5) * 65535).to(torch.int16)),
        ("latents", None, NOISE * 9),
        ("video", None, torch.empty(3, 4, 8, 8, device="meta")),
    ],
)
def test_values_that_are_right_say_nothing(what: str, declared: Any, item: torch.Tensor) -> None:
    assert _check(what, declared, item, item) == ()


@pytest.mark.parametrize(
    ("what", "declared", "item", "message"),
    [
        (
            "video",
            None,
            NOISE,
            "nothing below 0 .* probably in (0, 1). Pass value_range=(0, 1), or value_range",
        ),
        (
            "video",
            None,
            NOISE * 255,
            "taken where nothing is declared, .* .* pass value_range=(0, 255)",
        ),
        ("video", (-1, 1), NOISE * 255, "(-1, 1), which is declared, .* They look like (0, 255)"),
        (
            "video",
            (0, 1),
            NOISE * 2 - 1,
            "in (0, 1), which is declared, .* pass value_range=(-1, 1)",
        ),
        ("video", (0, 255), NOISE, "must be in (0, 255), .* pass value_range=(0, 1)."),
        ("video", None, NOISE * 9 - 4, "Convert them, or name their range with value_range."),
        (
            "video",
            None,
            (NOISE > 0.5).to(torch.uint8),
            "uint8 must be in 0..255, got nothing above 1 .* black.",
        ),
        (
            "audio",
            None,
            (NOISE - 0.5) * 60_000,
            "Divide integer samples by their full scale (16 bits: 32768)",
        ),
        ("video", None, torch.full((3, 4, 8, 8), float("nan")), "dataset[0]: video must be finite, got NaN"),
        ("latents", None, NOISE / 0, "dataset[0]: latents must be finite"),
        ("video", None, -torch.ones(3, 4, 8, 8), "got black alone in all of the first 2 items"),
        ("video", (0, 1), torch.zeros(3, 4, 8, 8), "got black alone in all"),
        ("video", None, torch.zeros(3, 4, 8, 8, dtype=torch.uint8), "got black alone in all"),
        ("video", None, torch.full((3, 4, 8, 8), -0.5), "got one constant value in all"),
        ("audio", None, torch.zeros(1, 100), "got silence or one constant value in all"),
        ("latents", None, torch.ones(3, 4, 8, 8), "got one constant value in all"),
    ],
)
def test_values_that_cannot_be_right_end_before_training(
    what: str, declared: Any, item: torch.Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message).replace(r"\.\*", ".*")):
        _check(what, declared, item, item)


def test_doubtful_values_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        black = torch.full((3, 4, 8, 8), -1.0)
        notes = _check("video", None, (NOISE * 2 - 1) * 1.2, black)
        bright = _check("video", (-1, 1), NOISE)
    assert notes[0].startswith("video: some values of the first 2 items are beyond (-1, 1)")
    assert notes[1:] == ("video: 1 of the first 2 items hold black alone: dataset[1]",)
    assert bright[0].endswith("so they are probably in (0, 1); value_range=(-1, 1) was declared")
    assert [record.message for record in caplog.records] == [f"values {note}" for note in (*notes, *bright)]


def test_what_is_only_measured_may_be_silent() -> None:
    (note,) = _check("audio", None, torch.zeros(1, 100), is_held_out=True)
    assert note == "audio: 1 of the first 1 items hold silence or one constant value: dataset[0]"


def test_only_the_first_items_are_looked_at_and_every_clip_must_be_finite() -> None:
    late = (NOISE * 2 - 1).clone()
    late[0, 2, 0, 0] = float("nan")
    dataset = TensorVideoDataset([NOISE * 2 - 1] * FIRST_ITEMS + [late], seed=0)
    assert len(dataset.lengths()) == FIRST_ITEMS + 1
    request = ClipRequest(sample_index=FIRST_ITEMS, epoch=0, frames=4, height=8, width=8)
    with pytest.raises(DataError, match=rf"dataset\[{FIRST_ITEMS}\]: pixels must be finite"):
        dataset[request]
