"""Trainers of a user's own, named by import path: trained, planned and measured by the command line; what is
refused; and that a run folder's path is never imported."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aiprod_ds.cli import BAD_CONFIGURATION, DONE, main
from aiprod_ds.config.load import load_config, read_curriculum
from aiprod_ds.config.trainers import TRAINERS, trainer_class
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.registry import build_model
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.testing.tiny import tiny_ltx_vae
from aiprod_ds.train.planning.estimate import estimate_run
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = """\
trainer: TRAINER
output_dir: never_used
model:
  source: AutoencoderKLLTXVideo
  config: MODEL
data: {train: CLIPS, validation: CLIPS, num_workers: 0}
loss: {perceptual_weight: 0.0}
curriculum:
  phases:
    - {name: only, resolution: 16x16, duration: {frames: 5}, global_batch_size: 2, updates: 2, learning_rate: 1.0e-3}
engine:
  kind: local
  deepspeed_config: {zero_optimization: {stage: 1}}
evaluation: {max_clips: 1, num_pictures: 1}
""".replace("MODEL", json.dumps(tiny_ltx_vae()))  # noqa: E501
REORDERED = """\
from aiprod_ds.trainers.video_vae import VideoVAETrainer

class Reordered(VideoVAETrainer):
    def __init__(self, source, note="from the class", *, config):
        super().__init__(config, source=source)
        self.note = note
"""
BROKEN = """\
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

class Lonely:
    pass

class Unfinished(Trainer):
    pass

class OtherConfig(VideoVAETrainer):
    config_class = dict

class Demanding(VideoVAETrainer):
    def __init__(self, config, teacher, source):
        super().__init__(config, source=source)

