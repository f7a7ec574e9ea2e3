"""Where parameters lie in a flat one: their order, their alignment, and what a range of it holds of each.

Owns the arithmetic, on names and sizes alone; no tensors. `flat_parameters` makes flat parameters by
it, and the DeepSpeed engine finds in its shards of them what belongs to which parameter.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from aiprod_ds.snapshot import ShardSlice

# Elements. Kernels for matrices want weights at multiples of 16 bytes, torch allocates at multiples of 512.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatMember:
    """One parameter in a flat one.

    Attributes:
        name: As `named_parameters()` of a module without flat parameters has it.
        shape: Of the parameter.
        numel: Its elements.
        start: Of its first element in the flat one.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """What lies in one flat parameter, in ascending order; between the members is padding, which is always 0.

    Attributes:
        name: Of the flat parameter in `named_parameters()`.
        members: At least one.
        numel: Elements with the padding.
    """

    name: str
    members: tuple[FlatMember, ...]
    numel: int

    def pieces(self) -> tuple[list[int], list[int]]:
        """Returns the sizes of members and paddings in order, without paddings of 0, and the indices of the
        members among them."""
        sizes: list[int] = []
        places: list[int] = []
        ends = [*(member.start for member in self.members[1:]), self.numel]
        for member, end in zip(self.members, ends, strict=True):
            places.append(len(sizes))
            padding = end - member.start - member.numel
            sizes.extend([member.numel, padding] if padding else [member.numel])
        return sizes, places


def lay_out(name: str, shapes: Iterable[tuple[str, Sequence[int]]]) -> FlatLayout:
    """Returns the layout of parameters in a flat one, each at a multiple of `ALIGNMENT`.

    Example: shapes [3] and [2, 40] begin at 0 and 64, and the whole has 192 elements.

    Args:
        name: Of the flat parameter.
        shapes: Name and shape of each member, in order.
    """
    members, end = [], 0
    for member, shape in shapes:
        numel = _product(shape)
        members.append(FlatMember(name=member, shape=tuple(shape), numel=numel, start=end))
        end += -(-numel // ALIGNMENT) * ALIGNMENT
    return FlatLayout(name=name, members=tuple(members), numel=end)


def in_runs(sizes: Sequence[int], *, limit: int) -> Iterator[range]:
    """Yields ranges of neighbours whose sizes sum to at most `limit`; one that is larger stands alone.

    Example: sizes 3, 3, 9, 1 with a limit of 7 give the ranges 0-1, 2 and 3.
    """
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield range(first, index)
            first, total = index, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def member_slices(slices: Iterable[ShardSlice], layouts: Mapping[str, FlatLayout]) -> tuple[ShardSlice, ...]:
    """Returns what a shard holds of the members of flat parameters, given what it holds of these.

    Example: elements 60 to 70 of the layout in `lay_out`, at offset 5 of the shard, are elements 0 to 6 of
    the second member at offset 9; the four before it are padding.

    Args:
        slices: Of a shard; those of parameters that are not flat come back as they are.
        layouts: By the name of the flat parameter.
    """
    found: list[ShardSlice] = []
    for part in slices:
        layout = layouts.get(part.name)
        found.extend([part] if layout is None else _cut(part, layout))
    return tuple(found)


def member_names(names: Iterable[str], layouts: Mapping[str, FlatLayout]) -> tuple[str, ...]:
    """Returns `names` with those of the members in place of each flat parameter's."""
    found: list[str] = []
    for name in names:
        layout = layouts.get(name)
        found.extend([name] if layout is None else [member.name for member in layout.members])
    return tuple(found)


def _cut(part: ShardSlice, layout: FlatLayout) -> Iterator[ShardSlice]:
    end = part.start + part.length
    first = bisect.bisect_right(layout.members, part.start, key=lambda member: member.start) - 1
    for member in layout.members[first:]:
        if member.start >= end:
            return
        begins = max(part.start, member.start)
        ends = min(end, member.start + member.numel)
        if begins < ends:
            yield ShardSlice(
                name=member.name,
                start=begins - member.start,
                offset=part.offset + begins - part.start,
                length=ends - begins,
            )


def _product(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
