"""A bit that flips on one rank is found within 100 updates, with rank and tensor; healthy ranks never differ,
and train bit for bit as without the comparison.

One call runs all cases of so many ranks and returns what each rank found; the tests below only read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import EmaConfig, OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.optim.ema import Ema
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import UnevenBlock, deepspeed_engine
from aiprod_ds.train.replicas.check import WITHIN_UPDATES, ReplicaCheck
from aiprod_ds.train.state import TrainState

WIDTH, HEALTHY_UPDATES, FLIPS_AFTER = 6, 300, 7
COMPARED_UPDATES = 50  # with those of a run that compares nothing
SHORT = {"num_turns": 6, "turns_of_vote": 2}
# Of a short cycle: 6 turns, 2 until it is sent, 2 until it is read.
WITHIN_SHORT = 10
IN_A_BLOCK, FROZEN, BUFFER = "blocks.1.up.weight", "frozen.weight", "table"
FLIPS: dict[str, dict[str, Any]] = {
    "frozen weight, ZeRO-1, default": {"stage": 1, "kind": "weight", "name": FROZEN, "check": {}},
    "buffer, ZeRO-1, default": {"stage": 1, "kind": "buffer", "name": BUFFER, "check": {}},
    "weight, ZeRO-0, default": {"stage": 0, "kind": "weight", "name": IN_A_BLOCK, "check": {}},
    "weight, ZeRO-0": {"stage": 0, "kind": "weight", "name": "blocks.0.scale"},
    "average, ZeRO-0": {"stage": 0, "kind": "average", "name": IN_A_BLOCK},
    "weight, ZeRO-0, bf16": {"stage": 0, "precision": "bf16", "kind": "weight", "name": FROZEN},
    "master, ZeRO-0, bf16": {"stage": 0, "precision": "bf16", "kind": "master", "name": IN_A_BLOCK},
    "buffer, ZeRO-3": {"stage": 3, "kind": "buffer", "name": BUFFER},
}
MORE_FLIPS: dict[str, dict[str, Any]] = {
    f"{kind}, ZeRO-{stage}, {precision}": {"stage": stage, "precision": precision, "kind": kind, "name": name}
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for kind, name in (("weight", FROZEN), ("buffer", BUFFER))
    if not (stage == 3 and kind == "weight")
}
BEFORE_SAVES = {"ZeRO-1": 1, "ZeRO-2": 2}
OF_THREE = ("frozen weight, ZeRO-1, default", "weight, ZeRO-0", "average, ZeRO-0", "buffer, ZeRO-3")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def found() -> dict[str, list[Any]]:
    """What each of two ranks found, by case."""
    return _on_ranks(measure_two, 2)


@pytest.fixture(scope="session")
def found_of_three() -> dict[str, list[Any]]:
    return _on_ranks(measure_three, 3)


@pytest.fixture(scope="session")
def found_more() -> dict[str, list[Any]]:
    return _on_ranks(measure_more, 3)


def _on_ranks(measure: Callable[..., Any], ranks: int) -> dict[str, list[Any]]:
    each = run_on_ranks(measure, ranks=ranks, timeout_seconds=600)
    return {name: [own[name] for own in each] for name in each[0]}


@pytest.mark.parametrize("case", FLIPS)
def test_a_flipped_bit_of_one_of_two_ranks_is_found(found: dict[str, list[Any]], case: str) -> None:
    _require_found(found[case], FLIPS[case], ranks=[0, 1])  # nothing tells which


@pytest.mark.parametrize("case", OF_THREE)
def test_of_three_ranks_the_one_is_named(found_of_three: dict[str, list[Any]], case: str) -> None:
    _require_found(found_of_three[case], FLIPS[case], ranks=[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MORE_FLIPS)
def test_a_flipped_bit_is_found_at_every_stage(found_more: dict[str, list[Any]], case: str) -> None:
    _require_found(found_more[case], MORE_FLIPS[case], ranks=[1])


def _require_found(told: list[Any], case: dict[str, Any], *, ranks: list[int]) -> None:
    assert all(each == told[0] for each in told), "all ranks tell the same"
    assert told[0]["after"] is not None, "it is found"
    assert told[0]["after"] <= (WITHIN_UPDATES if case.get("check") == {} else WITHIN_SHORT)
    words = {"weight": "weight", "average": "average of", "master": "fp32 master of", "buffer": "buffer"}
    # What else differs by then: a master is cast into its weight, and both change the average.
    assert f"{words[case['kind']]} {case['name']}" in told[0]["tensors"]
    if case["kind"] in {"buffer", "average"} or case["name"] == FROZEN:
        assert told[0]["tensors"] == [f"{words[case['kind']]} {case['name']}"]
    assert told[0]["ranks"] == ranks


@pytest.mark.parametrize("case", BEFORE_SAVES)
def test_what_a_save_would_hold_is_compared_before_and_the_master_judges(
    found: dict[str, list[Any]], case: str
) -> None:
    for told in found[f"before a save, {case}"]:
        assert told["before"] is None
        assert told["tensors"] == [f"weight {IN_A_BLOCK}"]
        assert told["ranks"] == [1], "of two ranks, too: its weight is no cast of the master"
        assert told["healed"] is None, "the next update gathers the weights anew"


@pytest.mark.parametrize("stage", [0, 1])
def test_healthy_ranks_never_differ_and_train_as_without(found: dict[str, list[Any]], stage: int) -> None:
    _require_healthy(found[f"healthy, ZeRO-{stage}"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_healthy_ranks_never_differ_at_any_stage(found_more: dict[str, list[Any]], stage: int) -> None:
    _require_healthy(found_more[f"healthy, ZeRO-{stage}"])


def _require_healthy(told: list[Any]) -> None:
    assert [each["alarms"] for each in told] == [0] * len(told)
    assert [each["with"] for each in told] == [each["without"] for each in told], "bitwise"


def test_a_batch_norm_is_left_out_once_and_the_rest_still_compared(found: dict[str, list[Any]]) -> None:
    for told in found["batch norm"]:
        assert told["alarms"] == 0
        assert told["left_out"] == ["norm.running_mean", "norm.running_var"]
        assert told["tensors"] == [f"buffer {BUFFER}"]


def test_an_open_vote_is_read_when_a_phase_ends(found: dict[str, list[Any]]) -> None:
    for told in found["phase end"]:
        assert told == {"looks": [None, None], "end": [f"weight {FROZEN}"]}


def test_weights_that_are_alike_again_are_told_by_what_lay_in_the_sum(found: dict[str, list[Any]]) -> None:
    for told in found["healed"]:
        assert f"weight {IN_A_BLOCK}" in told["tensors"]
        assert not told["lasts"]


def test_tensors_of_other_sizes_on_a_rank_are_left_out(found: dict[str, list[Any]]) -> None:
    for told in found["other sizes"]:
        assert told["alarms"] == 0
        assert told["tensors"] == [f"buffer {BUFFER}"]


# Below runs on the ranks.


class Model(nn.Module):
    """Blocks that become flat, a frozen layer, a buffer that nothing writes, and a batch norm if wanted."""

    def __init__(self, *, has_norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([UnevenBlock(WIDTH) for _ in range(3)])
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("table", torch.linspace(-1, 1, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH, affine=False) if has_norm else nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.norm(values) + self.table.to(values.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = self.frozen(hidden)
        return result


@contextmanager
def training(
    stage: int, precision: str = "fp32", *, has_norm: bool = False, has_average: bool = False
) -> Iterator[tuple[TrainState, Callable[[], None]]]:
    """Yields what is trained, and a function that trains one update of it."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        values[precision] = {"enabled": True}
    with deepspeed_engine(
        Model(has_norm=has_norm),
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings(values, "test"),
        micro_batch_size=4,
    ) as engine:
        engine.set_learning_rate(1e-3)
        engine.train()
        ema = Ema(engine, EmaConfig(half_life_samples=100)) if has_average else None
        updates = 0

        def train() -> None:
            nonlocal updates
            torch.manual_seed(1000 * engine.rank + updates)
            inputs = torch.randn(4, WIDTH).to(engine.compute_dtype)
            engine.backward(engine(inputs).float().square().mean())
            assert engine.step().applied
            if ema is not None:
                ema.update(samples_before=4 * updates, samples_after=4 * updates + 4)
            updates += 1

        yield TrainState(engine=engine, ema=ema), train