trainer = VideoVAETrainer
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_synthetic_clips(folder, num_clips=3, frames=6, height=16, width=16, with_sound=False)
    return folder


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> Iterator[Path]:
    """A folder of modules that can be imported, with the guide's example and those above."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_decoder.py").write_text(_example(repository_root))
    (folder / "own_reordered.py").write_text(REORDERED)
    (folder / "own_broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def _example(root: Path) -> str:
    page = (root / "docs" / "guide.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    (found,) = (block for block in blocks if "class DecoderTrainer" in block)
    return str(found)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = ("torch", "DeepSpeed", "deepspeed", "httpx", "huggingface_hub", "matplotlib", "PIL")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)


def _write(folder: Path, clips: Path, trainer: str) -> Path:
    text = CONFIG.replace("TRAINER", trainer).replace("CLIPS", str(clips))
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def _run(command: str, config: Path, run: Path, *options: str) -> int:
    return main([command, str(config), "--trust-code", "--output-dir", str(run), *options])


def test_the_guides_trainer_is_checked_planned_trained_and_measured(
    tmp_path: Path, clips: Path, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = "own_decoder:DecoderTrainer", tmp_path / "run"
    config = _write(tmp_path, clips, path)
    assert _run("check", config, run) == DONE
    capsys.readouterr()
    assert _run("plan", config, run, "--json", "--machine", "h100-80gb") == DONE
    (cost,) = json.loads(capsys.readouterr().out)["estimate"]["configured"]
    assert 0 < cost["trained"] < cost["parameters"]
    assert _run("train", config, run) == DONE
    report = json.loads((run / "report.json").read_text())
    assert (report["trainer"], report["updates"]) == (path, 2)
    assert report["metrics"]["psnr_db_after"] != report["metrics"]["psnr_db_before"]
    trained = load_file(run / "export" / WEIGHTS)
    start = build_model(load_config(config, trust_code=True).model, seed=0).named_parameters()
    moved = {name.partition(".")[0] for name, value in start if not torch.equal(trained[name], value)}
    assert moved == {"decoder"}
    assert _run("eval", config, run) == DONE
    assert load_config(run / "config.yaml", trust_code=True).trainer == path
    assert _run("train", config, run, "--set", "frozen=decoder.") == BAD_CONFIGURATION
    assert "must be of the same configuration" in capsys.readouterr().err


def test_a_trainer_with_another_constructor_trains_and_is_estimated_like_its_base(
    tmp_path: Path, clips: Path, modules: Path
) -> None:
    hashes, costs = {}, {}
    for name, trainer in (("own", "own_reordered:Reordered"), ("base", "video_vae")):
        (tmp_path / name).mkdir()
        config = _write(tmp_path / name, clips, trainer)
        assert _run("train", config, tmp_path / name / "run") == DONE
        report = json.loads((tmp_path / name / "run" / "report.json").read_text())
        hashes[name] = report["final_state_sha256"]
        made = trainer_class(trainer)(config=load_config(config, trust_code=True), source="x")
        costs[name] = estimate_run(made, made.plan(), MACHINES["a100-80gb"]).document()
    assert hashes["own"] == hashes["base"]
    assert costs["own"] == costs["base"]


class Noted(VideoVAETrainer):
    """Made in code, with an argument that nobody else could fill in."""

    def __init__(self, note: str, config: VAETrainerConfig) -> None:
        super().__init__(config, source=note)


def test_a_constructor_with_arguments_of_its_own_is_estimated(tmp_path: Path, clips: Path) -> None:
    config = load_config(_write(tmp_path, clips, "video_vae"))
    assert isinstance(config, VAETrainerConfig)
    found = [
        estimate_run(trainer, trainer.plan(world_size=2), MACHINES["h100-80gb"]).document()
        for trainer in (Noted("x", config), VideoVAETrainer(config, source="x"))
    ]
    assert found[0] == found[1]
    assert found[0]["configured"]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("no_such_module:X", r"trainer: must be importable, got .*No module named .* PYTHONPATH\."),
        (
            "own_broken:Missing",
            r"trainer: must be importable, got 'own_broken:Missing' \(.*Missing'\)\. Check",
        ),
        (".broken:X", r"trainer: must be importable, got '.broken:X', a relative import\."),
        ("own_broken:Lonely", r"trainer: must be a class derived from Trainer of .*, got Lonely from"),
        (
            "json:dumps",
            r"trainer: must be a class derived from Trainer of .*, got function from 'json:dumps'",
        ),
        ("own_broken:Unfinished", r"trainer: must have all methods of Trainer, got .* without .*build_unit"),
        ("own_broken:OtherConfig", r"trainer: must state .* as config_class, got <class 'dict'> from"),
        ("own_broken:Demanding", r"trainer: must be made of config and source alone, got .*'teacher'\)"),
        ("vidoe_vae", r"trainer: must be one of .*, got 'vidoe_vae'\. Did you mean 'video_vae'\?"),
    ],
)
def test_what_is_no_trainer_is_refused_with_all_other_problems(
    tmp_path: Path,
    clips: Path,
    modules: Path,
    capsys: pytest.CaptureFixture[str],
    trainer: str,
    message: str,
) -> None:
    config = _write(tmp_path, clips, trainer)
    assert _run("check", config, tmp_path / "run", "--set", "sed=1") == BAD_CONFIGURATION
    first, second = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {re.escape(str(config))}: {message}", first), first
    assert "sed: is not a known key" in second


def test_keys_of_its_own_are_known_to_its_configuration_alone(
    tmp_path: Path, clips: Path, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, clips, "own_decoder:DecoderTrainer")
    assert _run("check", config, tmp_path / "run", "--set", "frozen=decoder.") == DONE
    assert _run("check", config, tmp_path / "run", "--set", "frozn=decoder.") == BAD_CONFIGURATION
    assert "frozn: is not a known key, got 'decoder.'. Did you mean 'frozen'?" in capsys.readouterr().err


def test_a_run_folder_is_converted_and_inspected_without_importing_what_it_names(
    tmp_path: Path, clips: Path, modules: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "imported"
    assert _run("train", _write(tmp_path, clips, "own_reordered:Reordered"), run) == DONE
    del sys.modules["own_reordered"]
    bomb = f"open({str(mark)!r}, 'w').close()\n"
    (modules / "own_reordered.py").write_text(bomb + REORDERED)
    shutil.rmtree(modules / "__pycache__", ignore_errors=True)
    assert main(["inspect", str(run)]) == DONE
    assert main(["convert", str(run), str(tmp_path / "out"), "--verify"]) == DONE
    written, exported = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", run / "export"))
    assert all(torch.equal(written[name], exported[name]) for name in written if "latents_" not in name)
    assert [phase.name for phase in read_curriculum(run / "config.yaml").phases] == ["only"]
    with pytest.raises(ConfigError, match=r"trainer: names code outside of .* add --trust-code, or `trust"):
        load_config(run / "config.yaml")
    assert not mark.exists()
    load_config(run / "config.yaml", trust_code=True)  # the bomb is live
    assert mark.exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_name_and_its_class_agree_on_the_configuration(name: str) -> None:
    found: Any = trainer_class(name)
    assert issubclass(found, Trainer)
    assert found.config_class is TRAINERS[name].config_class
