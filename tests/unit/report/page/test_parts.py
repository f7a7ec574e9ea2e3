"""What the page is made of: points, scales, spectrograms, and the sink that keeps it up to date."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aiprod_ds.metrics.evaluations import read_evaluations
from aiprod_ds.metrics.sinks import MirrorSink
from aiprod_ds.report.curves import Curve, Span, curves_of, seconds_by_update, spans_of, thin
from aiprod_ds.report.page import sink as page_sink
from aiprod_ds.report.page.charts import HEIGHT, curve_chart, lane
from aiprod_ds.report.page.scales import Axis, time_ticks, x_axis, x_ticks, y_axis, y_ticks
from aiprod_ds.report.page.sink import PageSink
from aiprod_ds.report.page.spectrogram import levels_of


def test_fewer_points_keep_every_peak() -> None:
    xs = np.arange(10_000.0)
    ys = np.sin(xs / 1000)
    ys[1234], ys[8765] = 9.0, -9.0
    few_xs, few_ys = thin(xs, ys, 100)
    assert len(few_xs) <= 100
    assert (few_ys.max(), few_ys.min()) == (9.0, -9.0)
    assert (np.diff(few_xs) > 0).all()


def test_a_stretch_without_a_number_parts_the_line() -> None:
    ys = np.array([1.0] * 50 + [math.nan] * 50 + [2.0] * 50)
    xs, few = thin(np.arange(150.0), ys, 12)
    assert (few[0], few[-1]) == (1.0, 2.0)
    assert set(xs[np.isnan(few)]) == {50.0, 75.0}


def test_time_goes_on_between_rows_that_were_left_out() -> None:
    """Closed form: updates 1, 2 and 10 of 2, 2 and 3 s are 2, 4 and 4 + 8 * 3 s."""
    rows = [(update, {"time/update_seconds": seconds}) for update, seconds in ((1, 2.0), (2, 2.0), (10, 3.0))]
    updates, seconds = seconds_by_update(curves_of(rows))
    assert updates.tolist() == [0.0, 1.0, 2.0, 10.0]
    assert seconds.tolist() == [0.0, 2.0, 4.0, 28.0]
    assert [array.tolist() for array in seconds_by_update({})] == [[0.0], [0.0]]


def test_phases_lie_where_their_rows_say() -> None:
    rows = [(1, {"clock/phase": 0.0}), (2, {"clock/phase": 2.0}), (3, {"clock/phase": math.nan}), (4, {})]
    assert spans_of(rows) == [Span(index=0, first=1, last=1), Span(index=2, first=2, last=2)]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(low=0, high=100), ["0", "25", "50", "75", "100"]),
        (Axis(low=0.001, high=10, is_log=True), ["0.001", "0.01", "0.1", "1", "10"]),
        (Axis(low=-1.2, high=1.3), ["-1", "0", "1"]),
    ],
)
def test_ticks_are_round(axis: Axis, expected: list[str]) -> None:
    assert [tick.text for tick in y_ticks(axis)] == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [(3, ["0", "1", "2", "3"]), (11, ["0", "5", "10"]), (40, ["0", "10", "20", "30", "40"])],
)
def test_ticks_of_updates_are_whole(last: int, expected: list[str]) -> None:
    assert [tick.text for tick in x_ticks(Axis(low=0, high=last))] == expected


def test_ticks_of_time_are_in_units_that_people_use() -> None:
    assert [tick.text for tick in time_ticks(Axis(low=0, high=7200))] == [
        "0 s",
        "30 min",
        "1 h",
        "1.5 h",
        "2 h",
    ]


def test_few_wild_values_do_not_flatten_the_rest() -> None:
    values = np.concatenate([np.linspace(1, 2, 1000), [1e6]])
    assert y_axis([values], from_zero=False, may_be_log=False).high < 3
    assert x_axis([np.array([])]).high == 1.0


def test_a_chart_of_nothing_is_none_and_of_one_value_is_seen() -> None:
    nothing = Curve(name="a", updates=np.array([1.0]), values=np.array([math.nan]))
    assert curve_chart(nothing, title="a", unit="") is None
    one = curve_chart(Curve(name="a", updates=np.array([1.0]), values=np.array([2.0])), title="a", unit="s")
    assert one is not None
    assert one.lines[-1].path.endswith("h0.1")


def test_steps_of_the_curriculum_are_as_high_as_their_values() -> None:
    """The largest value fills the lane; half of it is drawn 15 % and half of the rest high."""
    spans = [Span(index=0, first=1, last=50), Span(index=1, first=51, last=100)]
    drawn = lane("frames", spans, [8, 16], ["8", "16"], Axis(low=0, high=100))
    assert drawn is not None
    half = HEIGHT - round(HEIGHT * (0.15 + 0.85 * 0.5))
    assert drawn.path == f"M0.0,300V{half}H500.0V300ZM500.0,300V0H1000.0V300Z"
    assert [band.name for band in drawn.bands] == ["8", "16"]


def test_a_tone_is_brightest_at_its_pitch(tmp_path: Path, tone: Callable[..., None]) -> None:
    """Rows rise in octaves from 50 Hz to half the rate, 4 kHz; half of full scale is -6 dB."""
    tone(tmp_path / "a.wav", pitch_hz=1000.0)
    levels = levels_of(tmp_path / "a.wav")
    assert levels is not None
    row = int(levels.decibels.mean(axis=1).argmax())
    pitch_hz = 50 * (4000 / 50) ** (row / (len(levels.decibels) - 1))
    assert abs(pitch_hz - 1000) < 50
    assert abs(levels.decibels.max() + 6.02) < 3.0, "a row lies between two lines of the spectrum"
    scale = levels.scale()
    assert 30 <= scale.high - scale.low <= 70
    assert levels.png(scale).startswith(b"\x89PNG")


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_what_is_no_sound_has_no_spectrogram(tmp_path: Path, tone: Callable[..., None], data: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    assert levels_of(path) is None
    assert levels_of(tmp_path / "none.wav") is None
    tone(path, seconds=0.001)
    assert levels_of(path) is None


def test_the_page_of_a_run_that_goes_on_is_kept_up_to_date(make_run: Callable[..., Path]) -> None:
    folder = make_run(updates=50, status=None)
    sink, page = PageSink(folder), folder / "report.html"
    assert not page.exists()
    sink.log(50, {})
    assert "Running" in page.read_text(encoding="utf-8")
    page.unlink()
    sink.log(51, {})
    assert not page.exists(), "rows alone do not write it again"
    sink.log_evaluation(read_evaluations(folder)[0], folder)
    assert page.exists()


def test_a_page_that_cannot_be_written_ends_nothing(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_sink, "write_page", refuse)
    folder = make_run()
    mirror = MirrorSink(PageSink(folder), name="report.html")
    for update in (1, 2):
        mirror.log(update, {})
        mirror.log_evaluation(read_evaluations(folder)[0], folder)
    mirror.close()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
