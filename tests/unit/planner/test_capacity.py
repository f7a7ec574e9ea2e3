"""Whether a run fits its GPUs: which phase is named, with which figures, and that each change that is named
does fit."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiprod_ds.cli import main
from aiprod_ds.clock import Clock
from aiprod_ds.cluster.capacity import require_capacity_of
from aiprod_ds.cluster.examine import Examined
from aiprod_ds.cluster.hostfile import Host
from aiprod_ds.cluster.ssh import Ssh
from aiprod_ds.cluster.start import Request
from aiprod_ds.config.deepspeed import (
    DeepSpeedSettings,
    parse_deepspeed_settings,
    read_settings,
    with_parallel,
)
from aiprod_ds.config.load import load_config
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.errors import EngineError, PlanError
from aiprod_ds.planner.capacity import Capacity
from aiprod_ds.planner.cost import Estimator
from aiprod_ds.planner.hardware import MACHINES, Machine
from aiprod_ds.planner.memory import CONTEXT_BYTES, FRAGMENTATION, WORKSPACE_BYTES
from aiprod_ds.planner.search import ParallelChoice, PhaseChoice
from aiprod_ds.planner.workload import Workload
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.train.planning import capacity
from aiprod_ds.train.planning.auto import ResolvedRun
from aiprod_ds.train.planning.capacity import least_machine, require_capacity, require_own_capacity
from aiprod_ds.trainers.video_vae import VideoVAETrainer

ROOT = Path(__file__).parents[3]
VIDEO = ROOT / "configs/video_vae/tiny.yaml"
BF16 = parse_deepspeed_settings(ROOT / "ds_configs/zero1_bf16.json", where="zero1_bf16.json")
TINY = "model={source: 'aiprod_ds.testing.tiny:TinyVideoVAE', spatial_stride: 4, temporal_stride: 2}"
MAIN = "aiprod_ds.train.planning.capacity"


def _trace(
    phase: PhasePlan,
    bucket: int,
    *,
    micro_batch_size: int,
    recompute: int,
    has_blocks: bool = True,
    trained: int = 10**9,
) -> Workload:
    """A model that keeps 10 GB for each clip and as much more for each later phase and bucket; a tenth of it
    when it recomputes."""
    if recompute and not has_blocks:
        raise EngineError("nothing to recompute")
    held = 10**10 * micro_batch_size * (phase.index + bucket + 1) // (10 if recompute else 1)
    return Workload(
        parameters=trained,
        trained=trained,
        trained_tensors=100,
        largest_trained=10**7,
        buffer_bytes=0,
        saved_bytes=held,
        curve=((0, held), (trained, 0)),
        work=(),
        dispatched=1000,
    )


def _plan(*, batch: int = 4, phases: int = 3, buckets: int = 1, world_size: int = 1) -> RunPlan:
    bucket = BucketPlan(
        frames=9,
        requested_frames=9,
        height=64,
        width=64,
        frame_rate_hz=None,
        global_batch_size=batch,
        micro_batch_size=batch // world_size,
        accumulation=1,
    )
    return RunPlan(
        phases=tuple(
            phase_plan(updates=10, index=index, buckets=(bucket,) * buckets) for index in range(phases)
        ),
        world_size=world_size,
    )


def _capacity(plan: RunPlan, *, machine: str = "h100-80gb", **changes: Any) -> Capacity:
    trace = {key: changes.pop(key) for key in ("has_blocks", "trained") if key in changes}
    values: dict[str, Any] = {
        "estimator": Estimator(
            plan=plan,
            machine=MACHINES[machine],
            trace=partial(_trace, **trace),
            has_average=False,
            dollars_per_gpu_hour=1.0,
        ),
        "plan": plan,
        "settings": BF16,
        "settings_of": _settings_of,
        "is_chosen": False,
        "places": {
            (phase.index, index): f"phases[{phase.index}].buckets[{index}]"
            for phase in plan.phases
            for index in range(len(phase.buckets))
        },
        "where": "run.yaml",
    }
    return Capacity(**{**values, **changes})


def _settings_of(stage: int, is_offloaded: bool) -> DeepSpeedSettings:
    return with_parallel(BF16, zero_stage=stage, is_offloaded=is_offloaded, where="test")


def test_what_fits_has_no_problem() -> None:
    assert _capacity(_plan(batch=1)).problems() == []


def test_a_late_phase_is_named_with_what_it_needs_and_what_would_fit() -> None:
    """Weights, masters and moments of 1e9 parameters are 14 GB; 4 clips of 30 GB on top, a bucket of 2e8
    gradients and cuBLAS's workspace."""
    second, third = _capacity(_plan(phases=3)).problems()
    needed = (14e9 + 4 * 30e9 + 0.4e9 + WORKSPACE_BYTES) * (1 + FRAGMENTATION) + CONTEXT_BYTES
    assert "curriculum.phases[2] (" in third
    assert f"needs {needed / 1e9:.1f} of 84.9 GB" in third
    assert "(ZeRO-1, micro-batch 4, recomputation off; 5 % and 1.8 GB of it are a margin)" in third
    assert "fits with curriculum.phases[2].activation_checkpointing: true (" in third
    assert "phases[2].buckets[0].micro_batch_size: 2 and phases[2].buckets[0].accumulation: 2 (" in third
    assert "or with engine.parallel: auto and no micro_batch_size" in third
    assert third.endswith("Or go on all the same: engine.on_lack_of_memory: go_on.")
    assert "phases[1].buckets[0].micro_batch_size: 2 and phases[1].buckets[0].accumulation: 2 (" in second


