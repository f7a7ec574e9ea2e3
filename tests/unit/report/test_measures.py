"""Which way of a measure is good, and the sentence that headlines say of a run."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from aiprod_ds.report.console import print_summary
from aiprod_ds.report.measures import Outcome, changes_of, is_better, measure_rows, pairs_of, verdict_of
from aiprod_ds.report.report_view import render_report
from aiprod_ds.report.summary import RunSummary
from tests.unit.report.test_run_report import example_summary

NAN = math.nan


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("psnr_db", 11.0, 23.0, True),
        ("psnr_db", 23.0, 11.0, False),
        ("psnr_db", 11.001, 11.002, None),  # printed the same
        ("lpips_vgg", 0.5, 0.4, True),
        ("video_loss_at_0.5", 0.5, 0.6, False),
        ("flicker_ratio", 19.0, 1.2, True),
        ("flicker_ratio", 1.1, 0.8, False),
        ("of_my_own", 1.0, 2.0, None),
        ("my_distance", 1.0, 2.0, False),
        ("ssim", 0.5, NAN, False),
        ("ssim", NAN, 0.5, True),
        ("ssim", NAN, NAN, None),
        ("loss", 1.0, math.inf, False),
    ],
)
def test_each_measure_knows_its_good_way(
    name: str, before: float, after: float, expected: bool | None
) -> None:
    assert is_better(name, before, after) is expected


@pytest.mark.parametrize(
    ("before", "after", "outcome", "sentence"),
    [
        (
            {"psnr_db": 23.71, "ssim": 0.7},
            {"psnr_db": 11.31, "ssim": 0.8},
            Outcome.WORSE,
            "Worse than before training: PSNR 23.71 → 11.31 dB (-12.40 dB). Better in SSIM.",
        ),
        (
            {"psnr_db": 11.0, "ssim": 0.7},
            {"psnr_db": 23.0, "ssim": 0.6},
            Outcome.MIXED,
            "Better in PSNR; worse in SSIM.",
        ),
        ({"psnr_db": 11.0}, {"psnr_db": 23.0}, Outcome.BETTER, "Better than before training."),
        ({"psnr_db": 11.0}, {"psnr_db": 11.0}, Outcome.SAME, "No better and no worse than before training."),
        (
            {"psnr_db": 11.0},
            {"psnr_db": NAN},
            Outcome.WORSE,
            "Worse than before training: PSNR is no longer a number.",
        ),
        (
            {"psnr_db": 11.0, "flicker_error": 1.0, "lpips_vgg": 1.0, "ssim": 1.0, "my_loss": 1.0},
            {"psnr_db": 10.0, "flicker_error": 2.0, "lpips_vgg": 2.0, "ssim": 0.5, "my_loss": 2.0},
            Outcome.WORSE,
            (
                "Worse than before training: PSNR 11.00 → 10.00 dB (-1.00 dB); worse too: SSIM, LPIPS, "
                "flicker error and 1 more."
            ),
        ),
    ],
)
def test_the_first_measure_decides(
    before: dict[str, float], after: dict[str, float], outcome: Outcome, sentence: str
) -> None:
    verdict = verdict_of(pairs_of(before, after))
    assert verdict is not None
    assert (verdict.outcome, verdict.sentence) == (outcome, sentence)


def test_a_run_below_its_best_says_so() -> None:
    history = [("after phase low", {"psnr_db": 25.0}), ("after phase high", {"psnr_db": 23.0})]
    verdict = verdict_of(pairs_of({"psnr_db": 11.0}, {"psnr_db": 23.0}), history)
    assert verdict is not None
    assert verdict.outcome is Outcome.MIXED
    assert (
        verdict.sentence == "Better than before training. Below its best: PSNR was 25.00 dB after phase low."
    )
    assert verdict_of({}) is None


def test_only_what_was_measured_twice_is_compared() -> None:
    metrics = {"psnr_db_before": 1.0, "ssim_after": 0.5, "loss_before": 2.0, "loss_after": 1.0}
    assert [change.name for change in changes_of(metrics)] == ["loss"]
    assert measure_rows(metrics) == [("loss", "2.0000", "1.0000", "-1.0000")]


def test_page_and_console_say_that_a_run_got_worse() -> None:
    summary = example_summary(metrics={"psnr_db_before": 23.71, "psnr_db_after": 11.31})
    sentence = "Worse than before training: PSNR 23.71 → 11.31 dB (-12.40 dB)."
    page = render_report(summary)
    assert f"**{sentence}**" in page
    assert page.index(sentence) < page.index("## Phases")
    assert sentence in _printed(summary)
    assert "than before training" not in render_report(example_summary())
    assert "than before training" not in _printed(example_summary())


def _printed(summary: RunSummary) -> str:
    text = io.StringIO()
    print_summary(Console(file=text, width=200), summary, report=Path("runs/tiny/report.md"))
    return text.getvalue()
