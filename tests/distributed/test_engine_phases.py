"""What a curriculum does to a live engine: batch, weight decay, moments and activation checkpointing change
between updates.

One call runs one story on two ranks for every settings file that ships, and once on one process with
`LocalEngine`, the oracle, which takes every global batch as one micro-batch. The tests below only read the
measurements. What does not change inside a run is in tests/distributed/test_engine.py.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine, UpdateResult
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import UnevenBlock, deepspeed_engine, distance, is_same_state, optimized_state
from aiprod_ds.testing.tiny import two_width_ltx_vae
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
# Every stage, every precision, with offload and without; the others in `make test-all`.
FEW = {
    "zero0_fp32",
    "zero0_bf16",
    "zero1_fp16_v100",
    "zero2_fp32",
    "zero2_bf16_offload",
    "zero3_fp32",
    "zero3_bf16",
    "zero3_fp16_v100_offload",
}
CASES = [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES]
RANKS = 2
STAGES = range(4)
MODELS = ("plain", "diffusers")
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, weight_decay=0.1)

# As in tests/distributed/test_engine.py, which says why: largest difference of losses and of gradient norms
# to the oracle, and distance of the final parameters over the distance that training moved them.
# Measured: fp32 3e-8, 1e-7, 3e-7; bf16 1.4e-4, 7e-4, 0.015; fp16 1.5e-5, 1.4e-4, 6e-4 on one CPU and 5e-3 on
# another.
TOLERANCES = {"fp32": (1e-6, 1e-6, 2e-6), "bf16": (5e-4, 3e-3, 0.04), "fp16": (1e-4, 1e-3, 8e-3)}

pytestmark = pytest.mark.dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Updates of one shape; the changes come before the first of them."""

    micro_batch_size: int
    accumulation: int
    updates: int = 2
    weight_decay: float = 0.1
    moments: float = 1.0
    is_poisoned: bool = (
        False  # one more update at the end, not finite on rank 1, and so skipped: the next phase follows it
    )


STORY = (
    Phase(micro_batch_size=4, accumulation=1),
    Phase(micro_batch_size=2, accumulation=2),
    Phase(micro_batch_size=1, accumulation=4, is_poisoned=True),
    Phase(
        micro_batch_size=2, accumulation=2, weight_decay=2.0, moments=0.25
    ),  # the global batch stays 8 up to here
    Phase(micro_batch_size=3, accumulation=2, weight_decay=0.0),
    Phase(micro_batch_size=2, accumulation=1, weight_decay=1.0, moments=0.0),
    Phase(micro_batch_size=4, accumulation=1),
)
SAVED_AT = {"decayed": 3, "reset": 5}  # the phase whose changes are made when the state is saved


@pytest.fixture(scope="module")
def measured(wanted: Callable[[str], list[str]]) -> dict[str, Any]:
    results: list[dict[str, Any]] = run_on_ranks(
        measure_everything, ranks=RANKS, arguments={"names": wanted("name")}, timeout_seconds=600
    )
    assert results[0]["switching"] == results[1]["switching"]
    return results[0]


@pytest.mark.parametrize("name", CASES)
def test_a_curriculum_equals_the_local_engine(measured: dict[str, Any], name: str) -> None:
    loss, norm, parameter = TOLERANCES[_precision(name)]
    case = measured["cases"][name]
    assert case["applied_as_oracle"], "every update but the poisoned one"
    assert case["loss_difference"] <= loss
    assert case["norm_difference"] <= norm
    assert case["parameter_difference"] <= parameter
    assert case["loss_scales_equal"]
    assert case["steps"] == [sum(phase.updates for phase in STORY[SAVED_AT["reset"] :])], (
        "the count began anew at the reset"
    )


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("left_out", ["weight_decay", "moments"])
def test_the_oracle_notices_what_is_left_out(measured: dict[str, Any], precision: str, left_out: str) -> None:
    assert measured["left_out"][precision][left_out] > 2 * TOLERANCES[precision][2], (
        "else the comparison above shows nothing"
    )


@pytest.mark.parametrize("name", CASES)
def test_a_change_inside_a_window_is_refused_and_harms_nothing(measured: dict[str, Any], name: str) -> None:
    # The story tries it in every window; that nothing is harmed is the comparison with the oracle.
    assert measured["cases"][name]["refused"] == [
        "between updates, got 1 of 2",
        "between updates, got 1 of 4",
    ]