def flip(state: TrainState, kind: str, name: str, *, on_rank: int = 1) -> None:
    """Flips a bit of the last element of a tensor in one rank's memory; no operation of torch writes it."""
    if dist.rank() != on_rank:
        return
    averages = [] if state.ema is None else state.ema.replicas()
    held = [(replica.kind, replica.tensor, replica.slices) for replica in state.engine.replicas()]
    held += [("average", tensor, slices) for tensor, slices in averages]
    ((tensor, piece),) = [
        (tensor, piece)
        for found, tensor, slices in held
        for piece in slices
        if (found, piece.name) == (kind, name)
    ]
    last = tensor.storage_offset() + piece.offset + piece.length - 1
    memory = tensor.data.as_strided((1,), (1,), last).view(torch.uint8)
    memory[memory.numel() // 2] ^= 4


def measure_two() -> dict[str, Any]:
    measured: dict[str, Any] = {name: updates_until_found(case) for name, case in FLIPS.items()}
    measured |= {f"before a save, {name}": before_a_save(stage) for name, stage in BEFORE_SAVES.items()}
    measured |= {f"healthy, ZeRO-{stage}": healthy(stage) for stage in (0, 1)}
    measured |= {"batch norm": batch_norm(), "phase end": phase_end(), "healed": healed()}
    return measured | {"other sizes": other_sizes()}


def measure_three() -> dict[str, Any]:
    return {name: updates_until_found(FLIPS[name]) for name in OF_THREE}


def measure_more() -> dict[str, Any]:
    measured: dict[str, Any] = {name: updates_until_found(case) for name, case in MORE_FLIPS.items()}
    return measured | {f"healthy, ZeRO-{stage}": healthy(stage) for stage in (0, 1, 2, 3)}


def updates_until_found(case: dict[str, Any]) -> dict[str, Any]:
    has_average = case["kind"] == "average"
    with training(case["stage"], case.get("precision", "fp32"), has_average=has_average) as (state, train):
        check = ReplicaCheck(is_on=True, **case.get("check", SHORT))
        check.begin(state)
        for update in range(1, FLIPS_AFTER + WITHIN_UPDATES + 1):
            train()
            found = check.look()
            if found is not None:
                told = {"tensors": list(found.tensors), "ranks": list(found.ranks), "lasts": found.lasts}
                return {"after": update - FLIPS_AFTER, **told}
            if update == FLIPS_AFTER:
                flip(state, case["kind"], case["name"])
    return {"after": None}


def before_a_save(stage: int) -> dict[str, Any]:
    with training(stage) as (state, train):
        check = ReplicaCheck(is_on=True)
        check.begin(state)
        train()
        before = check.look_at_all(state)
        flip(state, "weight", IN_A_BLOCK)
        found = check.look_at_all(state)
        train()
        healed_by_update = check.look_at_all(state)
        assert found is not None
        tensors, ranks = list(found.tensors), list(found.ranks)
        return {"before": before, "tensors": tensors, "ranks": ranks, "healed": healed_by_update}


def healthy(stage: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"alarms": 0}
    for name, is_on in (("with", True), ("without", False)):
        with training(stage, has_average=True) as (state, train):
            check = ReplicaCheck(is_on=is_on)
            check.begin(state)
            for update in range(1, HEALTHY_UPDATES + 1):
                train()
                measured["alarms"] += check.look() is not None
                if update % COMPARED_UPDATES == 0:
                    measured["alarms"] += check.look_at_all(state) is not None
                if update == COMPARED_UPDATES:
                    measured[name] = digest_of(state)
                    if not is_on:
                        break
            measured["alarms"] += check.end() is not None
    return measured


def digest_of(state: TrainState) -> str:
    digest = hashlib.sha256()
    for tensor in (*state.engine.capture().tensors, torch.rand(1)):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batch_norm() -> dict[str, Any]:
    with training(1, has_norm=True) as (state, train):
        check, alarms = ReplicaCheck(is_on=True, **SHORT), 0
        check.begin(state)
        for _ in range(3 * WITHIN_SHORT):
            train()
            alarms += check.look() is not None
        check.end()
        alarms += check.look_at_all(state) is not None
        left_out = sorted(check._unlike)
        check.begin(state)  # another phase
        for _ in range(3 * WITHIN_SHORT):
            train()
            alarms += check.look() is not None
        flip(state, "buffer", BUFFER)
        return {"alarms": alarms, "left_out": left_out, "tensors": _first_found(check, train)}


def phase_end() -> dict[str, Any]:
    with training(1) as (state, train):
        check = ReplicaCheck(is_on=True, num_turns=1, turns_of_vote=2)
        check.begin(state)
        flip(state, "weight", FROZEN)
        looks = []
        for _ in range(2):
            train()
            looks.append(check.look())
        end = check.end()
        assert end is not None
        return {"looks": looks, "end": list(end.tensors)}


def healed() -> dict[str, Any]:
    with training(1) as (state, train):
        check = ReplicaCheck(is_on=True, num_turns=1, turns_of_vote=1)
        check.begin(state)
        train()
        flip(state, "weight", IN_A_BLOCK)
        assert check.look() is None, "sent, not read"
        train()
        found = check.look()
        assert found is not None
        return {"tensors": list(found.tensors), "lasts": found.lasts}


def other_sizes() -> dict[str, Any]:
    with training(1) as (state, train):
        state.engine.module.register_buffer("cache", torch.zeros(dist.rank() + 1))
        check = ReplicaCheck(is_on=True, **SHORT)
        check.begin(state)
        alarms = 0
        for _ in range(2 * WITHIN_SHORT):
            train()
            alarms += check.look() is not None
        flip(state, "buffer", BUFFER)
        return {"alarms": alarms, "tensors": _first_found(check, train)}


def _first_found(check: ReplicaCheck, train: Callable[[], None]) -> list[str] | None:
    for _ in range(WITHIN_SHORT):
        train()
        found = check.look()
        if found is not None:
            return list(found.tensors)
    return None
