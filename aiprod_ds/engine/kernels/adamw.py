"""AdamW as one Triton kernel: reads a gradient, updates master and moments, and writes the weight.

With a 16-bit gradient and weight that is 28 bytes a number, each read or written once. torch's fused AdamW
takes fp32 gradients and leaves the weight to a copy: 46 bytes with the two conversions around it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def update(  # noqa: PLR0913  what a kernel reads and writes
    gradient: Tensor,
    master: Tensor,
    moments: tuple[Tensor, Tensor],
    weight: Tensor,
    numbers: Tensor,
    *,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Updates all but the gradient, in place; every tensor is 1-dimensional, contiguous and of one length.

        g = gradient / d;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        master = (1 - rate decay) master - rate (m / c1) / (sqrt(v / c2) + epsilon)

    Args:
        gradient: fp32, bf16 or fp16.
        master: fp32.
        moments: m and v, fp32.
        weight: Gets the master, rounded to its type.
        numbers: fp32, on the device: whether to do nothing (not 0), d, 1 / c1, 1 / sqrt(c2), with
            c = 1 - beta^step.
        rate: The learning rate.
        decay: Of weights.
        betas: Of the moments.
        epsilon: As in the formula.
    """
    size = master.numel()
    beta1, beta2 = betas
    _update[(triton.cdiv(size, _BLOCK),)](
        gradient,
        master,
        *moments,
        weight,
        numbers,
        rate,
        1.0 - rate * decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        epsilon,
        size,
        BLOCK=_BLOCK,
    )


# Without annotations, which Triton evaluates.
@triton.jit(do_not_specialize=["rate", "kept"])  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    gradient,
    master,
    first,
    second,
    weight,
    numbers,
    rate,
    kept,
    beta1,
    rest1,
    beta2,
    rest2,
    epsilon,
    size,
    BLOCK: tl.constexpr,
):
    if tl.load(numbers) != 0.0:
        return
    divisor, over_c1, over_root_c2 = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < size
    g = tl.div_rn(tl.load(gradient + at, mask=is_in).to(tl.float32), divisor)
    m = beta1 * tl.load(first + at, mask=is_in) + rest1 * g
    v = beta2 * tl.load(second + at, mask=is_in) + rest2 * g * g
    step = tl.div_rn(m * over_c1, tl.sqrt_rn(v) * over_root_c2 + epsilon)
    value = kept * tl.load(master + at, mask=is_in) - rate * step
    tl.store(first + at, m, mask=is_in)
    tl.store(second + at, v, mask=is_in)
    tl.store(master + at, value, mask=is_in)
    tl.store(weight + at, value.to(weight.dtype.element_ty), mask=is_in)
