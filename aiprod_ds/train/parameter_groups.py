"""Which parameters are decayed: matrices and kernels, not vectors and scalars."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from aiprod_ds.engine.layout import whole_shape
from aiprod_ds.engine.protocol import ParameterGroup


def decay_groups(module: nn.Module) -> Sequence[ParameterGroup]:
    """Returns the trained parameters in at most two groups, the decayed ones first.

    A tensor with at most one dimension above 1 counts as a vector: biases, gains of norms, and also the [out, 1, 1] gains of
    weight normalisation and the [1, channels, 1] slopes of snake activations.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = tuple(name for name, parameter in trained if not _is_vector(parameter))
    plain = tuple(name for name, parameter in trained if _is_vector(parameter))
    groups = (ParameterGroup(names=decayed, is_decayed=True), ParameterGroup(names=plain, is_decayed=False))
    return [group for group in groups if group.names]


def _is_vector(parameter: Tensor) -> bool:
    return sum(size > 1 for size in whole_shape(parameter)) <= 1
