"""MetricsRecorder: one transfer and one collective per window, exact values, every reduction, uneven key
sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.recorder import MetricsRecorder

CPU = torch.device("cpu")


class ListSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.evaluations: list[tuple[EvaluationRecord, Path]] = []

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((update, dict(metrics)))

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        assert self.rows, "its row comes first"
        self.evaluations.append((record, folder))

    def close(self) -> None:
        self.closed = True


def identity(matrix: Tensor) -> Tensor:
    return matrix


def test_values_come_back_in_order_and_reach_every_sink() -> None:
    sinks = [ListSink(), ListSink()]
    recorder = MetricsRecorder(device=CPU, world_size=1, sinks=sinks)
    recorder.record(1, {"loss/total": torch.tensor(0.5), "learning_rate": 1e-4})
    recorder.record(
        2, {"learning_rate": 2e-4, "loss/total": 0.25, "loss/kl": torch.tensor(3.0, dtype=torch.bfloat16)}
    )
    rows = recorder.flush(identity)
    assert rows == [
        (1, {"loss/total": 0.5, "learning_rate": 1e-4}),
        (2, {"learning_rate": 2e-4, "loss/total": 0.25, "loss/kl": 3.0}),
    ]
    assert [sink.rows for sink in sinks] == [rows, rows]
    assert recorder.flush(identity) == []


def test_each_reduction_against_its_definition_on_two_ranks() -> None:
    """Oracle: the definitions. The other rank has values 10 higher; values are exact in binary, so there is
    no tolerance."""

    def mean_with_other_rank(matrix: Tensor) -> Tensor:
        return (matrix + (matrix + 10)) / 2

    recorder = MetricsRecorder(device=CPU, world_size=2)
    recorder.record(1, {"learning_rate": 0.1, "throughput/clips_per_second": 4.0, "loss/total": 1.0})
    assert recorder.flush(mean_with_other_rank) == [
        (1, {"learning_rate": 0.1, "throughput/clips_per_second": 18.0, "loss/total": 6.0})
    ]


def test_one_collective_per_window_and_none_for_metrics_that_are_the_same_everywhere() -> None:
    calls: list[Tensor] = []

    def reduce(matrix: Tensor) -> Tensor:
        calls.append(matrix)
        return matrix

    recorder = MetricsRecorder(device=CPU, world_size=2)
    for update in range(5):
        recorder.record(update, {"loss/total": 1.0, "loss/kl": 2.0, "learning_rate": 0.1})
    recorder.flush(reduce)
    assert [call.numel() for call in calls] == [10]
    assert calls[0].dtype == torch.float64
    recorder.record(6, {"clock/samples": 2**40 + 1})
    assert recorder.flush(reduce) == [(6, {"clock/samples": float(2**40 + 1)})]
    assert len(calls) == 1


def test_the_collective_lines_up_when_ranks_hold_tensors_and_floats_differently() -> None:
    """A gradient norm may be a tensor on one rank and a float on another; positions in the collective must
    not depend on it."""
    seen: list[list[float]] = []

    def reduce(matrix: Tensor) -> Tensor:
        seen.append(matrix.tolist())
        return matrix

    for first in (1.0, torch.tensor(1.0)):
        recorder = MetricsRecorder(device=CPU, world_size=2)
        recorder.record(1, {"loss/total": first, "loss/kl": 2.0})
        recorder.flush(reduce)
    assert seen[0] == seen[1] == [1.0, 2.0]


def test_device_tensors_are_kept_unread_until_flush() -> None:
    """The meta device has no values: reading one raises, as a stand-in for a device that must not be waited
    for."""
    recorder = MetricsRecorder(device=torch.device("meta"), world_size=1)
    recorder.record(1, {"loss/total": torch.zeros((), device="meta"), "learning_rate": 0.1})
    with pytest.raises(NotImplementedError):
        recorder.flush(identity)


def test_recorded_tensors_keep_their_value_and_no_graph() -> None:
    loss = torch.tensor(2.0, requires_grad=True) * 1.0
    recorder = MetricsRecorder(device=CPU, world_size=1)
    recorder.record(1, {"loss/total": loss})
    with torch.no_grad():
        loss.mul_(5.0)
    assert recorder.flush(identity) == [(1, {"loss/total": 2.0})]


def test_non_finite_values_pass_through() -> None:
    recorder = MetricsRecorder(device=CPU, world_size=1)
    recorder.record(1, {"loss/total": float("inf"), "loss/kl": 1.0})
    assert recorder.flush(identity) == [(1, {"loss/total": float("inf"), "loss/kl": 1.0})]


def test_an_unknown_name_is_refused_when_it_is_recorded() -> None:
    recorder = MetricsRecorder(device=CPU, world_size=1)
    with pytest.raises(ValueError, match=r"got 'speed'\. Add a row"):
        recorder.record(1, {"speed": 1.0})


def test_evaluations_and_close_reach_the_sinks() -> None:
    sink = ListSink()
    recorder = MetricsRecorder(device=CPU, world_size=1, sinks=[sink])
    record = EvaluationRecord(
        update=7,
        samples=56,
        phase="low",
        phase_index=0,
        reason="interval",
        seconds=1.0,
        metrics={"psnr_db": 21.5},
    )
    recorder.log_evaluation(record, Path("run"))
    recorder.close()
    assert sink.rows == [(7, {"evaluation/psnr_db": 21.5})]
    assert sink.evaluations == [(record, Path("run"))]
    assert sink.closed


def test_every_flush_is_told_of_also_without_rows() -> None:
    told: list[list[tuple[int, dict[str, float]]]] = []
    recorder = MetricsRecorder(device=CPU, world_size=1, on_flush=told.append)
    recorder.record(1, {"loss/total": 0.5})
    recorder.flush(identity)
    recorder.flush(identity)
    assert told == [[(1, {"loss/total": 0.5})], []]
