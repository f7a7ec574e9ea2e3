"""What goes wrong with the data of a run is counted once, agreed by all ranks, and judged against a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.data.reading.replacing import UnreadClip
from aiprod_ds.engine import dist
from aiprod_ds.errors import CheckpointError, DataError
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.train.interrupts import Interrupt, Interrupts, SignalWatch
from aiprod_ds.train.resume.data_faults import DataFaults


def _batch(*names: str, reason: str = "damaged", restarts: int = 0) -> MicroBatch:
    unread = tuple(UnreadClip(sample_index=0, name=name, reason=reason) for name in names)
    return MicroBatch(tensors={}, samples=(), bucket=0, position=0, unread=unread, restarts=restarts)


def _faults(**changes: Any) -> DataFaults:
    return DataFaults(**{"num_clips": 40, "max_fraction": 0.05, **changes})


def test_a_clip_is_logged_and_listed_once(caplog: pytest.LogCaptureFixture) -> None:
    faults = _faults()
    faults.note(_batch("b.mp4", "a.mp4", "b.mp4"))
    faults.note(_batch("b.mp4", reason="still damaged", restarts=2))
    assert caplog.text.count("clip_replaced") == 2
    assert faults.known == {"b.mp4": "damaged", "a.mp4": "damaged"}
    assert faults.agreed == {}, "a checkpoint between two saves has none of it"

    assert faults.merge()
    assert list(faults.agreed.items()) == [("a.mp4", "damaged"), ("b.mp4", "damaged")]
    assert faults.worker_restarts == 2
    faults.note(_batch("a.mp4"))
    assert not faults.merge()
    assert (len(faults.known), faults.worker_restarts) == (2, 2)
    assert caplog.text.count("clip_replaced") == 2


def test_only_more_than_the_limit_is_too_much() -> None:
    faults = _faults()
    faults.note(_batch("a", "b"))
    assert not faults.are_too_many, "2 of 40 are 5 %"
    faults.note(_batch("c"))
    assert faults.are_too_many
    faults.require_few()  # not agreed yet: all ranks stop or none
    faults.merge()
    with pytest.raises(DataError) as caught:
        faults.require_few()
    assert str(caught.value) == (
        "data.train: at most 5% of the clips may be unreadable in training, got 3 of 40: a (damaged); "
        "b (damaged); c (damaged). The run is saved: repair these files, or raise "
        "data.max_unreadable_fraction, and start it again."
    )
    _faults(agreed=faults.agreed, max_fraction=0.1).require_few()


def test_more_than_a_few_names_are_in_the_report() -> None:
    faults = _faults(agreed={f"{number}.mp4": "damaged" for number in range(8)})
    with pytest.raises(DataError, match=r"4\.mp4 \(damaged\); and 3 more, see report\.json\. The run"):
        faults.require_few()


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_agree_on_one_list() -> None:
    results = run_on_ranks(merge_on_ranks, ranks=2, arguments={}, timeout_seconds=120)
    assert results[0] == results[1]
    assert results[0] == {
        "has_grown": [True, False],
        "agreed": [["a.mp4", "damaged"], ["b.mp4", "away"], ["c.mp4", "damaged"]],
        "restarts": 3,
    }


def merge_on_ranks() -> dict[str, Any]:
    """Runs on the ranks: both found b.mp4, each for another reason."""
    faults = _faults()
    if dist.rank() == 0:
        faults.note(_batch("c.mp4", restarts=1))
        faults.note(_batch("b.mp4", reason="cut off"))
    else:
        faults.note(_batch("a.mp4", restarts=2))
        faults.note(_batch("b.mp4", reason="away"))
    has_grown = [faults.merge(), faults.merge()]
    agreed = [list(pair) for pair in faults.agreed.items()]
    return {"has_grown": has_grown, "agreed": agreed, "restarts": faults.worker_restarts}


def test_a_rank_may_have_a_reason_of_its_own_to_stop(tmp_path: Path) -> None:
    reasons: list[bool] = [False]
    requests = Interrupts(SignalWatch(), tmp_path, wants_stop=lambda: reasons[0])
    assert requests.agreed(at_once=True) is Interrupt.NONE
    reasons[0] = True
    assert requests.agreed(at_once=True) is Interrupt.STOP


def _state(**changes: Any) -> RunState:
    values: dict[str, Any] = {"scheduler": {}, "fingerprint": "f", "phase_fingerprints": ("p",), "layout": {}}
    return RunState(clock=Clock(), **{**values, **changes})


def test_the_list_stands_in_the_run_state_and_older_ones_have_none() -> None:
    saved = _state(replaced_clips={"a.mp4": "damaged"}).to_dict()
    assert RunState.from_dict(saved).replaced_clips == {"a.mp4": "damaged"}
    del saved["replaced_clips"]
    assert RunState.from_dict(saved).replaced_clips == {}
    with pytest.raises(CheckpointError, match="replaced_clips must be a Mapping, got list"):
        RunState.from_dict({**saved, "replaced_clips": ["a.mp4"]})
