"""The bits of tensors as integers: closed forms of the sums, and that turns have every byte once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aiprod_ds.train.replicas.sums import as_integers, is_aligned, is_dense, share_out, sum_of_each

_MODULUS = 2**64
_TENSORS = {
    "fp32": torch.linspace(-3, 7, 35).reshape(7, 5),
    "bf16": torch.linspace(0, 1, 13).to(torch.bfloat16),
    "fp16": torch.linspace(0, 1, 4).to(torch.float16),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor([-1, 2**62, 2**62, 2**62]),
    "scalar": torch.tensor(1.0),
    "empty": torch.zeros(0),
    "channels last": torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "large": torch.arange(2**20, dtype=torch.int64),
}


def _sum(tensor: Tensor, *, by_words: bool = True) -> int:
    (found,) = sum_of_each([as_integers(tensor, by_words=by_words)], device=torch.device("cpu")).tolist()
    return int(found)


def _by_hand(tensor: Tensor) -> int:
    """Returns the sum of the words and of the bytes that are left, by Python's integers."""
    data = (
        tensor.numpy().tobytes()
        if tensor.dtype is not torch.bfloat16
        else tensor.view(torch.int16).numpy().tobytes()
    )
    whole = len(data) // 8 * 8
    words = sum(int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(0, whole, 8))
    total = (words + sum(data[whole:])) % _MODULUS
    return total - _MODULUS if total >= _MODULUS // 2 else total


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "bool", "int64", "scalar", "empty", "large"])
def test_a_sum_is_that_of_the_words_and_the_bytes_that_are_left(name: str) -> None:
    assert _sum(_TENSORS[name]) == _by_hand(_TENSORS[name])


def test_worked_numbers() -> None:
    # 1.0 in fp32 is 0x3F800000, so two of them are one word; of a third the bytes are added.
    assert _sum(torch.ones(2)) == 0x3F800000_3F800000
    assert _sum(torch.ones(3)) == 0x3F800000_3F800000 + 0x3F + 0x80
    assert _sum(torch.ones(1), by_words=False) == 0x3F + 0x80
    assert _sum(torch.tensor([2**62, 2**62])) == -(2**63), "it wraps around"


@pytest.mark.parametrize("name", ["fp32", "bf16", "bool", "scalar", "channels last"])
@pytest.mark.parametrize("by_words", [True, False])
def test_any_bit_that_flips_changes_the_sum(name: str, *, by_words: bool) -> None:
    tensor = _TENSORS[name].clone(memory_format=torch.preserve_format)
    before = _sum(tensor, by_words=by_words)
    memory = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    for index in range(memory.numel()):
        for bit in range(8):
            memory[index] ^= 1 << bit
            assert _sum(tensor, by_words=by_words) != before
            memory[index] ^= 1 << bit
    assert _sum(tensor, by_words=by_words) == before


@pytest.mark.parametrize("num_turns", [1, 3, 80, 100_000])
def test_turns_have_every_byte_once_and_add_up(num_turns: int) -> None:
    integers = [as_integers(tensor, by_words=name != "fp16") for name, tensor in _TENSORS.items()]
    turns = share_out(integers, num_turns=num_turns)
    assert len(turns) == num_turns
    covered = [[0] * tensor.nbytes for tensor in _TENSORS.values() if tensor.nbytes < 2**20]
    total, out = 0, torch.zeros((), dtype=torch.int64)
    for turn in turns:
        out.fill_(77)
        turn.sum_into(out)
        total += int(out)
        for index, first, last in turn.touched:
            if index < len(covered):
                covered[index][first:last] = [count + 1 for count in covered[index][first:last]]
    assert all(count == 1 for tensor in covered for count in tensor)
    expected = sum(sum_of_each(integers, device=torch.device("cpu")).tolist())
    assert (total - expected) % _MODULUS == 0


def test_turns_are_as_large_as_one_another() -> None:
    integers = [as_integers(torch.zeros(size), by_words=True) for size in (24, 7000, 2, 10_000)]
    sizes = [
        sum(last - first for _, first, last in turn.touched) for turn in share_out(integers, num_turns=80)
    ]
    # A tensor may put off a word to the next turn.
    assert max(sizes) - min(sizes) <= 8 * len(integers)


def test_the_example() -> None:
    integers = [as_integers(torch.zeros(size, dtype=torch.int64), by_words=True) for size in (3, 2)]
    touched = [turn.touched for turn in share_out(integers, num_turns=5)]
    assert touched == [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 24)], [(1, 0, 8)], [(1, 8, 16)]]


def test_what_fills_its_memory_and_what_does_not() -> None:
    whole = torch.zeros(4, 6)
    assert is_dense(whole)
    assert is_dense(whole.t())
    assert is_dense(whole[1:3])
    assert is_dense(torch.arange(5).expand(1, -1))
    assert not is_dense(whole[:, :3])
    assert not is_dense(torch.zeros(1).expand(4))
    assert is_aligned(whole[1:])
    assert not is_aligned(whole.flatten()[1:])
