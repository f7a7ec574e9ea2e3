"""Where parameters lie in a flat one. The oracle of slices is each element's number."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiprod_ds.engine.flat_layout import ALIGNMENT, in_runs, lay_out, member_names, member_slices
from aiprod_ds.snapshot import ShardSlice


def test_members_begin_at_multiples_of_the_alignment() -> None:
    layout = lay_out("flat", [("a", [3]), ("b", [2, 40]), ("c", [])])
    assert [member.start for member in layout.members] == [0, 64, 192]
    assert [member.numel for member in layout.members] == [3, 80, 1]
    assert [member.shape for member in layout.members] == [(3,), (2, 40), ()]
    assert layout.numel == 256
    assert layout.pieces() == ([3, 61, 80, 48, 1, 63], [0, 2, 4])


def test_pieces_leave_out_paddings_of_0() -> None:
    layout = lay_out("flat", [("a", [64]), ("b", [5]), ("c", [128])])
    assert layout.pieces() == ([64, 5, 59, 128], [0, 1, 3])


def test_an_empty_member_takes_no_place() -> None:
    layout = lay_out("flat", [("a", [0]), ("b", [2])])
    assert layout.pieces() == ([0, 2, 62], [0, 1])
    whole = ShardSlice(name="flat", start=0, offset=0, length=64)
    assert member_slices([whole], {"flat": layout}) == (ShardSlice(name="b", start=0, offset=0, length=2),)


def test_a_range_is_cut_as_in_the_example() -> None:
    layouts = {"flat": lay_out("flat", [("a", [3]), ("b", [2, 40])])}
    part = ShardSlice(name="flat", start=60, offset=5, length=10)
    assert member_slices([part], layouts) == (ShardSlice(name="b", start=0, offset=9, length=6),)


def test_a_range_of_padding_alone_holds_nothing() -> None:
    layouts = {"flat": lay_out("flat", [("a", [3]), ("b", [2, 40])])}
    assert member_slices([ShardSlice(name="flat", start=3, offset=0, length=61)], layouts) == ()


def test_other_parameters_stay_as_they_are() -> None:
    layouts = {"flat": lay_out("flat", [("a", [3])])}
    other = ShardSlice(name="other", start=1, offset=2, length=3)
    assert member_slices([other], layouts) == (other,)
    assert member_names(["x", "flat", "y"], layouts) == ("x", "a", "y")


@pytest.mark.parametrize(
    ("sizes", "limit", "runs"),
    [
        ([3, 3, 9, 1], 7, [[0, 1], [2], [3]]),
        ([], 7, []),
        ([9], 7, [[0]]),
        ([7, 1], 7, [[0], [1]]),
        ([3, 4], 7, [[0, 1]]),
    ],
)
def test_runs_keep_below_the_limit(sizes: list[int], limit: int, runs: list[list[int]]) -> None:
    assert [list(run) for run in in_runs(sizes, limit=limit)] == runs


@given(
    shapes=st.lists(st.lists(st.integers(0, 13), max_size=3), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 10_000), max_size=5),
)
def test_shards_hold_every_element_of_every_member_once(shapes: list[list[int]], cuts: list[int]) -> None:
    layout = lay_out("flat", [(str(index), shape) for index, shape in enumerate(shapes)])
    owners: list[tuple[str, int] | None] = [None] * layout.numel
    for member in layout.members:
        assert member.start % ALIGNMENT == 0
        for index in range(member.numel):
            owners[member.start + index] = (member.name, index)
    edges = sorted({0, layout.numel, *(cut % (layout.numel + 1) for cut in cuts)})
    found: list[tuple[str, int] | None] = [None] * layout.numel
    for start, end in itertools.pairwise(edges):
        shard = ShardSlice(name="flat", start=start, offset=3, length=end - start)
        for part in member_slices([shard], {"flat": layout}):
            assert part.length > 0
            for index in range(part.length):
                place = start + part.offset - 3 + index
                assert found[place] is None
                found[place] = (part.name, part.start + index)
    assert found == owners
