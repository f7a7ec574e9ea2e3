"""No silent slowdown: what an update through the trainer costs stays what it was beside a bare loop, and
every shape is compiled once. Each is shown to fail where something is made slower."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.engine.compiled import set_compiled
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.testing.processes import run_in_own_session
from aiprod_ds.testing.runs import copy_as_if_stopped_at, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train import performance
from aiprod_ds.trainers.video_vae import VideoVAETrainer

_BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
BASELINE: dict[str, Any] = json.loads((_BENCHMARKS / "slowdown_baseline.json").read_text())
# Kinds of blocks; the shapes that are trained, all with gradients; that of the held-out clips, without.
KINDS, TRAINED_SHAPES, EVALUATED_SHAPES = 2, 3, 1
BACKEND = "counting_of_runs"


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    yield
    dist.shutdown()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is dearer than the baseline, by engine, and where the local engine is made slower.

    Found in a process of its own: pytest looks at what its process logs and warns of, by calls of its own.
    """
    found = tmp_path_factory.mktemp("slowdown") / "problems.json"
    command = [sys.executable, __file__, str(found)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(_BENCHMARKS)
    code, output = run_in_own_session(command, timeout_seconds=600, environment=environment)
    assert code == 0, output
    problems: dict[str, list[str]] = json.loads(found.read_text())
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "deepspeed"])
def test_an_update_costs_what_it_did_beside_a_bare_loop(problems: dict[str, list[str]], engine: str) -> None:
    assert problems[engine] == []


@pytest.mark.slow
def test_a_look_at_every_weight_is_found(problems: dict[str, list[str]]) -> None:
    """The slowdown that is made most easily: something is asked of every parameter, and the host waits."""
    found = [problem.partition(" of an update")[0] for problem in problems["slowed"]]
    assert found == [f"local, {name}" for name in ("operations", "reads", "calls", "bytes", "peak bytes")]


@pytest.mark.parametrize("name", BASELINE["ratios"])
def test_each_ratio_has_its_margin(name: str) -> None:
    from slowdown import exceeded, versions

    ratio = BASELINE["ratios"][name]
    margin, other = 1.05, 1.25
    same = {**BASELINE, "versions": versions()}
    others = {**BASELINE, "versions": {**versions(), "torch": "1.0"}}
    assert exceeded({name: 0.999 * margin * ratio}, same) == []
    (problem,) = exceeded({name: 1.001 * margin * ratio}, same)
    assert problem.startswith(f"{name} of an update: must be at most")
    assert exceeded({name: 0.999 * other * ratio}, others) == []
    assert len(exceeded({name: 1.001 * other * ratio}, others)) == 1


def test_the_baseline_has_every_cost_of_every_engine() -> None:
    from slowdown import COUNTS, ENGINES

    assert list(BASELINE["ratios"]) == [f"{engine}, {name}" for engine in ENGINES for name in COUNTS]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(self.strength * hidden)


class ForgetfulGate(Gate):
    """Reads a number that changes at every call, so that torch compiles it for each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden) * (1.0 + 0.0 * self.calls)


class TwoKindsVAE(TinyVideoVAE):
    """Has blocks of a second kind, which decode."""

    def __init__(self, gate: type[Gate]) -> None:
        super().__init__()
        self.gates = nn.ModuleList([gate(), gate()])

    def decode(self, latent: Tensor) -> Tensor:
        # The mean that is evaluated is a part of a larger tensor, with strides of its own.
        latent = latent.clone(memory_format=torch.contiguous_format)
        for gate in self.gates:
            latent = gate(latent)
        return super().decode(latent)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_run_compiles_each_kind_of_block_once_a_shape(tmp_path: Path) -> None:
    """Over training, evaluations inside and between phases, a change of phase, and what is resumed."""
    expected = KINDS * (TRAINED_SHAPES + EVALUATED_SHAPES)
    with _counted_compilations() as compiled:
        _train(tmp_path / "run", Gate)
        assert len(compiled) == expected, compiled
        copy_as_if_stopped_at(3, tmp_path / "run", tmp_path / "copy")
        _train(tmp_path / "copy", Gate)
        assert len(compiled) == expected, "a resumed run finds what the process has compiled"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_block_that_is_compiled_at_every_call_is_found(tmp_path: Path) -> None:
    with _counted_compilations() as compiled:
        _train(tmp_path / "run", ForgetfulGate)
        assert len(compiled) > KINDS * (TRAINED_SHAPES + EVALUATED_SHAPES)


class _counted_compilations:  # noqa: N801  reads as what it is: a context
    def __enter__(self) -> list[Any]:
        torch._dynamo.reset()
        compiled: list[Any] = []

        def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            compiled.append(
                [tuple(value.shape) for value in inputs if isinstance(value, Tensor) and value.dim() == 5]
            )
            return graph.forward

        # A function of its own each time: torch.compile's cache of classes is kept by the backend.
        self._patch = patch.object(performance, "set_compiled", partial(set_compiled, backend=counting))
        self._patch.start()
        return compiled

    def __exit__(self, *_: object) -> None:
        self._patch.stop()
        torch._dynamo.reset()


def _train(folder: Path, gate: type[Gate]) -> None:
    small, large = ({"resolution": f"{side}x{side}", "duration": {"frames": 5}} for side in (16, 24))
    phases = [
        {"name": "low", "buckets": [{**small, "share": 0.5}, {**large, "share": 0.5}], "updates": 8},
        {"name": "high", "resolution": "32x32", "duration": {"frames": 5}, "updates": 4},
    ]
    values = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {
            "phases": [{**phase, "global_batch_size": 2, "learning_rate": 1e-3} for phase in phases]
        },
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "performance": {"compile": "blocks"},
        "checkpoint": {"every_updates": 3},
        "evaluation": {"every_updates": 3, "max_clips": 1, "num_pictures": 0},
    }
    torch.manual_seed(0)
    clips = [SyntheticVideoDataset(num_clips=6, frames=6, height=32, width=32, seed=seed) for seed in (0, 1)]
    with without_plots():
        VideoVAETrainer(
            VAETrainerConfig.model_validate(values),
            model=TwoKindsVAE(gate),
            dataset=clips[0],
            validation=clips[1],
        ).train()


def _find_problems(file: Path) -> None:
    """Measures in this process, and writes what is dearer than the baseline."""
    from slowdown import exceeded, measure_bare, measure_trainer, ratios

    def found(engine: str) -> list[str]:
        values = ratios(measure_trainer(engine), bare)
        return exceeded({f"{engine}, {name}": value for name, value in values.items()}, BASELINE)

    torch.set_num_threads(1)
    with dist.process_group():
        bare = measure_bare()
        problems = {engine: found(engine) for engine in ("local", "deepspeed")}
        with patch.object(LocalEngine, "step", _slowed(LocalEngine.step)):
            problems["slowed"] = found("local")
    file.write_text(json.dumps(problems))


def _slowed(step: Callable[[LocalEngine], Any]) -> Callable[[LocalEngine], Any]:
    kept: list[Tensor] = []  # from one update to the next

    def watched(engine: LocalEngine) -> Any:
        kept[:] = [weight.detach().clone() for weight in engine.module.parameters() for _ in range(4)]
        assert all(float(weight.norm()) >= 0.0 for weight in kept)
        for _ in range(5000):
            _called()
        return step(engine)

    return watched


def _called() -> None:
    """Costs a call."""


if __name__ == "__main__":
    _find_problems(Path(sys.argv[1]))
