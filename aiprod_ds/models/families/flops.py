"""Floating-point operations of one update, by one convention for all families.

    F = sum over streams (4 * N_frozen + 6 * N_trained) * B * S
        + 12 * L * B * sum over attentions S_q * S_k * D

with B samples, S tokens per sample, N parameters that run over a stream's tokens, L blocks and D the width of
the attention. A multiply-add counts 2: forward 2, the gradient of the input 2, and of the weight 2, which a
frozen weight has not. Attention is full and costs 4 forward and 8 backward. Recomputation is not counted, nor
attention to the text. Every parameter counts for every token of its stream, also those that run over the text
or once per sample, so more is credited than torch counts: for LTX-Video 2B with 128 text tokens 1, 12 and 10
% at 128, 768 and 7168 tokens of video (`tests/numerics/test_families.py`).

Worked number: 1000 trained parameters, 2 blocks of width 4, 3 samples of 10 tokens: 6*1000*3*10 +
12*2*3*10*10*4 = 208,800.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def single_stream_flops(transformer: nn.Module, *, batch_size: int, num_tokens: int) -> float:
    """Returns F of a transformer whose parameters all run over the same tokens: 6*N*B*S + 12*L*B*S^2*D if all
    are trained.

    Args:
        transformer: A model of diffusers; its configuration gives L and D.
        batch_size: B.
        num_tokens: S.
    """
    config: Any = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    linear = linear_flops(transformer.parameters(), batch_size=batch_size, num_tokens=num_tokens)
    return linear + attention_flops(
        num_blocks=config.num_layers,
        batch_size=batch_size,
        num_queries=num_tokens,
        num_keys=num_tokens,
        width=width,
    )


def linear_flops(parameters: Iterable[nn.Parameter], *, batch_size: int, num_tokens: int) -> float:
    """Returns the first term for the parameters of one stream."""
    per_token = sum((6 if parameter.requires_grad else 4) * parameter.numel() for parameter in parameters)
    return float(per_token * batch_size * num_tokens)


def attention_flops(
    *, num_blocks: int, batch_size: int, num_queries: int, num_keys: int, width: int
) -> float:
    """Returns the second term for one attention of every block."""
    return 12.0 * num_blocks * batch_size * num_queries * num_keys * width
