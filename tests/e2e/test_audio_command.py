"""The audio quickstart, shortened, through the real launcher on two ranks: it learns, and leaves pictures,
sounds and a model."""

from __future__ import annotations

import json
import os
import sys
import wave
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from safetensors.torch import load_file

from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.processes import free_port, run_in_own_session

UPDATES = (60, 4)
SAMPLES = (4_000, 8_000)

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "run"
    code, output = _train(repository_root, folder)
    assert code == 0, output
    assert "Traceback" not in output
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return found


def test_the_report_tells_what_ran(report: dict[str, Any]) -> None:
    assert (report["status"], report["trainer"], report["world_size"]) == ("completed", "audio_vae", 2)
    assert (report["engine"], report["zero_stage"], report["precision"]) == ("deepspeed", 1, "fp32")
    assert [(phase["updates"], phase["frames"], phase["resolution"]) for phase in report["phases"]] == [
        (UPDATES[0], SAMPLES[0], ""),
        (UPDATES[1], SAMPLES[1], ""),
    ]


def test_files_without_sound_are_named(report: dict[str, Any]) -> None:
    assert (report["data"]["clips"], report["data"]["held_out_clips"]) == (4, 1)
    unreadable = {entry["path"] for entry in report["data"]["unreadable"]}
    assert len(unreadable) == 6
    assert all("city" in path for path in unreadable), "the film of the city is silent"


def test_it_learns_the_sound_of_the_samples(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    assert metrics["mel_distance_after"] < 0.6 * metrics["mel_distance_before"]
    assert metrics["si_sdr_db_after"] > metrics["si_sdr_db_before"] + 20


def test_every_update_has_a_row(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert [update for update, metrics in rows if "loss/spectral" in metrics] == list(
        range(1, sum(UPDATES) + 1)
    )
    assert [update for update, metrics in rows if "evaluation/si_sdr_db" in metrics] == [
        0,
        UPDATES[0],
        sum(UPDATES),
    ]


def test_spectrograms_and_sounds_can_be_read(run: Path, report: dict[str, Any]) -> None:
    names = ("before", "phase_1_short", "phase_2_long")
    wanted = [f"samples/{name}.png" for name in names] + [
        f"samples/{name}_clip_1.wav" for name in ("original", *names)
    ]
    assert [picture["path"] for picture in report["pictures"]] == wanted
    for path in wanted:
        if path.endswith(".png"):
            assert matplotlib.image.imread(run / path)[..., :3].std() > 0, (
                "a picture of one colour shows nothing"
            )
        else:
            assert np.abs(_samples(run / path)).max() > 0, path


def test_the_model_and_its_statistics_are_exported(run: Path) -> None:
    assert load_file(run / "export" / "diffusion_pytorch_model.safetensors")
    assert json.loads((run / "export" / "config.json").read_text())["_class_name"] == "AutoencoderOobleck"
    statistics = json.loads((run / "export" / "latent_statistics.json").read_text())
    assert statistics["clips"] == 1
    assert len(statistics["latents_mean"]) == len(statistics["latents_std"]) == 8


def _samples(path: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, SAMPLES[1])
        return np.frombuffer(file.readframes(SAMPLES[1]), dtype="<i2")


def _train(root: Path, folder: Path) -> tuple[int | None, str]:
    binaries = Path(sys.executable).parent
    command = [str(binaries / "deepspeed"), "--num_accelerators", "2", "--master_addr", "127.0.0.1"]
    command += [
        "--master_port",
        str(free_port()),
        "--module",
        "aiprod_ds",
        "train",
        str(root / "configs/audio_vae/tiny.yaml"),
    ]
    command += ["--output-dir", str(folder), "--resume", "never"]
    settings: dict[str, Any] = {
        "data.train": root / "samples/train.csv",
        "data.validation": root / "samples/validation.csv",
    }
    for index, (updates, samples) in enumerate(zip(UPDATES, SAMPLES, strict=True)):
        phase = {"updates": updates, "duration": f"{{frames: {samples}}}", "warmup_updates": 2}
        settings |= {f"curriculum.phases[{index}].{key}": value for key, value in phase.items()}
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    path = os.pathsep.join(
        [str(binaries), os.environ["PATH"]]
    )  # the launcher starts `python` and `ninja` by name
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return run_in_own_session(command, timeout_seconds=600, environment=environment)