def test_phases_that_are_over_are_not_asked_about() -> None:
    (problem,) = _capacity(_plan(phases=3)).problems(first=2)
    assert "curriculum.phases[2]" in problem
    assert _capacity(_plan(batch=2, phases=3)).problems(first=3) == []


def test_both_are_named_where_one_alone_is_not_enough() -> None:
    """One clip of phase 9 keeps 100 GB, 10 recomputed: 4 of these are 40 GB beside 14 of 34."""
    plan = _plan(phases=10)
    problem = _capacity(plan, machine="v100-32gb").problems(first=9)[0]
    assert "fits with curriculum.phases[9].activation_checkpointing: true and phases[9].buckets[0]" in problem


def test_only_the_bucket_that_is_too_large_is_cut() -> None:
    (problem,) = _capacity(_plan(batch=4, phases=1, buckets=2)).problems()
    assert "phases[0].buckets[1].micro_batch_size: 2 and phases[0].buckets[1].accumulation: 2 (" in problem
    assert "buckets[0]" not in problem


def test_sharding_and_offload_are_named_where_they_help() -> None:
    """12 of the 14 bytes of 20e9 parameters are the optimizer's."""
    plan = _plan(batch=8, phases=1, world_size=8)
    (problem,) = _capacity(plan, has_blocks=False, trained=20 * 10**9).problems()
    assert "activation_checkpointing: true" not in problem
    assert "micro_batch_size:" not in problem.replace("and no micro_batch_size,", "")
    found = re.findall(r"(ZeRO-\d)( with an offloaded optimizer)? in engine.deepspeed_config", problem)
    assert found
    for stage, offload in found:
        settings = _settings_of(int(stage[-1]), bool(offload))
        assert _capacity(plan, has_blocks=False, trained=20 * 10**9, settings=settings).problems() == []


def test_where_nothing_fits_it_says_so() -> None:
    plan = _plan(batch=1, phases=1)
    (problem,) = _capacity(plan, machine="v100-32gb", trained=40 * 10**9).problems()
    assert "Nothing that the planner can change makes it fit" in problem
    assert "fits with" not in problem


def test_what_auto_chose_cannot_be_configured_but_chosen_anew() -> None:
    (problem,) = _capacity(_plan(batch=8, phases=1), is_chosen=True).problems()
    assert (
        "fits with another number of GPUs, for which engine.parallel: auto chooses anew. Or go on" in problem
    )


def test_an_engine_on_one_process_is_offered_no_sharding() -> None:
    (problem,) = _capacity(_plan(batch=8, phases=1), settings_of=None).problems()
    assert "ZeRO-1" in problem
    assert "engine.parallel" not in problem
    assert "in engine.deepspeed_config" not in problem


def _trainer(*overrides: str, folder: str = "unused") -> VideoVAETrainer:
    config = load_config(VIDEO, [TINY, *overrides], folder)
    return VideoVAETrainer(config, source="run.yaml")  # type: ignore[arg-type]


def _small(memory_bytes: float) -> Machine:
    return replace(MACHINES["v100-32gb"], name="small card", memory_bytes=int(memory_bytes))


ENGINE = "engine={deepspeed_config: {zero_optimization: {stage: 1, reduce_bucket_size: 1000}}}"


@pytest.mark.usefixtures("in_repository_root")
def test_each_change_that_is_named_can_be_made_and_fits() -> None:
    phase = "{name: only, resolution: 64x96, duration: {frames: 9}, global_batch_size: 8, updates: 2, "
    curriculum = f"curriculum={{phases: [{phase}learning_rate: 1.0e-4}}]}}"
    trainer = _trainer(ENGINE, curriculum)
    plan, settings = trainer.plan(), read_settings(trainer.config, source="run.yaml")
    machine = _small(CONTEXT_BYTES + 0.12e9)
    with pytest.raises(PlanError) as caught:
        require_capacity(trainer, plan, settings, machine)
    (problem,) = caught.value.problems
    assert "of 1.9 GB" in problem
    named = problem.partition("it fits with ")[2].partition(". Or go on")[0].split("; or with ")
    assert len(named) >= 2
    for change in named:
        keys = re.findall(r"([\w.\[\]]+): (\w+)", change)
        assert keys
        changed = _trainer(ENGINE, curriculum, *(f"{key}={value}" for key, value in keys))
        own = read_settings(changed.config, source="run.yaml")
        require_capacity(changed, changed.plan(), own, machine)


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository_root")
def test_who_knows_better_goes_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    trainer = _trainer("engine.on_lack_of_memory=go_on")
    settings = read_settings(trainer.config, source="run.yaml")
    with caplog.at_level(logging.WARNING, MAIN):
        require_capacity(trainer, trainer.plan(), settings, _small(1e9))
    assert "curriculum.phases[0]" in caplog.text
    assert "must fit small card" in caplog.text


