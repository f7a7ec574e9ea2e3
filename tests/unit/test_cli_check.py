"""`check` tells what is wrong with file, folder, settings, model, plan and data in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _errors(capsys: pytest.CaptureFixture[str], text: str, *options: str) -> list[str]:
    Path("c.yaml").write_text(text)
    assert main(["check", "c.yaml", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.slow  # it loads diffusers
def test_faults_of_file_folder_settings_model_and_data_come_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    found = _errors(
        capsys,
        "base: video_vae/tiny\ntrainer: video_vea\noutput_dir: file/run\nlr: 1e-4\n"
        "model: {config: {latent_chanels: 3}}\nengine: {deepspeed_config: zero9}\ndata: {train: nowhere}\n"
        "checkpoint: {keep_every_updates: 600}\n",
    )
    begins = (
        "c.yaml: trainer: must be one of",
        "c.yaml: lr: is not a known key",
        "c.yaml: checkpoint.keep_every_updates: has no effect without keep_last",
        "c.yaml: output_dir: must be a folder that can be made",
        "c.yaml: engine.deepspeed_config: must name a file or shipped settings, got 'zero9'",
        "c.yaml: model.config: AutoencoderKLLTXVideo must accept it",
        "c.yaml: data: nowhere: must be a folder",
    )
    assert len(found) == len(begins), found
    assert all(line.startswith(begin) for line, begin in zip(found, begins, strict=True)), found


@pytest.mark.slow
def test_a_plan_that_does_not_do_hides_no_missing_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--set", "curriculum.phases[0].resolution=65x64", "--set", "data.train=nowhere")
    found = _errors(capsys, "base: video_vae/tiny\n", *options, "--set", "ema.half_life_samples=0")
    begins = (
        "--set: ema.half_life_samples: must be >= 1",
        "c.yaml: curriculum.phases[0].resolution.height: must be a multiple of the model's stride 8",
        "c.yaml: data: nowhere: must be a folder",
    )
    assert len(found) == len(begins), found
    assert all(line.startswith(begin) for line, begin in zip(found, begins, strict=True)), found


def test_of_broken_sections_nothing_is_made_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _errors(
        capsys,
        "base: video_vae/tiny\nmodel: {source: 3}\ndata: {train: 4}\nengine: {deepspeed_config: 5}\n"
        "output_dir: 6\n",
    )
    assert [line.split(":")[1].strip() for line in found] == [
        "output_dir",
        "model.source",
        "data.train",
        "engine.deepspeed_config",
    ]


def test_a_file_whose_trainer_nobody_knows_is_told_as_far_as_it_can_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _errors(capsys, "base: video_vae/tiny\ntrainer: qqq\nsed: 1\n")
    assert [line.split(":")[1].strip() for line in found] == ["trainer", "sed"]
