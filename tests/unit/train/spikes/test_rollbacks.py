"""Decisions: what they leave out, which checkpoints are on their way, their file and their words."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.spikes.detector import Spike
from aiprod_ds.train.spikes.going_back import in_words
from aiprod_ds.train.spikes.rollbacks import Rollback, Rollbacks, of_state, read_rollbacks


def _rollback(phase: int, first: int, last: int, **changes: object) -> Rollback:
    values = {
        "kind": "non_finite",
        "metric": "loss/total",
        "phase": phase,
        "first": first,
        "last": last,
        "first_update": first,
        "update": last,
        "learning_rate": 1e-3,
        "value": "nan",
        "typical": None,
        "deviations": None,
        **changes,
    }
    return Rollback(spike=Spike(**values), checkpoint="update_000004")  # type: ignore[arg-type]


def _state(phase: int, position: int, known: Rollbacks = Rollbacks()) -> RunState:  # noqa: B008  frozen
    return RunState(
        clock=Clock(updates=position, phase=phase, phase_updates=position),
        scheduler={},
        fingerprint="",
        phase_fingerprints=(),
        layout={},
        spikes={"rollbacks": known.to_list()},
    )


KNOWN = Rollbacks(decided=(_rollback(0, 6, 8), _rollback(1, 0, 2)))


@pytest.mark.parametrize(
    ("phase", "position", "is_left_out", "behind"),
    [
        (0, 5, False, 0),
        (0, 6, True, 0),
        (0, 8, True, 0),
        (0, 9, False, 1),
        (1, 0, True, 1),
        (1, 3, False, 2),
        (2, 7, False, 2),
    ],
)
def test_what_is_left_out_and_what_lies_behind(
    phase: int, position: int, is_left_out: bool, behind: int
) -> None:
    clock = Clock(phase=phase, phase_updates=1 if position else 0, phase_skipped=max(position - 1, 0))
    assert KNOWN.leaves_out(clock) is is_left_out
    assert KNOWN.num_behind(clock) == behind


@pytest.mark.parametrize(
    ("phase", "position", "num_known", "is_on_the_way"),
    [
        (0, 4, 0, True),
        (0, 6, 0, True),
        (0, 7, 0, False),
        (0, 9, 0, False),
        (0, 9, 1, True),
        (1, 0, 1, True),
        (1, 1, 1, False),
        (1, 5, 2, True),
    ],
)
def test_a_checkpoint_is_on_the_way_if_it_knows_or_stands_before_each_decision(
    phase: int, position: int, num_known: int, is_on_the_way: bool
) -> None:
    state = _state(phase, position, Rollbacks(decided=KNOWN.decided[:num_known]))
    assert KNOWN.has_way_of(state) is is_on_the_way
    expected = KNOWN if is_on_the_way else Rollbacks(decided=KNOWN.decided[:num_known])
    assert KNOWN.from_checkpoint(state) == expected


def test_a_checkpoint_of_another_way_counts_for_itself() -> None:
    other = Rollbacks(decided=(_rollback(0, 3, 3),))
    assert KNOWN.has_way_of(_state(0, 9, other))
    assert KNOWN.from_checkpoint(_state(0, 9, other)) == other


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == Rollbacks()
    KNOWN.write(tmp_path, stopped_by=_rollback(2, 1, 1))
    assert read_rollbacks(tmp_path) == KNOWN
    assert of_state(_state(0, 0, KNOWN)) == KNOWN


def test_words_for_each_kind() -> None:
    high = {"typical": 0.5, "deviations": 9.25, "value": 50.0}
    assert in_words(_rollback(0, 6, 8).spike) == "updates 7 to 8: the loss was nan, in 3 updates of the data"
    assert (
        in_words(_rollback(0, 6, 6, kind="extreme", metric="gradient/norm", update=7, **high).spike)
        == "update 7: the gradient norm rose to 50, 9.2 deviations above its median of 0.5"
    )
    assert (
        in_words(_rollback(0, 6, 26, kind="sustained", **high).spike)
        == "updates 7 to 26: the loss stayed high, last at 50, 9.2 deviations above its median of 0.5"
    )


def test_factors_are_noted_where_they_change_and_their_highest_counts() -> None:
    history = History()
    history.note_rate_factor("low", 1.0, Clock())
    assert history.rate_factors == []
    history.note_rate_factor("low", 0.5, Clock(updates=4, phase_updates=4))
    history.note_rate_factor("low", 0.5, Clock(updates=6, phase_updates=6))
    history.note_rate_factor("high", 0.25, Clock(updates=9, phase=1))
    assert history.rate_factors == [
        {"phase": "low", "update": 4, "phase_update": 4, "factor": 0.5},
        {"phase": "high", "update": 9, "phase_update": 0, "factor": 0.25},
    ]
    assert history.highest_rate_factor("low", 0.5) == 1.0
    assert history.highest_rate_factor("high", 0.25) == 0.25
    assert history.highest_rate_factor("later", 0.1) == 0.1
    assert History.from_dict(history.to_dict()) == history
