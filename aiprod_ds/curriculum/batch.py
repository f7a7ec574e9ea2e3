"""The batch triple: any two of global batch, micro-batch and accumulation give the third for a world size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTriple:
    """`global_batch_size = micro_batch_size * accumulation * world_size`, all >= 1."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int


def solve_batch(
    *, global_batch_size: int | None, micro_batch_size: int | None, accumulation: int | None, world_size: int
) -> BatchTriple:
    """Returns the full triple; a missing accumulation is 1 when only one number is given.

    Raises:
        ValueError: As `field: rule, got X. Fix.`, if the numbers do not divide or contradict each other.
    """
    if global_batch_size is None:
        assert micro_batch_size is not None, "the schema demands one of the two"
        accumulation = accumulation or 1
        return BatchTriple(
            global_batch_size=micro_batch_size * accumulation * world_size,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
        )
    if micro_batch_size is None:
        accumulation = accumulation or 1
        unit = accumulation * world_size
        _check_divisible(
            global_batch_size, unit, f"accumulation ({accumulation}) * world size ({world_size})"
        )
        micro_batch_size = global_batch_size // unit
    elif accumulation is None:
        unit = micro_batch_size * world_size
        _check_divisible(
            global_batch_size, unit, f"micro_batch_size ({micro_batch_size}) * world size ({world_size})"
        )
        accumulation = global_batch_size // unit
    product = micro_batch_size * accumulation * world_size
    if product != global_batch_size:
        raise ValueError(
            f"global_batch_size: must be micro_batch_size ({micro_batch_size}) * accumulation "
            f"({accumulation}) * "
            f"world size ({world_size}) = {product}, got {global_batch_size}. Leave one of the three out."
        )
    return BatchTriple(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, accumulation=accumulation
    )


def _check_divisible(size: int, unit: int, words: str) -> None:
    if size % unit:
        below, above = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"global_batch_size: must be a multiple of {words} = {unit}, got {size}. Use {nearest}."
        )
