"""How fast an update was, in the figures that the field compares: updates, clips, tokens and credited FLOP/s.

Owns the arithmetic. What a clip takes is the unit's, what a GPU could do is in `aiprod_ds.planner.hardware`.
"""

from __future__ import annotations

from aiprod_ds.config.deepspeed import Precision
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.train.unit import ClipWork


def peak_flops(machine: Machine | None, precision: Precision) -> float | None:
    """Returns what the data sheet promises per second in the precision's matrix products; None for a CPU."""
    if machine is None:
        return None
    return machine.fp32_flops if precision == "fp32" else machine.half_flops


def throughput(
    work: ClipWork | None, *, clips: int, world_size: int, seconds: float, peak: float | None
) -> dict[str, float]:
    """Returns one rank's metrics of an update.

    Worked number: 8 clips of 128 tokens and 2e12 FLOPs each on 2 ranks in 0.5 s are 2 updates/s, 8 clips/s,
    1024 tokens/s and 16 TFLOP/s a rank, and 0.2 of a peak of 80 TFLOP/s.

    Args:
        work: Of one clip; None where nobody has counted it.
        clips: Of all ranks.
        seconds: Of the update.
        peak: FLOP/s of one device.
    """
    own = clips / world_size / seconds
    found = {"throughput/updates_per_second": 1 / seconds, "throughput/clips_per_second": own}
    if work is None:
        return found
    found["throughput/tokens_per_second"] = own * work.tokens
    if work.flops is not None:
        found["throughput/tflops_per_device"] = own * work.flops / 1e12
        if peak is not None:
            found["throughput/mfu"] = own * work.flops / peak
    return found
