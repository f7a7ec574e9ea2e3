"""The audio quickstart, shortened, on two ranks: it learns, and leaves pictures, sounds and a model.

Ranks are forked: test_train_command.py has the same command through the real launcher.
"""

from __future__ import annotations

import json
import os
import wave
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from safetensors.torch import load_file

from aiprod_ds.cli import main
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.dist import run_forked
from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

UPDATES = (60, 4)
SAMPLES = (4_000, 8_000)

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "run"
    codes, output = _train(repository_root, folder)
    assert codes == [0, 0], output
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


def _train(root: Path, folder: Path) -> tuple[list[int], str]:
    """Returns the exit codes of the ranks and what they said."""
    words = [
        "train",
        str(root / "configs/audio_vae/tiny.yaml"),
        "--output-dir",
        str(folder),
        "--resume",
        "never",
    ]
    settings: dict[str, Any] = {
        "data.train": root / "samples/train.csv",
        "data.validation": root / "samples/validation.csv",
    }
    for index, (updates, samples) in enumerate(zip(UPDATES, SAMPLES, strict=True)):
        phase = {"updates": updates, "duration": f"{{frames: {samples}}}", "warmup_updates": 2}
        settings |= {f"curriculum.phases[{index}].{key}": value for key, value in phase.items()}
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    output = folder.with_name("output.txt")
    arguments = {"words": words, "output": str(output)}
    return run_forked(train_on_forked_ranks, arguments=arguments, timeout_seconds=600), output.read_text()


# Below runs in a process that forks the ranks.


def train_on_forked_ranks(words: list[str], output: str) -> list[int]:
    """Returns the exit codes of `aiprod-ds WORDS` on two ranks; `output` gets what they say."""
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def be_rank() -> int:
        os.dup2(said, 1)
        os.dup2(said, 2)
        return main(words)

    return wait_for_ranks(fork_ranks(be_rank, ranks=2), timeout_seconds=500)
