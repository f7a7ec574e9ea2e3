"""Every configuration that the repository ships passes its own checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.load import load_config, load_encode_config, load_sample_config
from aiprod_ds.config.trainers import trainer_class
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.shipped import lookup
from aiprod_ds.train.planning.capacity import capacity_problems
from aiprod_ds.train.planning.gpu_rules import require_runnable

_ROOT = Path(__file__).resolve().parents[2]
_OTHERS = {"encode": load_encode_config, "sample": load_sample_config}
_CONFIGURATIONS = sorted(
    path for path in (_ROOT / "configs").rglob("*.yaml") if path.parent.name not in _OTHERS
)
_OF_OTHER_COMMANDS = sorted(
    path for path in (_ROOT / "configs").rglob("*.yaml") if path.parent.name in _OTHERS
)
_DEEPSPEED_SETTINGS = sorted((_ROOT / "ds_configs").glob("*.json"))


def _name(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def test_the_quickstart_configuration_is_among_them() -> None:
    assert _ROOT / "configs" / "video_vae" / "tiny.yaml" in _CONFIGURATIONS
    assert _DEEPSPEED_SETTINGS


@pytest.mark.parametrize("path", _CONFIGURATIONS, ids=_name)
def test_configuration_is_valid(path: Path, in_repository_root: Path) -> None:
    config = load_config(path.relative_to(in_repository_root))
    assert config.curriculum.phases


@pytest.mark.parametrize("path", _OF_OTHER_COMMANDS, ids=_name)
def test_configuration_of_another_command_is_valid(path: Path, in_repository_root: Path) -> None:
    assert _OTHERS[path.parent.name](path.relative_to(in_repository_root))


@pytest.mark.parametrize("path", _CONFIGURATIONS, ids=_name)
def test_configuration_names_deepspeed_settings_that_exist(path: Path, in_repository_root: Path) -> None:
    settings = load_config(path).engine.deepspeed_config
    if isinstance(settings, str):
        assert settings in lookup.shipped_settings()


_GPUS = {"v100": ("v100-32gb", 8), "h200": ("h200-141gb", 1)}
# What the hub would tell of a model is diffusers' own default for it.
_WITHOUT_HUB = {"pretrained": None, "subfolder": None}
# All of the V100's in `make test`: they are for the smallest card.
_OF_A_MACHINE = [
    pytest.param(path, marks=[] if "v100" in path.stem else pytest.mark.exhaustive, id=_name(path))
    for path in _CONFIGURATIONS
    if path.stem.rpartition("_")[2] in _GPUS
]


def test_every_configuration_but_the_tiny_ones_names_its_machine() -> None:
    others = [path for path in _CONFIGURATIONS if path.stem.rpartition("_")[2] not in _GPUS]
    assert [path.stem for path in others] == ["tiny"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("path", _OF_A_MACHINE)
def test_every_phase_fits_the_machine_that_the_file_is_named_after(
    path: Path, in_repository_root: Path
) -> None:
    name, world_size = _GPUS[path.stem.rpartition("_")[2]]
    config = load_config(path)
    local = {
        key: section.model_copy(update=_WITHOUT_HUB)
        for key in ("model", "vae", "audio_vae")
        if (section := getattr(config, key, None)) is not None
    }
    config = config.model_copy(update=local)
    trainer = trainer_class(config.trainer)(config=config, source=_name(path))
    settings = read_settings(config, source=str(path))
    require_runnable(trainer.shapes, settings, MACHINES[name], where=_name(path))
    plan = trainer.plan(world_size=world_size)
    assert capacity_problems(trainer, plan, settings, MACHINES[name]) == []


@pytest.mark.exhaustive
def test_the_default_curriculum_does_not_fit_a_v100_and_what_would_is_told(in_repository_root: Path) -> None:
    path = in_repository_root / "configs/video_vae/ltx_v100.yaml"
    config = load_config(path, ["curriculum={preset: default}"])
    trainer = trainer_class(config.trainer)(config=config, source="run.yaml")
    settings, plan = read_settings(config, source=str(path)), trainer.plan(world_size=8)
    (problem,) = capacity_problems(trainer, plan, settings, MACHINES["v100-32gb"])
    assert "curriculum.phases[2] (high): must fit v100-32gb" in problem
    assert "needs 88.0 of 34.0 GB (ZeRO-2, micro-batch 4, recomputation on" in problem
    assert "curriculum.phases[2].micro_batch_size: 1 and curriculum.phases[2].accumulation: 16" in problem
    assert "engine.parallel: auto" in problem


@pytest.mark.parametrize("path", _DEEPSPEED_SETTINGS, ids=_name)
def test_deepspeed_settings_leave_batch_and_optimizer_to_the_yaml(path: Path) -> None:
    settings = json.loads(path.read_text())
    owned_by_yaml = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
    }
    assert owned_by_yaml & set(settings) == set()