@pytest.mark.parametrize("saved", SAVED_AT)
@pytest.mark.parametrize("name", CASES)
def test_resume_after_a_change_is_bitwise(measured: dict[str, Any], name: str, saved: str) -> None:
    # The new engine is given another weight decay than the file holds, before it loads. The state of 6
    # updates is also one that DeepSpeedCPUAdam does not take up bitwise by itself (tests/upstream).
    assert measured["cases"][name]["resumed"][saved] == {"records": True, "states": True}


@pytest.mark.parametrize("name", CASES)
def test_a_reset_engine_goes_on_like_a_new_one(measured: dict[str, Any], name: str) -> None:
    assert measured["cases"][name]["reset_equals_new"]


@pytest.mark.parametrize("name", CASES)
def test_a_factor_of_one_changes_nothing(measured: dict[str, Any], name: str) -> None:
    assert measured["cases"][name]["kept"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_switching_activation_checkpointing_changes_no_bit(
    measured: dict[str, Any], stage: int, model: str
) -> None:
    case = measured["switching"][model][stage]
    assert case["records_equal"]
    assert case["states_equal"]
    assert case["recomputed"] == SWITCHES, "otherwise nothing was switched"


@pytest.mark.parametrize("model", MODELS)
def test_switching_under_zero_3_leaves_no_modules_on_the_global_list(
    measured: dict[str, Any], model: str
) -> None:
    assert max(measured["switching"][model][3]["forward_stack"]) <= 1


def _precision(name: str) -> str:
    return name.split("_")[1]


# Below runs on the ranks.

SWITCHES = [False, True, True, False, True, False]


class Net(nn.Module):
    clip = (3, 2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.blocks = nn.ModuleList(UnevenBlock(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, video: Tensor) -> Tensor:
        hidden = self.frozen(self.norm(self.convolution(video).movedim(1, -1)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).movedim(-1, 1)


class Autoencoder(nn.Module):
    clip = (3, 5, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        from diffusers import AutoencoderKLLTXVideo

        self.vae = AutoencoderKLLTXVideo(**two_width_ltx_vae())

    def forward(self, video: Tensor) -> Tensor:
        output: Tensor = self.vae(video).sample
        return output


def measure_everything(names: Sequence[str]) -> dict[str, Any]:
    import diffusers  # noqa: F401  # before the freeze
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    # every engine that closes collects garbage, and all that is imported would be looked through again
    gc.freeze()
    oracles = {precision: _oracle(precision, STORY) for precision in TOLERANCES}
    return {
        "cases": {name: _measure(FILES[NAMES.index(name)], oracles[_precision(name)]) for name in names},
        "left_out": {precision: _measure_left_out(precision, oracles[precision]) for precision in TOLERANCES},
        "switching": {model: [_measure_switching(model, stage) for stage in STAGES] for model in MODELS},
    }


def _oracle(precision: str, story: tuple[Phase, ...]) -> dict[str, Any]:
    module = _module(0)
    path = FILES[NAMES.index(f"zero2_{'fp16_v100' if precision == 'fp16' else precision}")]
    engine = LocalEngine(
        module, decay_groups(module), optimizer=OPTIMIZER, settings=_settings(path), micro_batch_size=8, accumulation=1  # noqa: E501
    )  # fmt: skip
    start = engine.module_state()
    return {"records": _live(engine, story), "module": engine.module_state(), "start": start}


def _measure_left_out(precision: str, oracle: dict[str, Any]) -> dict[str, float]:
    """Returns how far a story without the changes of one kind ends from the oracle, as `parameter_difference`
    does."""
    found = {}
    for name, value in (("weight_decay", OPTIMIZER.weight_decay), ("moments", 1.0)):
        story = tuple(replace(phase, **{name: value}) for phase in STORY)
        found[name] = _relative_distance(_oracle(precision, story)["module"], oracle)
    return found


def _measure(path: Path, oracle: dict[str, Any]) -> dict[str, Any]:
    refused: list[str] = []
    with _folder() as folder, _engine(path) as engine:
        records = _live(engine, STORY, refused=refused, folder=folder)
        states, module = optimized_state(engine), engine.module_state()
        engine.scale_moments(1.0)
        kept = is_same_state(states, optimized_state(engine))
        resumed = {
            name: _measure_resume(path, folder / name, first, records, states)
            for name, first in SAVED_AT.items()
        }
    expected = oracle["records"]
    finite = [
        pair for pair in zip(records, expected, strict=True) if pair[0].is_applied and pair[1].is_applied
    ]
    return {
        "applied_as_oracle": [record.is_applied for record in records]
        == [record.is_applied for record in expected],
        "loss_difference": max(abs(a.loss - b.loss) for a, b in finite),
        "norm_difference": max(abs(a.norm - b.norm) for a, b in finite),
        "loss_scales_equal": [record.loss_scale for record in records]
        == [record.loss_scale for record in expected],
        "parameter_difference": _relative_distance(module, oracle) if dist.is_main() else 0.0,
        "steps": sorted({state["step"] for state in states.values()}),
        "refused": sorted(set(refused)),
        "kept": kept,
        "resumed": resumed,
        "reset_equals_new": _measure_reset(path),
    }


def _measure_resume(
    path: Path, folder: Path, first: int, records: list[Record], states: dict[str, Any]
) -> dict[str, bool]:
    with _engine(path, seed=1) as engine:
        engine.set_weight_decay(STORY[first].weight_decay)
        read_engine(folder, engine)
        again = _live(engine, STORY, first=first, is_resumed=True)
        return {
            "records": again == records[len(records) - len(again) :],
            "states": is_same_state(states, optimized_state(engine)),
        }


def _measure_reset(path: Path) -> bool:
    """Compares a new engine with one that is reset after updates at a learning rate of 0, which leave its
    weights alone."""
    phase = Phase(micro_batch_size=4, accumulation=1, updates=2)
    outcomes = []
    for updates_before in (0, 3):
        with _engine(path, loss_scale_window=1000) as engine:
            for update in range(updates_before):
                _update(engine, phase, 100 + update)  # no learning rate was set
            engine.scale_moments(0.0)
            outcomes.append((_live(engine, (phase,)), optimized_state(engine)))
    return outcomes[0][0] == outcomes[1][0] and is_same_state(outcomes[0][1], outcomes[1][1])


def _measure_switching(model: str, stage: int) -> dict[str, Any]:
    from deepspeed.runtime.zero import parameter_offload

    path = FILES[NAMES.index(f"zero{stage}_fp32")]
    build = {"plain": Net, "diffusers": Autoencoder}[model]
    outcomes: list[tuple[list[Record], dict[str, Any]]] = []
    stack: list[int] = []
    recomputed: list[bool] = []
    for switches in ([False] * len(SWITCHES), SWITCHES):
        torch.manual_seed(0)
        module = build()
        forwards = _count_forwards(module)
        with _engine(path, module=module) as engine:
            records = []
            for update, is_on in enumerate(switches):
                set_recompute(module, enabled=is_on)
                phase = Phase(micro_batch_size=1, accumulation=1 + update % 2)
                engine.set_batch(micro_batch_size=1, accumulation=phase.accumulation)
                engine.set_learning_rate(1e-2)
                forwards.clear()
                records.append(_update(engine, phase, update))
                recomputed.append(len(forwards) > phase.accumulation)
                stack.append(len(parameter_offload.FWD_MODULE_STACK))
            outcomes.append((records, optimized_state(engine)))
    (plain, plain_states), (switched, switched_states) = outcomes
    return {
        "records_equal": plain == switched,
        "states_equal": is_same_state(plain_states, switched_states),
        "recomputed": recomputed[len(SWITCHES) :],
        "forward_stack": stack,
    }


def _count_forwards(module: nn.Module) -> list[None]:
    """Returns a list that grows with every forward of one part that is recomputed."""
    part = module.blocks[0].up if isinstance(module, Net) else module.vae.encoder.mid_block.resnets[0].conv1
    forwards: list[None] = []
    part.register_forward_pre_hook(lambda *_: forwards.append(None))
    return forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One update, the same on all ranks."""

    loss: float
    norm: float
    loss_scale: float
    is_applied: bool


def _live(
    engine: Engine,
    story: tuple[Phase, ...],
    *,
    first: int = 0,
    is_resumed: bool = False,
    refused: list[str] | None = None,
    folder: Path | None = None,
) -> list[Record]:
    """Lives through the phases from `first` on; a resumed engine has its moments and weight decay already."""
    records = []
    update = sum(phase.updates + phase.is_poisoned for phase in story[:first])
    for index, phase in enumerate(story[first:], start=first):
        if not (is_resumed and index == first):
            engine.scale_moments(phase.moments)
            for name in (
                name for name, saved_at in SAVED_AT.items() if folder is not None and saved_at == index
            ):
                _save(engine, folder / name)
            engine.set_weight_decay(phase.weight_decay)
        engine.set_batch(**_shape(engine, phase))
        for last in [False] * phase.updates + [True] * phase.is_poisoned:
            engine.set_learning_rate(1e-2 / (1 + update % 3))
            records.append(_update(engine, phase, update, is_poisoned=last, refused=refused))
            update += 1
    return records


def _save(engine: Engine, folder: Path) -> None:
    if dist.is_main():
        folder.mkdir()
    dist.barrier()
    write_engine(folder, engine)


def _shape(engine: Engine, phase: Phase) -> dict[str, int]:
    if engine.world_size > 1:
        return {"micro_batch_size": phase.micro_batch_size, "accumulation": phase.accumulation}
    return {"micro_batch_size": phase.micro_batch_size * phase.accumulation * RANKS, "accumulation": 1}


def _update(
    engine: Engine, phase: Phase, update: int, *, is_poisoned: bool = False, refused: list[str] | None = None
) -> Record:
    """Runs one window over this rank's part of the global batch; a poisoned one is not finite in its first
    micro-batch."""
    size = phase.micro_batch_size * phase.accumulation * RANKS
    clips = torch.randn(size, *engine.module.clip, generator=torch.Generator().manual_seed(update))
    losses = []
    result: UpdateResult | None = None
    for micro_batch in clips.chunk(engine.world_size)[engine.rank].split(
        _shape(engine, phase)["micro_batch_size"]
    ):
        loss = (engine(micro_batch.to(engine.compute_dtype)).float() - micro_batch * 0.5).pow(2).mean()
        is_bad = is_poisoned and not losses and engine.rank == engine.world_size - 1
        engine.backward(loss * (float("nan") if is_bad else 1.0))
        losses.append(loss.detach())
        result = engine.step()
        if result is None and len(losses) == 1 and refused is not None:
            refused.append(_refusal(engine))
    assert result is not None
    loss = torch.stack(losses).mean()
    loss = dist.reduce_mean(loss) if engine.world_size > 1 else loss
    norm = float(result.gradient_norm) if result.applied else 0.0
    return Record(loss=loss.item(), norm=norm, loss_scale=result.loss_scale, is_applied=result.applied)


def _refusal(engine: Engine) -> str:
    try:
        engine.set_batch(micro_batch_size=1, accumulation=1)
    except EngineError as error:
        return str(error).removeprefix("set_batch: must be called ").partition(" micro-batches")[0]
    return "no error"


def _engine(
    path: Path, *, seed: int = 0, module: nn.Module | None = None, loss_scale_window: int = 3
) -> AbstractContextManager[Any]:
    built = _module(seed) if module is None else module
    return deepspeed_engine(
        built, optimizer=OPTIMIZER, settings=_settings(path, loss_scale_window), micro_batch_size=4
    )


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    yield folder
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(folder)


def _settings(path: Path, loss_scale_window: int = 3) -> DeepSpeedSettings:
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("activation_checkpointing", None)  # switched by hand here
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = (
            0  # the module is smaller than the usual threshold
        )
    if "fp16" in values:
        # The usual window is so short that the scale doubles in the run.
        values["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": loss_scale_window, "hysteresis": 1}
    return parse_deepspeed_settings(values, path.name)


def _module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def _relative_distance(module: dict[str, Tensor], oracle: dict[str, Any]) -> float:
    """Returns the L2 distance to the oracle's end over the distance that the oracle moved."""
    return distance(module, oracle["module"]) / distance(oracle["start"], oracle["module"])
