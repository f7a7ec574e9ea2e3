"""The figures of an update: closed forms, and what is left out where it is not known."""

from __future__ import annotations

import pytest

from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.train.throughput import peak_flops, throughput
from aiprod_ds.train.unit import ClipWork

UPDATE = {"clips": 8, "world_size": 2, "seconds": 0.5}


def test_the_worked_number() -> None:
    found = throughput(ClipWork(tokens=128, flops=2e12), **UPDATE, peak=80e12)
    assert found == pytest.approx(
        {
            "throughput/updates_per_second": 2,
            "throughput/clips_per_second": 8,
            "throughput/tokens_per_second": 1024,
            "throughput/tflops_per_device": 16,
            "throughput/mfu": 0.2,
        }
    )


def test_what_is_not_known_is_left_out() -> None:
    assert "throughput/mfu" not in throughput(ClipWork(tokens=1, flops=1.0), **UPDATE, peak=None)
    assert "throughput/tflops_per_device" not in throughput(
        ClipWork(tokens=1, flops=None), **UPDATE, peak=1e12
    )
    assert set(throughput(None, **UPDATE, peak=1e12)) == {
        "throughput/updates_per_second",
        "throughput/clips_per_second",
    }


def test_the_peak_is_that_of_the_precision() -> None:
    h200 = MACHINES["h200-141gb"]
    assert peak_flops(h200, "bf16") == 989e12
    assert peak_flops(h200, "fp32") == 67e12
    assert peak_flops(None, "bf16") is None