class _Unruly(nn.Module):
    """Looks at its numbers, which has no answer on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 3, 1)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        if video.mean() > 0:
            return self.layer(video)  # type: ignore[no-any-return]
        return video


@pytest.mark.usefixtures("in_repository_root")
def test_a_model_that_cannot_run_on_shapes_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer()
    plan, settings = trainer.plan(), read_settings(trainer.config, source="run.yaml")
    unruly = _Unruly().to("meta")
    monkeypatch.setattr(
        trainer, "blank_clip", lambda _: unruly.encode(torch.ones(1, 3, 1, 2, 2, device="meta"))
    )
    with caplog.at_level(logging.WARNING, MAIN):
        require_capacity(trainer, plan, settings, _small(1e9))
    assert "capacity_not_estimated" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository_root")
def test_check_refuses_with_the_code_of_a_bad_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MACHINES, "v100-32gb", _small(1e9))
    command = ["check", "configs/video_vae/tiny.yaml", "--set", TINY, "--machine", "v100-32gb"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "curriculum.phases[0] (" in error
    assert "of 1.0 GB" in error
    assert main([*command, "--set", "engine.on_lack_of_memory=go_on"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository_root")
def test_a_run_is_refused_before_its_weights_are_made_and_its_folder_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capacity, "this_machine", lambda: _small(1e9))
    trainer = _trainer(folder=str(tmp_path / "run"))
    monkeypatch.setattr(trainer, "_own_model", lambda: pytest.fail("weights were made"))
    with pytest.raises(PlanError, match=r"curriculum\.phases\[0\] .* must fit small card"):
        trainer.train()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.usefixtures("in_repository_root")
def test_on_a_cpu_nothing_is_asked_and_of_a_resumed_run_only_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, bool]] = []

    def note(*_: Any, first: int, is_chosen: bool) -> None:
        asked.append((first, is_chosen))

    trainer = _trainer()
    plan, settings = trainer.plan(), read_settings(trainer.config, source="run.yaml")
    run = ResolvedRun(plan=plan, settings=settings, choice=None)
    monkeypatch.setattr(capacity, "require_capacity", note)
    require_own_capacity(trainer, run, None)
    assert asked == []
    monkeypatch.setattr(capacity, "this_machine", lambda: _small(1e9))
    require_own_capacity(trainer, run, None)
    require_own_capacity(trainer, run, Clock(phase=1))
    phases = (PhaseChoice(recompute=0, micro_batch_sizes=(1,)),)
    choice = ParallelChoice(zero_stage=1, is_offloaded=False, world_size=1, phases=phases)
    chosen = replace(run, choice=choice)
    require_own_capacity(trainer, chosen, None)  # it was chosen for this machine a moment ago
    require_own_capacity(trainer, chosen, Clock(phase=1))
    assert asked == [(0, False), (1, False), (1, True)]


def test_the_least_card_and_the_fullest_host_count() -> None:
    ranks = [("a", 80, 1000), ("a", 70, 1000), ("b", 75, 900)]
    found = least_machine(MACHINES["h100-80gb"], ranks)
    assert (found.memory_bytes, found.host_memory_bytes) == (70, 500)


def _examined(name: str, *memory_bytes: float) -> Examined:
    gpus = [
        {"name": "NVIDIA H100 80GB", "capability": [9, 0], "memory_bytes": int(each)} for each in memory_bytes
    ]
    host = Host(name=name, slots=tuple(range(len(gpus))))
    return Examined(host=host, probe={"is_cpu_run": not gpus, "gpus": gpus})


def _request(folder: Path, *overrides: str) -> Request:
    return Request(
        config=VIDEO,
        run_folder=folder,
        hostfile=folder / "hosts",
        overrides=(TINY, *overrides),
        ssh=Ssh(config=None),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository_root")
def test_launch_asks_for_the_least_card_of_the_hosts(tmp_path: Path) -> None:
    request = _request(tmp_path)
    found = [_examined("a", 80e9), _examined("b", 1e9)]
    with pytest.raises(PlanError, match=r"must fit NVIDIA H100 80GB, got .* of 1\.0 GB"):
        require_capacity_of(found, request, world_size=2)
    require_capacity_of(found[:1], request, world_size=1)
    require_capacity_of([_examined("c")], request, world_size=2)
    (tmp_path / "checkpoints" / "update_000010").mkdir(parents=True)
    require_capacity_of(found, request, world_size=2)  # where it stands is known to the run
    with pytest.raises(PlanError):
        require_capacity_of(found, replace(request, resume="never"), world_size=2)


def test_launch_leaves_to_the_hosts_what_is_not_here(tmp_path: Path) -> None:
    request = _request(tmp_path, "model.source=NoSuchModel", "model.config={}")
    require_capacity_of([_examined("a", 1e9)], request, world_size=1)
