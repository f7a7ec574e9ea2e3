"""The bits of tensors as integers, and their sum: of all of a tensor, or of a part of many at every turn.

A sum is of 64-bit integers and wraps around, so a single bit that flips anywhere always changes it, and
nothing is rounded. Owns which bytes belong to which turn. Reads only; no collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORD = 8
# Words. Smaller parts are put together first: a kernel for each would cost the host more than the copy costs
# the device. Larger ones are not copied.
_LARGE = 2**19
_BYTES_AT_ONCE = 2**24  # bytes are widened to words before they are summed


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor fills one range of memory, each element once."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return tensor.layout is torch.strided and tuple(like.stride()) == tuple(tensor.stride())


def is_aligned(tensor: Tensor) -> bool:
    """Returns whether the memory of a tensor can be read as words."""
    return int(tensor.storage_offset()) * tensor.element_size() % _WORD == 0


def as_integers(tensor: Tensor, *, by_words: bool) -> list[Tensor]:
    """Returns the memory of a dense tensor as integers, not copied: int64 words and the bytes that are left,
    or all as uint8."""
    if tensor.numel() == 0:
        return []
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    num_words = flat.numel() // _WORD if by_words else 0
    views = [flat[: num_words * _WORD].view(torch.int64)] if num_words else []
    rest = flat[num_words * _WORD :]
    return [*views, rest] if rest.numel() else views


@dataclass(slots=True)
class Turn:
    """The parts of tensors that are summed at one update.

    Attributes:
        touched: Of which tensors, by index, and from which byte to which.
    """

    touched: list[tuple[int, int, int]] = field(default_factory=list)
    _large: list[Tensor] = field(default_factory=list)
    _small: list[Tensor] = field(default_factory=list)
    _bytes: list[Tensor] = field(default_factory=list)

    def add(self, part: Tensor, *, index: int, first_byte: int) -> None:
        """Takes a part of the integers of tensor `index`."""
        last = first_byte + part.numel() * part.element_size()
        self.touched.append((index, first_byte, last))
        if part.dtype is torch.uint8:
            self._bytes.append(part)
        else:
            (self._large if part.numel() > _LARGE else self._small).append(part)

    def sum_into(self, out: Tensor) -> None:
        """Sets `out`, 0-dim int64, to the sum of all parts; nobody waits for the device."""
        sums = [part.sum() for part in self._large]
        if self._small:
            sums.append(_joined(self._small).sum())
        if self._bytes:
            sums.append(_byte_sum(_joined(self._bytes)))
        if len(sums) == 1:
            out.copy_(sums[0])
        elif sums:
            torch.sum(torch.stack(sums), dim=0, out=out)
        else:
            out.zero_()


def share_out(integers: Sequence[Sequence[Tensor]], *, num_turns: int) -> list[Turn]:
    """Returns turns that together have every byte once, each as many as any other to within a word a tensor.

    Example: two tensors of 24 and 16 bytes in 5 turns: the words of the first are turns 0 to 2, those of the
    second 3 and 4.

    Args:
        integers: Of each tensor, as `as_integers` has them.
        num_turns: At least 1.
    """
    turns = [Turn() for _ in range(num_turns)]
    total = sum(view.numel() * view.element_size() for views in integers for view in views)
    bounds = [total * number // num_turns for number in range(num_turns + 1)]
    begin, number = 0, 0
    for index, views in enumerate(integers):
        first_byte = 0  # of this tensor
        for view in views:
            size = view.element_size()
            done = 0
            while done < view.numel():
                while bounds[number + 1] <= begin + done * size:
                    number += 1
                # An element belongs to the turn in which it begins.
                end = min(view.numel(), -(-(bounds[number + 1] - begin) // size))
                turns[number].add(view[done:end], index=index, first_byte=first_byte + done * size)
                done = end
            begin += view.numel() * size
            first_byte += view.numel() * size
    return turns


def sum_of_each(integers: Sequence[Sequence[Tensor]], *, device: torch.device) -> Tensor:
    """Returns the sum of each tensor's integers, int64."""
    sums = torch.zeros(len(integers), dtype=torch.int64, device=device)
    for index, views in enumerate(integers):
        for view in views:
            sums[index] += _byte_sum(view) if view.dtype is torch.uint8 else view.sum()
    return sums


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _byte_sum(view: Tensor) -> Tensor:
    parts = torch.split(view, _BYTES_AT_ONCE)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()
