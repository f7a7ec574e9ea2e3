"""Every configuration that the repository ships passes its own checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiprod_ds.config.load import load_config, load_encode_config, load_sample_config

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
        assert (in_repository_root / settings).is_file() or (path.parent / settings).is_file()


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
