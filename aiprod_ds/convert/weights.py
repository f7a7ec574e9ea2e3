"""LoRA to full weights and back, over the states of plain models: names and tensors, nothing about files or
modules.

    merge     W' = W + scale * B A
    extract   W' - W  ~  B A  of a given rank, the nearest in the Frobenius norm (Eckart and Young, 1936)

An adapter's tensors are called `<layer>.lora_A.weight` [rank,in] and `<layer>.lora_B.weight` [out,rank], the
weight `<layer>.weight` [out,in]. Both functions go from tensor to tensor, so that a mapping that reads files
when asked needs memory for one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.errors import CheckpointError

_FULL_SVD_SIZE = (
    1024  # smaller side up to which the full SVD is taken; its cost grows with the square of that side
)
_OVERSAMPLING, _POWER_ITERATIONS = (
    32,
    4,
)  # with 10 and 2 the errors named at `extract` were three times as large


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """The difference of one layer as an adapter of scale 1.

    Attributes:
        layer: Name in the plain model, without `.weight`.
        down: A [rank,in] fp32.
        up: B [out,rank] fp32.
        difference_norm: Frobenius norm of W' - W.
        error_norm: Of W' - W - B A, computed from these A and B.
    """

    layer: str
    down: Tensor
    up: Tensor
    difference_norm: float
    error_norm: float

    @property
    def relative_error(self) -> float:
        """Error over difference; 0 where nothing differs."""
        return self.error_norm / self.difference_norm if self.difference_norm else 0.0


def merge(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the merged state in the order of `base`: adapted weights in fp32, everything else as it is.

    Worked number: W = 1, A = 2, B = 3, scale 0.5: 4.

    Args:
        base: State of the plain model, each tensor read when its turn comes.
        adapters: A and B of every layer in `scales`, in any float type.
        scales: Factor of B A, by layer.

    Raises:
        CheckpointError: If a layer is not in `base` or a shape does not fit; names before the first tensor is
            yielded.
    """
    require_layers(base, scales)
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if name == layer or layer not in scales:
            yield name, value
            continue
        down, up = adapters[f"{layer}.lora_A.weight"].float(), adapters[f"{layer}.lora_B.weight"].float()
        if (up.shape[0], down.shape[1]) != tuple(value.shape) or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{layer}: B A must have the weight's shape {list(value.shape)}, got B {list(up.shape)} and "
                f"A {list(down.shape)}."
            )
        yield name, value.float() + scales[layer] * (up @ down)


def require_layers(base: Collection[str], layers: Iterable[str]) -> None:
    """Checks that every adapted layer has a weight.

    Raises:
        CheckpointError: If one has none.
    """
    missing = [layer for layer in layers if f"{layer}.weight" not in base]
    if missing:
        raise CheckpointError(
            f"adapters: must belong to layers of the base model, got {', '.join(missing[:3])}. Take its own "
            "LoRA."
        )


def extract(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int, *, layers: Iterable[str]
) -> Iterator[Extracted]:
    """Yields, layer by layer, the adapter of `rank` that is nearest to the difference, computed in fp32.

    B = U sqrt(S) and A = sqrt(S) V^T of the largest singular values. U, S and V are those of
    `torch.linalg.svd` where the smaller side of the weight is at most 1024 or under eight times the rank; of
    larger weights those of `torch.svd_lowrank`, which draws random directions, from a fixed seed. Its error
    is larger than the least one: by 0.09, 0.3 and 0.5 % at ranks 16, 64 and 128 of a Gaussian 2048x2048, and
    by less than 0.1 % where singular values fall as k^-1/2 or faster. The error told is that of the A and B
    that are returned.

    Worked number: a difference diag(3, 2, 1) at rank 1 leaves the error sqrt(2^2 + 1^2) = 2.236, relative to
    sqrt(14) 0.598.

    Args:
        base: State of the plain model before training.
        tuned: State after it, of the same names and shapes.
        rank: Of every adapter; at most the smaller side of every weight.
        layers: Names of layers with a matrix as weight.

    Raises:
        CheckpointError: If a layer is missing, shapes differ, numbers are not finite or the rank is above a
            side of a weight.
    """
    for layer in layers:
        difference = _difference(base, tuned, f"{layer}.weight")
        if difference.dim() != 2 or rank > min(difference.shape):
            raise CheckpointError(
                f"{layer}: must be a matrix with sides of at least the rank ({rank}), got "
                f"{list(difference.shape)}. "
                "Lower the rank or leave the layer out."
            )
        up, down = _nearest(difference, rank)
        yield Extracted(
            layer=layer,
            down=down,
            up=up,
            difference_norm=_norm(difference),
            error_norm=_norm(difference - up @ down),
        )


def total_error(parts: Iterable[Extracted], lost: Iterable[float] = ()) -> float:
    """Returns the relative error of all together: sqrt(sum error^2 / sum difference^2); 0 where nothing
    differs.

    Worked number: differences 3 and 4 with errors 0 and 4: sqrt(16 / 25) = 0.8.

    Args:
        parts: Every layer that was extracted.
        lost: Norms of differences that no adapter holds, from `other_differences`.
    """
    errors, differences = 0.0, 0.0
    for part in parts:
        errors, differences = errors + part.error_norm**2, differences + part.difference_norm**2
    whole = sum(norm**2 for norm in lost)
    return math.sqrt((errors + whole) / (differences + whole)) if differences + whole else 0.0


def other_differences(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, layers: Collection[str]
) -> Iterator[tuple[str, float]]:
    """Yields the tensors beside the weights of `layers` that differ, with the norms of their differences.

    Raises:
        CheckpointError: If the two have not the same names and shapes, or numbers are not finite.
    """
    only = sorted(base.keys() ^ tuned.keys())
    if only:
        raise CheckpointError(
            f"tuned: must have the tensors of base, but only one of them has {', '.join(only[:3])}. Take "
            "its own base."
        )
    taken = {f"{layer}.weight" for layer in layers}
    for name in base:
        if name not in taken and (norm := _norm(_difference(base, tuned, name))):
            yield name, norm


def _difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> Tensor:
    for where, state in (("base", base), ("tuned", tuned)):
        if name not in state:
            raise CheckpointError(
                f"{where}: must hold {name}, got no such tensor. Take two states of one model."
            )
    first, second = base[name], tuned[name]
    if first.shape != second.shape:
        raise CheckpointError(
            f"{name}: must have one shape, got {list(first.shape)} in base and {list(second.shape)} in "
            "tuned. "
            "Take two states of one model."
        )
    difference = second.float() - first.float()
    if not bool(difference.isfinite().all()):
        raise CheckpointError(
            f"{name}: must hold finite numbers, got others. Take states from before a run went wrong."
        )
    return difference


def _nearest(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    smaller = min(difference.shape)
    if smaller <= _FULL_SVD_SIZE or smaller < 8 * rank:
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(
                difference, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS
            )
        right = columns.T
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
