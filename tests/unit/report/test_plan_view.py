"""The page of `plan`: what it says, that it fits the terminal, and its plot in braille and in ASCII."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import ClipCounts, describe, learning_rate_curve, totals
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.report.curve_plot import CurvePlot, Piece
from aiprod_ds.report.plan_view import PlanView, in_units

PHASE = {"resolution": "64x64", "duration": {"frames": 8}, "global_batch_size": 8, "learning_rate": 1e-3}
COUNTED = {"name": "first", **PHASE, "updates": 10, "warmup_updates": 2}
FLAT = {
    "name": "flat",
    **PHASE,
    "plateau": {"patience_updates": 20, "threshold": 0.01, "smoothing": 0.5},
    "min_updates": 50,
    "max_updates": 2000,
    "schedule": "linear",
    "loss": {"perceptual_weight": 0.1},
    "augment": {"random_flip": False},
}
PASSES = {
    "name": "passes",
    **PHASE,
    "epochs": 3,
    "schedule": "constant",
    "moments": "decay",
    "moment_decay": 0.5,
}
BUCKETS = {
    **{key: value for key, value in COUNTED.items() if key not in ("resolution", "duration")},
    "buckets": [
        {"resolution": "64x96", "duration": {"frames": 9, "frame_rate_hz": 24.0}},
        {"resolution": "32x32", "duration": {"frames": 1}},
    ],
}
STRIDES = ModelStrides(spatial=32, temporal=8)


def page(
    *phases: dict[str, Any], clips: ClipCounts | None = None, data_problem: str | None = None
) -> PlanView:
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": "out",
            "model": {"source": "M"},
            "data": {"train": "s"},
            "curriculum": {"phases": list(phases)},
        }
    )
    plan = plan_run(config, world_size=2, strides=STRIDES)
    return PlanView(
        source="c.yaml",
        model="M",
        parameters=1_719_533,
        world_size=2,
        rows=describe(plan, config=config, strides=STRIDES, clips=clips),
        totals=totals(plan, clips=clips),
        curve=learning_rate_curve(plan, 200),
        data_problem=data_problem,
    )


def shown(made: Any, *, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, highlight=False).print(made)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def line(text: str, label: str) -> str:
    """The cells of the first line that begins with `label`, with single blanks."""
    found = next(row for row in text.splitlines() if row.startswith(f"{label} "))
    return " ".join(found.removeprefix(label).split())


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_counted_phase_is_told_in_full() -> None:
    text = shown(page(COUNTED, clips=[[32]]))
    assert {label: line(text, label) for label in (
        "ends", "first update", "last update", "updates", "size", "frames", "frame rate", "batch", "clips", "epochs",  # noqa: E501
        "pixels/update", "tokens/update", "peak rate", "schedule", "warm-up",
    )} == {
        "ends": "after 10 updates",
        "first update": "0",
        "last update": "9",
        "updates": "10",
        "size": "64x64",
        "frames": "8 -> 9",
        "frame rate": "as the clip's",
        "batch": "8 = 4 x 1 x 2",
        "clips": "80",
        "epochs": "2.5 of 32 clips",
        "pixels/update": "295 k",
        "tokens/update": "64",
        "peak rate": "0.001",
        "schedule": "cosine to 0.0001",
        "warm-up": "2 updates",
    }  # fmt: skip
    assert line(text, "in all") == "10 updates; 80 clips; 2.95 M pixels"
    assert text.startswith("c.yaml")
    assert "M, 1.72 M parameters, 2 ranks" in text
    assert not [label for label in ("share", "sets") if f"\n{label} " in text]  # nothing to say about them


def test_open_phases_are_told_by_their_bounds_and_rules() -> None:
    text = words(shown(page(COUNTED, FLAT, PASSES), width=160))
    for part in (
        "when the loss gains under 0.01 in 20",
        "not before 50, at most 2,000",
        "after 3 epochs",
        "between 59 and 2,009",
        "between 60 and 2,010",
        "60 or more",
        "perceptual weight 0.1",
        "random flip off",
        "moments decay",
        "moment decay 0.5",
        "linear to 0.0001",
        "open phases at their longest",
        "in all 61 or more updates; 488 or more clips; 18.0 M or more pixels",
    ):
        assert part in text


def test_buckets_stand_side_by_side_with_their_share() -> None:
    text = shown(page(BUCKETS, clips=[[24, 8]]))
    assert "0 first bucket 0 0 first bucket 1" in words(text)
    assert line(text, "share") == "75 % of updates 25 % of updates"
    assert line(text, "frame rate") == "24 Hz as the clip's"
    unknown = shown(page(BUCKETS, data_problem="c.yaml: data: nothing there."))
    assert line(unknown, "share") == "as clips fit as clips fit"
    assert line(unknown, "clips") == "as the data decides as the data decides"
    assert words(unknown).count("data not read, so no epochs: c.yaml: data: nothing there.") == 1
    assert "\nepochs" not in unknown


@pytest.mark.parametrize("width", [40, 80, 100, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_page_fits_the_terminal_and_its_encoding(width: int, encoding: str) -> None:
    phases = [
        {**phase, "name": f"{phase['name']}_{index}"}
        for index, phase in enumerate((COUNTED, FLAT, COUNTED, FLAT, PASSES))
    ]
    text = shown(page(*phases), width=width, encoding=encoding)
    assert max(len(row) for row in text.splitlines()) <= width
    assert all(phase["name"] in text for phase in phases)


def test_three_phases_stand_side_by_side_in_eighty_characters_and_four_do_not() -> None:
    phases = [{**COUNTED, "name": f"p{index}"} for index in range(4)]
    assert shown(page(*phases[:3])).count("\npeak rate") == 1
    assert shown(page(*phases)).count("\npeak rate") == 2
    assert shown(page(*phases), width=160).count("\npeak rate") == 1


def test_the_document_is_json_with_everything() -> None:
    made = page(COUNTED, PASSES, data_problem="none there")
    document = made.document()
    assert json.loads(json.dumps(document)) == document
    assert document["phases"] == made.rows
    assert document["totals"] == made.totals
    assert document["learning_rate_curve"][0] == {"update": 0, "phase": 0, "learning_rate": 5e-4}
    assert {key: document[key] for key in ("source", "model", "parameters", "world_size", "data_problem")} == {  # noqa: E501
        "source": "c.yaml", "model": "M", "parameters": 1_719_533, "world_size": 2, "data_problem": "none there",  # noqa: E501
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9996, "10.0 k"),
        (99_960, "100 k"),
        (147_456, "147 k"),
        (999_600, "1.00 M"),
        (1.5e9, "1.50 G"),
        (2e12, "2.00 T"),
        (7.25e15, "7.25 P"),
    ],
)
def test_units(number: float, text: str) -> None:
    assert in_units(number) == text


RAMP = Piece(name="ramp", first=0, end=8, points=[(0, 0.0), (7, 1.0)])
FLOOR = Piece(name="a long name", first=8, end=16, points=[(8, 0.5), (15, 0.5)])


def test_plots_line_by_line() -> None:
    """Oracle: drawn by hand; a ramp over 8 columns, a jump, and a flat line at half height with its name cut
    to its width."""
    plot = CurvePlot(pieces=[RAMP, FLOOR], rows=4)
    assert plot.lines(22, ascii_only=True) == [
        "  1 +      **:",
        "    |    **  :",
        "0.5 +  **    ********",
        "    |**      :",
        "  0 +--------+--------",
        "     0       8      16",
        "       ramp  a long n",
    ]
    assert plot.lines(22, ascii_only=False) == [
        "  1 ┤     ⢀⠔⠁┊",
        "    │   ⢀⠔⠁  ┊",
        "0.5 ┤  ⡠⠊    ⠈⠉⠉⠉⠉⠉⠉⠉",
        "    │⡠⠊      ┊",
        "  0 ┼────────┴────────",
        "     0       8      16",
        "       ramp  a long n",
    ]


def test_a_short_phase_keeps_its_border_and_loses_its_number_and_name() -> None:
    pieces = [
        Piece(name="long", first=0, end=998, points=[(0, 1.0), (997, 1.0)]),
        Piece(name="short", first=998, end=1000, points=[(998, 1.0), (999, 1.0)]),
    ]
    *_, floor, numbers, names = CurvePlot(pieces=pieces).lines(60, ascii_only=True)
    assert floor.endswith("-+")
    assert numbers.split() == ["0", "1,000"]
    assert names.split() == ["long"]
