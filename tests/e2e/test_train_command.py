"""The quickstart, shortened, through the real launcher on two ranks; then the same command again on the
finished run, on ranks that are forked."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aiprod_ds.cli import main
from aiprod_ds.convert.request import Request
from aiprod_ds.convert.run import convert
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.dist import run_forked
from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks
from aiprod_ds.testing.processes import free_port, run_in_own_session

PHASES = ("low", "medium", "high")
UPDATES = (3, 2, 2)
RESOLUTIONS = ("32x32", "32x64", "64x64")
FRAMES, SNAPPED_FRAMES = (8, 9, 16), (9, 9, 17)  # the model takes 1 + 2k
BATCHES = (8, 4, 2)
MOMENTS = ("before", "phase_1_low", "phase_2_medium", "phase_3_high")
PICTURES = [f"samples/{moment}.png" for moment in MOMENTS]
FILMS = [f"samples/{name}_clip_{clip}.mp4" for name in ("original", *MOMENTS) for clip in (1, 2, 3)]

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    folder: Path
    code: int | None
    output: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def trained(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("e2e") / "run"
    return _finished(folder, *_launch(_words(repository_root, folder, resume="never")))


@pytest.fixture(scope="module")
def trained_again(repository_root: Path, trained: Finished) -> Finished:
    output = trained.folder.with_name("output.txt")
    arguments = {"words": _words(repository_root, trained.folder, resume="auto"), "output": str(output)}
    codes = run_forked(train_on_forked_ranks, arguments=arguments, timeout_seconds=600)
    return _finished(trained.folder, next((code for code in codes if code), 0), output.read_text())


def test_the_command_succeeds(trained: Finished) -> None:
    assert trained.code == 0, trained.output
    assert "Traceback" not in trained.output


def test_the_report_tells_what_ran(trained: Finished) -> None:
    report = trained.report
    assert (report["status"], report["world_size"], report["engine"]) == ("completed", 2, "deepspeed")
    assert (report["zero_stage"], report["precision"], report["skipped_updates"]) == (1, "fp32", 0)
    phases = [
        tuple(phase[key] for key in ("name", "updates", "resolution", "frames", "batch"))
        for phase in report["phases"]
    ]
    assert phases == list(zip(PHASES, UPDATES, RESOLUTIONS, SNAPPED_FRAMES, BATCHES, strict=True))
    assert {"psnr_db_before", "psnr_db_after"} <= report["metrics"].keys()
    assert len(report["final_state_sha256"]) == 64


def test_every_update_has_a_row(trained: Finished) -> None:
    rows = read_metrics(trained.folder / "metrics.jsonl")
    assert [update for update, metrics in rows if "loss/total" in metrics] == list(range(1, sum(UPDATES) + 1))
    assert [update for update, metrics in rows if "evaluation/psnr_db" in metrics] == [0, 3, 5, 7]


def test_pictures_and_plots_can_be_read(trained: Finished) -> None:
    assert [picture["path"] for picture in trained.report["pictures"]] == [*PICTURES, *FILMS]
    assert trained.report["plots"]
    for path in (*PICTURES, *(picture["path"] for picture in trained.report["plots"])):
        pixels = matplotlib.image.imread(trained.folder / path)
        assert min(pixels.shape[:2]) >= 64
        assert pixels[..., :3].std() > 0, "a picture of one colour shows nothing"


def test_films_of_originals_and_reconstructions_can_be_played(trained: Finished) -> None:
    for path in FILMS:
        with av.open(str(trained.folder / path)) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(frames) == SNAPPED_FRAMES[-1]
        assert np.std(frames) > 0, "a film of one colour shows nothing"


def test_the_run_folder_is_whole(trained: Finished) -> None:
    wanted = ("config.yaml", "plan.json", "environment.json", "start.json", "export/config.json")
    assert [name for name in wanted if not (trained.folder / name).is_file()] == []
    assert (trained.folder / "checkpoints" / "latest").read_text(encoding="utf-8") == "update_000007\n"


def test_the_report_names_the_command_that_started_both_ranks(trained: Finished) -> None:
    environment = trained.report["environment"]
    assert (environment["ranks"], environment["hosts"]) == (2, 1)
    assert environment["command"].startswith("deepspeed --num_accelerators 2 --master_addr 127.0.0.1 ")
    assert " --module aiprod_ds train " in environment["command"]
    for page in ("report.md", "report.html"):
        assert "deepspeed --num_accelerators 2" in (trained.folder / page).read_text(encoding="utf-8")


def test_its_checkpoint_of_two_ranks_becomes_what_it_exported(trained: Finished, tmp_path: Path) -> None:
    convert(Request(source=trained.folder, out=tmp_path / "model"), verify=True)
    name = "diffusion_pytorch_model.safetensors"
    exported, found = load_file(trained.folder / "export" / name), load_file(tmp_path / "model" / name)
    assert exported.keys() == found.keys()  # the export measures latents_mean and latents_std
    assert all(
        torch.equal(found[name], value) for name, value in exported.items() if not name.startswith("latents_")
    )


def test_a_finished_run_is_left_as_it_is(trained: Finished, trained_again: Finished) -> None:
    assert trained_again.code == 0, trained_again.output
    assert "Traceback" not in trained_again.output
    assert trained_again.report["status"] == "completed"
    assert trained_again.report["final_state_sha256"] == trained.report["final_state_sha256"]
    assert trained_again.report["metrics"] == trained.report["metrics"]
    assert trained_again.report["resumed_from"] == ["update_000007"]


def _words(root: Path, folder: Path, *, resume: str) -> list[str]:
    """Returns the command without its program."""
    words = [
        "train",
        str(root / "configs/video_vae/tiny.yaml"),
        "--output-dir",
        str(folder),
        "--resume",
        resume,
    ]
    settings: dict[str, Any] = {
        "data.train": root / "samples/train.csv",
        "data.validation": root / "samples/validation.csv",
    }
    keys = ("updates", "resolution", "duration.frames", "global_batch_size")
    for index, values in enumerate(zip(UPDATES, RESOLUTIONS, FRAMES, BATCHES, strict=True)):
        phase = {**dict(zip(keys, values, strict=True)), "warmup_updates": 1}
        settings |= {f"curriculum.phases[{index}].{key}": value for key, value in phase.items()}
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return words


def _launch(words: list[str]) -> tuple[int | None, str]:
    binaries = Path(sys.executable).parent
    command = [str(binaries / "deepspeed"), "--num_accelerators", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), "--module", "aiprod_ds", *words]
    path = os.pathsep.join(
        [str(binaries), os.environ["PATH"]]
    )  # the launcher starts `python` and `ninja` by name
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return run_in_own_session(command, timeout_seconds=600, environment=environment)


def _finished(folder: Path, code: int | None, output: str) -> Finished:
    report = folder / "report.json"
    assert report.is_file(), output
    return Finished(
        folder=folder, code=code, output=output, report=json.loads(report.read_text(encoding="utf-8"))
    )


# Below runs in a process that forks the ranks.


def train_on_forked_ranks(words: list[str], output: str) -> list[int]:
    """Returns the exit codes of `aiprod-ds WORDS` on two ranks; `output` gets what they say."""
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def be_rank() -> int:
        os.dup2(said, 1)
        os.dup2(said, 2)
        return main(words)

    return wait_for_ranks(fork_ranks(be_rank, ranks=2), timeout_seconds=500)
