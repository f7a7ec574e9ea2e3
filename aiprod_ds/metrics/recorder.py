"""Collects the metrics of every update without waiting for the device, and hands them out one window at a
time.

Reading a device tensor stops the host until the device has caught up. The recorder keeps 0-dim tensors as
they are; `flush` moves a whole window in one transfer, with one collective over the ranks. The loop owns the
only recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.jsonl import MetricRow
from aiprod_ds.metrics.metric_names import Reduction, find_metric
from aiprod_ds.metrics.sinks import Sink

_PART, _SHARE = "_part", "_share"


class MetricsRecorder:
    """Per-update metrics on their way from the device to the sinks.

    Args:
        device: Where the window is put together, and where `reduce` gets it.
        world_size: Number of ranks; turns a mean over ranks into a sum for metrics that are summed.
        sinks: Where reduced metrics go; empty on every rank but the main one.
        on_flush: Called with the rows of every flush, also without any.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        world_size: int,
        sinks: Sequence[Sink] = (),
        on_flush: Callable[[list[MetricRow]], None] = lambda _rows: None,
    ) -> None:
        self._device = device
        self._world_size = world_size
        self._sinks = tuple(sinks)
        self._on_flush = on_flush
        self._window: list[tuple[int, dict[str, float | Tensor]]] = []

    def record(self, update: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Keeps the metrics of one update; no device tensor is read.

        Args:
            update: Applied updates so far.
            metrics: Names from `metric_names` with floats or 0-dim tensors. The names are the same on all
                ranks; device tensors must not be written to afterwards.
        """
        for name in metrics:
            find_metric(name)  # an unknown name fails at the update that brings it, not in a later flush
        self._window.append((update, {name: _detached(value) for name, value in metrics.items()}))

    def flush(self, reduce: Callable[[Tensor], Tensor]) -> list[MetricRow]:
        """Reads, reduces and logs the window, and begins a new one. Collective: every rank calls it at the
        same updates.

        Args:
            reduce: Mean over ranks of a float64 tensor on `device`, in its shape. Called once, not at all if
                there is nothing to reduce.

        Returns:
            (update, metrics) in the order of recording; the same on all ranks up to metrics that are not
            reduced.
        """
        window, self._window = self._window, []
        # The names stand before their values come, so that lines keep the order of recording.
        rows: list[MetricRow] = [(update, dict.fromkeys(metrics, 0.0)) for update, metrics in window]
        cells = [(row, name) for row, (_, metrics) in enumerate(window) for name in metrics]
        # What is the same everywhere stays out of the collective: a mean of three equal float64 need not be
        # the same float64.
        own = [(row, name) for row, name in cells if find_metric(name).reduction is Reduction.SAME]
        shared = [(row, name) for row, name in cells if find_metric(name).reduction is not Reduction.SAME]
        stacked = _stack([window[row][1][name] for row, name in shared + own], self._device)
        if shared:
            stacked = torch.cat([reduce(stacked[: len(shared)]), stacked[len(shared) :]])
        # `tolist` is the only wait for the device.
        for (row, name), value in zip(shared + own, stacked.tolist(), strict=True):
            is_sum = find_metric(name).reduction is Reduction.SUM
            rows[row][1][name] = value * self._world_size if is_sum else value
        rows = [(update, with_quotients(metrics)) for update, metrics in rows]
        self._send(rows)
        self._on_flush(rows)
        return rows

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Sends an evaluation straight to the sinks: its measures as a row, then what it has to show.

        `flush` comes first, so that lines keep order.

        Args:
            record: With its media already written.
            folder: The run folder.
        """
        row = {f"evaluation/{name}": float(value) for name, value in record.metrics.items()}
        if row:  # an evaluation may have something to show alone
            self._send([(record.update, row)])
        for sink in self._sinks:
            sink.log_evaluation(record, folder)

    def close(self) -> None:
        """Closes the sinks; what was not flushed is lost."""
        for sink in self._sinks:
            sink.close()

    def _send(self, rows: Sequence[MetricRow]) -> None:
        for update, metrics in rows:
            for sink in self._sinks:
                sink.log(update, metrics)


def with_quotients(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns `metrics` with `<name>` = part / share in place of every pair `<name>_part` and `<name>_share`.

    That is how a mean over a part of the samples is put together from ranks that had more and less of them.
    Without any (share 0) there is no mean and no entry. Worked number: part 0.3 and share 0.25 are a mean of
    1.2.
    """
    names = {
        part.removesuffix(_PART)
        for part in metrics
        if part.endswith(_PART) and part.removesuffix(_PART) + _SHARE in metrics
    }
    kept = {
        name: value
        for name, value in metrics.items()
        if name.removesuffix(_PART).removesuffix(_SHARE) not in names
    }
    pairs = {name: (metrics[name + _PART], metrics[name + _SHARE]) for name in sorted(names)}
    return kept | {name: part / share for name, (part, share) in pairs.items() if share > 0}


def _detached(value: float | Tensor) -> float | Tensor:
    """Returns a float for anything on the host (no wait) and a graph-free tensor for anything on a device."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.device.type == "cpu" else value.detach().reshape(())
    return float(value)


def _stack(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Returns `values` as one float64 vector [len(values)] on `device`, in order, without reading the
    device."""
    on_device = [value for value in values if isinstance(value, Tensor)]
    on_host = [value for value in values if not isinstance(value, Tensor)]
    parts = [torch.tensor(on_host, dtype=torch.float64, device=device)]
    if on_device:
        parts.append(torch.stack(on_device).to(torch.float64))
    # Back into the given order: the collective adds place by place, and another rank may hold as a float
    # what is a tensor here.
    order = sorted(range(len(values)), key=lambda index: isinstance(values[index], Tensor))
    position = torch.empty(len(values), dtype=torch.long)
    position[torch.tensor(order, dtype=torch.long)] = torch.arange(len(values))
    return torch.cat(parts)[position.to(device)]
