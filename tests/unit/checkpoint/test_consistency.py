"""A run state that contradicts itself is refused, whoever wrote it and however well it is hashed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.checkpoint.consistency import require_consistent, require_layout
from aiprod_ds.checkpoint.manifest import write_manifest
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError
from aiprod_ds.planner.search import ParallelChoice, PhaseChoice
from aiprod_ds.train.resume.history import History

# 10 updates of the first phase and 4 of the second, two skipped, two micro-batches and 8 clips each.
CLOCK = Clock(
    updates=14,
    skipped_updates=2,
    micro_batches=32,
    samples=112,
    phase=1,
    phase_updates=4,
    phase_skipped=1,
    epoch=2,
)
LAYOUT = {
    "engine": "local",
    "world_size": 1,
    "zero_stage": 0,
    "precision": "fp32",
    "global_batch_sizes": [[8]],
}


def _history(**changes: Any) -> dict[str, Any]:
    history = History(
        phase_updates={"low": 10, "high": 4},
        measured={"updates": 14, "metrics": {}},
        evaluated={"MEASURES": {"updates": 14, "samples": 112}},
        not_saved=[{"update": 3, "reason": "full"}],
    ).to_dict()
    return history | changes


def _scheduler(phase: int = 1, updates: int = 4, skipped: int = 1) -> dict[str, Any]:
    return {"phase": phase, "seen_updates": updates, "seen_skipped": skipped}


def _state(**changes: Any) -> RunState:
    clock = Clock(**{**asdict(CLOCK), **changes.pop("clock", {})})
    values: dict[str, Any] = {
        "clock": clock,
        "scheduler": _scheduler(),
        "fingerprint": "f",
        "phase_fingerprints": ("p", "q"),
        "layout": LAYOUT,
        "history": _history(),
    }
    return RunState(**{**values, **changes})


def test_what_a_run_saves_agrees_with_itself() -> None:
    require_consistent(_state(), where="here")
    # A phase that was entered and has had no update: the scheduler follows with the first.
    begun = {"updates": 10, "phase_updates": 0, "phase_skipped": 0, "epoch": 0}
    history = _history(phase_updates={"low": 10}, measured={}, evaluated={})
    require_consistent(_state(clock=begun, scheduler=_scheduler(0, 10, 2), history=history), where="here")
    require_consistent(_state(history={}, scheduler={}), where="here")  # of another program, or older


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "more in the phase": (
        {"clock": {"phase_updates": 15}},
        "clock.phase_updates: must be at most 14, got 15",
    ),
    "more skipped in the phase": ({"clock": {"phase_skipped": 3}}, "clock.phase_skipped: must be at most 2"),
    "another first phase": (
        {"clock": {"phase": 0}},
        "clock.phase_updates: must equal clock.updates (14) in the first phase, got 4",
    ),
    "a phase without updates": (
        {"clock": {"phase_updates": 14}},
        "clock.phase: must be at most the 0 updates before this phase, got 1",
    ),
    "too few micro-batches": ({"clock": {"micro_batches": 15}}, "clock.micro_batches: must be at least 16"),
    "too few samples": ({"clock": {"samples": 13}}, "clock.samples: must be at least one for each of 14"),
    "an epoch before its phase": (
        {"clock": {"phase_updates": 0, "phase_skipped": 0}},
        "clock.epoch: must be 0 where its phase begins, got 2",
    ),
    "a phase that is not there": ({"phase_fingerprints": ("p",)}, "clock.phase: must be below 1"),
    "another scheduler": ({"scheduler": _scheduler(updates=3)}, "clock: must stand where the scheduler does"),
    "a later scheduler": (
        {"scheduler": _scheduler(phase=2)},
        "clock.phase: must be the scheduler's (2), got 1",
    ),
    "an earlier scheduler": ({"scheduler": _scheduler(phase=0)}, "clock.phase: must be the scheduler's (0)"),
    "a scheduler of text": (
        {"scheduler": _scheduler() | {"phase": "x"}},
        "clock.phase: must be the scheduler's",
    ),
    "another history": (
        {"history": _history(phase_updates={"low": 10, "high": 5})},
        "clock.updates: must be the sum of all phases' in the history, 15, got 14",
    ),
    "a history of text": ({"history": _history(phase_updates="x")}, "history.phase_updates: must be counts"),
    "measured later": (
        {"history": _history(measured={"updates": 15})},
        "history.measured.updates: must not be after update 14, got 15",
    ),
    "evaluated later": (
        {"history": _history(evaluated={"A": {"updates": 99}})},
        "history.evaluated.A.updates: must not be after update 14, got 99",
    ),
    "not saved later": (
        {"history": _history(not_saved=[{"update": None}])},
        "history.not_saved.update: must not be after update 14, got None",
    ),
    "no ranks": ({"layout": LAYOUT | {"world_size": 0}}, "layout.world_size: must be a count, got '0'"),
    "no engine": ({"layout": LAYOUT | {"engine": 3}}, "layout.engine: must be text, got '3'"),
    "no batches": (
        {"layout": LAYOUT | {"global_batch_sizes": 3}},
        "layout.global_batch_sizes: must be a list",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_a_state_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: {re.escape(message)}.*take another checkpoint"):
        require_consistent(_state(**changes), where="here")


def test_a_layout_that_does_not_say_on_what_it_was_saved_is_refused() -> None:
    require_layout(LAYOUT, where="here")
    with pytest.raises(CheckpointError, match=r"here: layout must have .*, got none of engine, zero_stage"):
        require_layout({"world_size": 1, "precision": "fp32"}, where="here")


@pytest.mark.parametrize("value", [-1, 10**15 + 1, 10**400, 1.0, True, "1", None])
def test_counts_that_no_run_reaches_are_refused(value: object) -> None:
    values = {**CLOCK.to_dict(), "samples": value}
    with pytest.raises(CheckpointError, match=r"clock\.samples: must be an integer from 0 to 1,000,000,000"):
        Clock.from_dict(values)


@pytest.mark.parametrize(
    "changes", [{"phase_updates": {"a": "x"}}, {"before": [1]}, {"evaluations": None}, {"unknown": 1}]
)
def test_a_history_of_other_things_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=f"history: must be what a run saves, got {next(iter(changes))}"
    ):
        History.from_dict(_history(**changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("phases"),
        lambda values: values["phases"][0].pop("micro_batch_sizes"),
        lambda values: values.update(zero_stage="x"),
        lambda values: values.update(world_size=0),
        lambda values: values.update(other=1),
        lambda values: values["phases"][0].update(micro_batch_sizes=[0]),
        lambda values: values.update(phases=[3]),
    ],
)
def test_a_choice_of_other_things_is_refused(change: Callable[[Any], Any]) -> None:
    phase = PhaseChoice(recompute=1, micro_batch_sizes=(2, 1))
    choice = ParallelChoice(zero_stage=1, is_offloaded=False, world_size=2, phases=(phase,))
    values = json.loads(json.dumps(choice.to_dict()))
    assert ParallelChoice.from_dict(values) == choice
    change(values)
    with pytest.raises(CheckpointError, match=r"layout\.parallel: must be a saved choice"):
        ParallelChoice.from_dict(values)


def test_a_forged_checkpoint_is_left_out_like_one_that_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for updates in (13, 14):
        pending = store.open_pending(updates)
        (pending / "engine" / "weights.bin").write_bytes(b"weights")
        own, before = updates - 10, {"measured": {}, "evaluated": {}}
        history = _history(phase_updates={"low": 10, "high": own}, **before)
        clock = {"updates": updates, "phase_updates": own}
        store.commit(updates, _state(clock=clock, scheduler=_scheduler(updates=own), history=history))
    newest = store.newest()
    assert newest is not None
    assert newest.folder.name == "update_000014"
    path = newest.folder / "state.json"
    values = json.loads(path.read_text())
    values["clock"]["phase_updates"] = 3
    path.write_text(json.dumps(values))
    write_manifest(newest.folder)
    with pytest.raises(CheckpointError, match="clock: must stand where the scheduler does"):
        store.read(newest.folder)
    taken = store.newest()
    assert taken is not None
    assert taken.folder.name == "update_000013"
