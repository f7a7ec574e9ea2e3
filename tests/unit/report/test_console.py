"""The progress display: what it says, that it fits 80 columns, and how the time left is estimated."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from aiprod_ds import progress
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.report.console import ConsoleSink, PhaseSpan

PHASES = (
    PhaseSpan(name="low", updates=100, description="9 frames 64x64, batch 8"),
    PhaseSpan(name="high", updates=50, description="17 frames 128x128, batch 2", relative_cost=4.0),
)


@pytest.fixture(autouse=True)
def _no_other_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_displays", [])


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def metrics(phase: int, **more: float) -> dict[str, float]:
    return {
        "loss/total": 0.123456,
        "loss/reconstruction_l1": 0.1,
        "loss/kl": 31234.5,
        "loss/perceptual": 0.0000321,
        "learning_rate": 1e-4,
        "throughput/clips_per_second": 12.34,
        "clock/phase": float(phase),
        "time/update_seconds": 2.0,
        "clock/skipped_updates": 0.0,
        **more,
    }


def record(seconds: float) -> EvaluationRecord:
    return EvaluationRecord(
        update=60,
        samples=480,
        phase="low",
        phase_index=0,
        reason="interval",
        seconds=seconds,
        metrics={"psnr_db": 20.0},
    )


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=80, force_terminal=False), text


def test_a_plain_line_says_where_the_run_stands() -> None:
    """Time left: 99 more updates of 2 s, then 50 of 4 x 2 s = 598 s."""
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, now=Hands())
    sink.log(1, metrics(0))
    sink.close()
    assert text.getvalue().splitlines() == [
        "phase 1/2 low  100 updates, 9 frames 64x64, batch 8",
        (
            "low 1/2 update 1/150  loss 0.1235  L1 0.1000  KL 31234  perceptual 3.21e-05  lr 1.00e-04  "
            "clips/s "
            "12.3  0:09:58 left"
        ),
    ]


def test_plain_lines_keep_their_distance_but_the_last_update_is_always_shown() -> None:
    console, text = plain_console()
    hands = Hands()
    sink = ConsoleSink(console, phases=PHASES, first_update=140, interval_seconds=10, now=hands)
    for update in range(141, 151):
        sink.log(update, metrics(1))
        hands.time += 4.0
    sink.close()
    lines = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert lines == ["phase 2/2 high", *(f"high 2/2 update {update}/150" for update in (141, 144, 147, 150))]


def test_skips_and_evaluations_are_shown_and_an_evaluation_says_its_update() -> None:
    """What was measured before training is not repeated as if it were of now."""
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, interval_seconds=0, now=Hands())
    sink.log(0, {"evaluation/ssim": 0.5, "evaluation/psnr_db": 11.25})
    sink.log(99, metrics(0, **{"clock/skipped_updates": 3.0}))
    sink.log(100, {"evaluation/psnr_db": 21.5})
    sink.log(101, metrics(1))
    lines = [line for line in text.getvalue().splitlines() if " update " in line]
    assert ["PSNR 11.25 at 0" in line for line in lines] == [True, True, False, False]
    assert ["PSNR 21.50 at 100" in line for line in lines] == [False, False, True, True]
    assert "skipped 3" in lines[1]


def test_time_left_counts_the_evaluations_to_come() -> None:
    """After update 60 come 40 updates of 2 s, 50 of 8 s, and evaluations of 7 s at 90, 100, 120 and 150."""
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, interval_seconds=0, evaluation_updates=30, now=Hands())
    sink.log(60, metrics(0))
    sink.log_evaluation(record(seconds=7.0), Path("run"))
    sink.log(60, {"evaluation/psnr_db": 20.0})
    assert text.getvalue().splitlines()[-1].endswith(f"{progress.in_clock(40 * 2 + 50 * 8 + 4 * 7)} left")


def test_what_is_being_done_stands_under_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system=None)
    sink = ConsoleSink(console, phases=PHASES, now=Hands())
    with progress.counting("evaluating clip", total=16) as shown:
        shown.advance(3)
    assert "evaluating clip 3/16" in text.getvalue()  # before the first update
    sink.log(1, metrics(0))
    assert "evaluating" not in text.getvalue().rpartition("waiting for the first update")[2]
    with progress.counting("evaluating clip", total=16) as shown:
        shown.advance(5)
        assert "evaluating clip 5/16" in text.getvalue().rpartition("1/150")[2]
    sink.close()
    before = text.getvalue()
    with progress.counting("elsewhere") as shown:
        shown.advance()
    assert text.getvalue() == before


def test_the_speed_of_the_last_phase_is_not_used_for_the_next() -> None:
    """49 updates left at 8 s; a mix with the 2 s of phase 1 would say less."""
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, interval_seconds=0, now=Hands())
    sink.log(100, metrics(0))
    sink.log(101, metrics(1, **{"time/update_seconds": 8.0}))
    assert text.getvalue().splitlines()[-1].endswith("0:06:32 left")


@pytest.mark.parametrize(("first_update", "phase"), [(0, "1/2 low"), (100, "2/2 high"), (150, "2/2 high")])
def test_an_evaluation_before_the_first_update_is_shown_in_its_phase(first_update: int, phase: str) -> None:
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, first_update=first_update, now=Hands())
    sink.log(first_update, {"evaluation/psnr_db": 11.25})
    assert text.getvalue().startswith(f"phase {phase}")
    assert "PSNR 11.25" in text.getvalue()


def test_time_left_is_open_before_the_first_measurement() -> None:
    console, text = plain_console()
    sink = ConsoleSink(console, phases=PHASES, now=Hands())
    sink.log(1, {"loss/total": 1.0, "clock/phase": 0.0})
    assert text.getvalue().endswith("-:--:-- left\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_block_fits_the_terminal_and_is_removed(width: int) -> None:
    """Every line between control sequences is a line of the terminal; none may be longer than it is wide."""
    text = io.StringIO()
    sink = ConsoleSink(
        Console(file=text, width=width, force_terminal=True, color_system=None), phases=PHASES, now=Hands()
    )
    for update in (1, 2, 120):
        sink.log(update, metrics(int(update > 100)))
    sink.close()
    sink.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text.getvalue()).replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines) <= width
    assert any("waiting for the first update" in line for line in lines)
    assert "120/150" in "".join(lines[-6:])
