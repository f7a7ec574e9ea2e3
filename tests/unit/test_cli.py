"""The command line in one process: exit codes, what bad input is told, and that a refused command writes
nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aiprod_ds.cli import BAD_CONFIGURATION, DONE, FAILED, main
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import DataError, DivergenceError, NonFiniteError, SpikeError
from aiprod_ds.testing.runs import without_plots
from aiprod_ds.testing.tiny import tiny_ltx_vae

CONFIG = """\
trainer: video_vae
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
PHASE = "curriculum.phases[0]"
SECOND = (
    "{name: second, resolution: 16x16, duration: {frames: 5}, global_batch_size: 2, updates: 2, "
    "learning_rate: 1.0e-3}"
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_synthetic_clips(folder, num_clips=3, frames=6, height=16, width=16, with_sound=False)
    return folder


@pytest.fixture
def config(tmp_path: Path, clips: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("CLIPS", str(clips)))
    return path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, names = logging.getLogger(), ("torch", "DeepSpeed", "deepspeed", "httpx", "matplotlib", "PIL")
    handlers, level, levels = (
        root.handlers[:],
        root.level,
        {name: logging.getLogger(name).level for name in names},
    )
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)


def _arguments(command: str, config: Path, run_folder: Path, *settings: str) -> list[str]:
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [command, str(config), "--output-dir", str(run_folder), *overrides]


BAD_SETTINGS = {
    "misspelt key": (
        [f"{PHASE}.updats=3"],
        f"{PHASE}.updats: is not a known key, got 3. Did you mean 'updates'?",
    ),
    "misspelt section": (["optimiser.weight_decay=0"], "Did you mean 'optimizer'?"),
    "wrong type": (["seed=abc"], "seed: must be an integer, got 'abc'."),
    "quoted number": (
        [f"{PHASE}.learning_rate='0.1'"],
        f"{PHASE}.learning_rate: must be a number, got '0.1'.",
    ),
    "frames strict": (
        ["curriculum.frames_policy=strict", f"{PHASE}.duration.frames=6"],
        (
            f"{PHASE}.duration.frames: must give 1 + 4 * k frames for this model (frames_policy: strict), "
            "got 6. Use 5 or 9"
        ),
    ),
    "measure without weights": (
        ["evaluation.measures.lpips=on", "loss.perceptual.weights=nowhere.pth"],
        "evaluation.measures.lpips: perceptual.weights: must be a file (torchvision's vgg16-397923af.pth)",
    ),
    "measure without a network": (
        ["evaluation.measures.fvd={network: nowhere.pt}"],
        "evaluation.measures.fvd.network: must be a file, got 'nowhere.pt', which is none. Ways out: ",
    ),
    "best by an unknown measure": (
        ["checkpoint.keep_last=1", "checkpoint.keep_best={metric: psnr, mode: max}"],
        "checkpoint.keep_best.metric: must be one of psnr_db, ",
    ),
    "misspelt model": (["model.source=AutoencoderKLLTXVide"], "Did you mean 'AutoencoderKLLTXVideo'?"),
    "engine file missing": (
        ["engine.deepspeed_config=nowhere.json"],
        "engine.deepspeed_config: must name a file or shipped settings, got 'nowhere.json'",
    ),
    "data missing": (["data.train=/nowhere"], "/nowhere: must be a folder or a CSV, JSON or JSONL manifest"),
    "moments in the first phase": (
        [f"{PHASE}.moments=reset"],
        f"{PHASE}.moments: has no effect in the first phase",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_explained_and_write_nothing(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings, message = BAD_SETTINGS[name]
    assert main(_arguments("train", config, run_folder, *settings)) == BAD_CONFIGURATION
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert not run_folder.exists()


# What the curriculum may not say, one line for each kind: the settings and the whole message behind the
# file's name.
BAD_CURRICULA = {
    "batch does not divide": (
        [f"{PHASE}.global_batch_size=3", f"{PHASE}.micro_batch_size=2"],
        (
            f"{PHASE}.global_batch_size: must be a multiple of micro_batch_size (2) * world size (1) = 2, "
            "got "
            "3. Use 2 or 4."
        ),
    ),
    "phases overlap: one name twice": (
        [f"curriculum.phases=[{SECOND}, {SECOND}]"],
        "curriculum.phases[1].name: must be unique, got 'second' twice. Rename one of them.",
    ),
    "no phase": (
        ["curriculum.phases=[]"],
        "curriculum.phases: must have at least one entry, got an empty list. Add a phase.",
    ),
    "empty phase": ([f"{PHASE}.updates=0"], f"{PHASE}.updates: must be >= 1, got 0. Use a larger value."),
    "phase without an end": (
        [f"{PHASE}.updates=null"],
        (
            f"{PHASE}.updates: one of updates, epochs and plateau must be given, got none. Say how the phase "
            "ends."
        ),
    ),
    "minimum above maximum": (
        [f"{PHASE}.updates=null", f"{PHASE}.epochs=1", f"{PHASE}.max_updates=5", f"{PHASE}.min_updates=6"],
        f"{PHASE}.min_updates: must be at most max_updates (5), got 6. Lower it.",
    ),
    "warm-up as long as the phase": (
        [f"{PHASE}.warmup_updates=2"],
        f"{PHASE}.updates: must exceed warmup_updates (2), got 2. Raise updates or lower warmup_updates.",
    ),
    "phase that is not there": (
        ["curriculum.phases[2].updates=5"],
        (
            "curriculum.phases[2].updates: curriculum.phases must have entry [2], got 1 counted from 0. "
            "Lower "
            "the index."
        ),
    ),
    "phase by a name": (
        ["curriculum.phases[low].updates=5"],
        (
            "must be of the form path.to.key[index]=value, got 'curriculum.phases[low].updates=5'. Write for "
            "example seed=1."
        ),
    ),
    "unknown preset": (
        ["curriculum={preset: big}"],
        "curriculum.preset: must be 'default', got 'big'. Write default or list phases.",
    ),
    "unknown weight of the loss": (
        [f"{PHASE}.loss={{perceptul_weight: 0.1}}"],
        (
            f"{PHASE}.loss.perceptul_weight: is not a weight of the loss section, got 0.1. Did you mean "
            "'perceptual_weight'?"
        ),
    ),
    "unknown section to override": (
        ["curriculum.adapter.overrides=[augmnt]"],
        "'augment' or 'activation_checkpointing', got 'augmnt'. Did you mean 'augment'?",
    ),
    "plateau without a maximum": (
        [f"{PHASE}.updates=null", f"{PHASE}.plateau={{patience_updates: 3}}"],
        (
            f"{PHASE}.max_updates: must be given with plateau, got nothing. A plateau may never come: set "
            "the "
            "longest length."
        ),
    ),
    "height off the stride": (
        [f"{PHASE}.resolution=20x16"],
        f"{PHASE}.resolution.height: must be a multiple of the model's stride 8, got 20. Use 16 or 24.",
    ),
    "epochs shorter than the warm-up": (
        [
            f"{PHASE}.updates=null",
            f"{PHASE}.epochs=2",
            f"{PHASE}.warmup_updates=3",
            f"{PHASE}.schedule=constant",
        ],
        f"{PHASE}.epochs: must last longer than warmup_updates (3), got 2 epochs of 3 updates together.",
    ),
    "more frames than the longest clip": (
        [f"{PHASE}.duration.frames=16"],
        f"{PHASE}.duration: must be at most the frames of the longest clip (6, ",
    ),
}


@pytest.mark.parametrize("name", BAD_CURRICULA)
def test_check_explains_a_bad_curriculum_and_writes_nothing(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings, message = BAD_CURRICULA[name]
    before = _contents(config.parent)
    assert main(_arguments("check", config, run_folder, *settings)) == BAD_CONFIGURATION
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith((f"error: {config}: ", "error: --set"))
    assert captured.out == ""
    assert not run_folder.exists()
    assert _contents(config.parent) == before


def test_every_problem_is_told_at_once(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            _arguments("check", config, run_folder, "seed=abc", f"{PHASE}.updats=3", "report.flush_updates=0")
        )
        == 2
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3


def test_an_empty_folder_is_no_data(
    config: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(_arguments("train", config, run_folder, f"data.train={empty}")) == BAD_CONFIGURATION
    assert (
        f"{empty}: must hold at least one video clip, got none. Add files ending in"
        in capsys.readouterr().err
    )
    assert not run_folder.exists()


def test_an_unreadable_file_is_named(
    config: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    write_synthetic_clips(folder, num_clips=1, frames=6, height=16, width=16, with_sound=False)
    (folder / "not_a_video.mp4").write_bytes(b"text")
    assert main(_arguments("train", config, run_folder, f"data.train={folder}")) == BAD_CONFIGURATION
    errors = capsys.readouterr().err
    assert "not_a_video.mp4" in errors
    assert "raise data.max_unreadable_fraction" in errors
    assert not run_folder.exists()


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([*_arguments(command, config, run_folder), "--world-size", "3"]) == BAD_CONFIGURATION
    assert f"{PHASE}.global_batch_size: must be a multiple of" in capsys.readouterr().err


def test_a_missing_configuration_file_is_named(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.yaml"
    assert main(_arguments("check", missing, run_folder)) == BAD_CONFIGURATION
    assert str(missing) in capsys.readouterr().err


def test_check_and_plan_write_nothing(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments("check", config, run_folder)) == DONE
    assert capsys.readouterr().out == f"{config}: good\n"
    assert (
        main(
            [
                *_arguments("plan", config, run_folder, f"{PHASE}.duration.frames=4"),
                "--json",
                "--world-size",
                "2",
            ]
        )
        == DONE
    )
    plan = json.loads(capsys.readouterr().out)
    (row,) = plan["phases"]
    assert plan["world_size"] == 2
    assert (row["requested_frames"], row["frames"], row["height"], row["width"]) == (4, 5, 16, 16)
    assert (row["global_batch_size"], row["micro_batch_size"], row["accumulation"], row["updates"]) == (
        2,
        1,
        1,
        2,
    )
    assert not run_folder.exists()


def test_plan_shows_the_curriculum_and_reads_the_data(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments("plan", config, run_folder)) == DONE
    out = capsys.readouterr().out
    assert "in all  2 updates; 4 clips; 5.12 k pixels" in out  # 2 updates of 2 clips of 5 frames of 16 x 16
    assert "1.3 of 3 clips" in out
    assert "data not read" not in out
    assert not run_folder.exists()


def test_plan_needs_no_data(config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = _arguments("plan", config, run_folder, "data.train=/nowhere")
    reason = f"{config}: data: /nowhere: must be a folder or a CSV, JSON or JSONL manifest"
    assert main([*missing, "--json"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["data_problem"].startswith(reason)
    assert [(row["clips"], row["epochs"], row["samples"]) for row in plan["phases"]] == [(None, None, 4)]
    assert main(missing) == DONE
    assert capsys.readouterr().out.count("data not read") == 1


def test_plan_counts_the_updates_of_epochs(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_epochs = [f"{PHASE}.updates=null", f"{PHASE}.epochs=5", f"{PHASE}.schedule=constant"]
    assert main([*_arguments("plan", config, run_folder, *by_epochs), "--json"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["totals"]["updates"] == 8
    )  # 5 passes over 3 clips, 2 at a time: the last update takes one clip of the sixth
    assert [(row["updates"], row["clips"]) for row in plan["phases"]] == [(8, 3)]
    assert (
        main([*_arguments("plan", config, run_folder, *by_epochs, "data.train=/nowhere"), "--json"]) == DONE
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["totals"]["updates"], plan["totals"]["min_updates"], plan["totals"]["max_updates"]) == (
        None,
        1,
        None,
    )


def test_plan_refuses_data_that_can_be_read_and_does_not_do(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments("plan", config, run_folder, f"{PHASE}.duration.frames=9")) == BAD_CONFIGURATION
    captured = capsys.readouterr()
    assert f"{PHASE}.duration: must be at most the frames of the longest clip (6, " in captured.err
    assert captured.out == ""


def test_plan_in_json_has_everything(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_arguments("plan", config, run_folder), "--json"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == {
        "source", "model", "parameters", "world_size", "data_problem", "phases", "totals", "learning_rate_curve", "evaluation", "found",  # noqa: E501
    }  # fmt: skip
    assert (plan["source"], plan["model"], plan["data_problem"]) == (
        str(config),
        "AutoencoderKLLTXVideo",
        None,
    )
    assert (plan["totals"]["updates"], plan["totals"]["samples"], plan["totals"]["pixels"]) == (2, 4, 5120)
    assert [point["update"] for point in plan["learning_rate_curve"]] == [0, 1]
    (row,) = plan["phases"]
    assert (row["latent_tokens_per_update"], row["clips"], row["overrides"]) == (2 * 2 * 2 * 2, 3, {})


def test_a_phase_of_the_preset_can_be_set(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "data.train=/nowhere",
        "curriculum.phases[2].updates=70_000",
        "curriculum.phases[0].learning_rate=3.0e-4",
    ]
    config.write_text(config.read_text().partition("curriculum:")[0] + "curriculum: {preset: default}\n")
    assert main([*_arguments("plan", config, run_folder, *settings), "--json", "--world-size", "8"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert [row["updates"] for row in plan["phases"]] == [50_000, 100_000, 70_000]
    assert [row["learning_rate_max"] for row in plan["phases"]] == [3e-4, 5e-5, 2e-5]
    assert [row["frames"] for row in plan["phases"]] == [9, 17, 49]
    assert plan["phases"][2]["first_update"] == 150_000


ENCODE = """\
data: {media: CLIPS, output_dir: OUT}
video: {model: {source: "aiprod_ds.testing.tiny:TinyVideoVAE", spatial_stride: 4, temporal_stride: 2}}
shapes: [{resolution: 16x16, duration: {frames: 5}}]
"""
SAMPLE = """\
output_dir: OUT
model:
  source: WanTransformer3DModel
  config: {num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, out_channels: 4, text_dim: 16, num_layers: 1}
vae: {source: "aiprod_ds.testing.tiny:TinyVideoVAE", spatial_stride: 4, temporal_stride: 2}
text: {pretrained: nowhere}
prompts: [a hare]
resolution: 16x16
duration: {frames: 5, frame_rate_hz: 24}
sampling: {guidance_scale: 1.0}
"""  # noqa: E501
CHECKED = {
    "encode": (ENCODE, "good, for encode: 3 clips, 3 latents and 0 captions for"),
    "sample": (SAMPLE, "good, for sample: 1 clips of 5 frames 16x16 for"),
    "encode without media": (ENCODE.replace("CLIPS", "/nowhere"), "data.media: /nowhere: must be a folder"),
    "encode, a wrong key": (
        ENCODE + "shape: 3\n",
        "shape: is not a known key, got 3. Did you mean 'shapes'?",
    ),
    "sample, a wrong size": (
        SAMPLE.replace("resolution: 16x16", "resolution: 18x18"),
        "resolution: must be a multiple of the VAE's",
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_check_knows_what_a_file_is_for(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, message = CHECKED[name]
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("CLIPS", str(clips)).replace("OUT", str(tmp_path / "out")))
    code = main(["check", str(path)])
    shown = capsys.readouterr()
    assert message in (shown.out if name in ("encode", "sample") else shown.err)
    assert code == (DONE if name in ("encode", "sample") else BAD_CONFIGURATION)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_eval_and_inspect_of_nothing(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments("eval", config, run_folder)) == FAILED
    assert main(["inspect", str(run_folder)]) == FAILED
    assert "must exist, got no such file or folder" in capsys.readouterr().err
    assert not run_folder.exists()
    (run_folder / "checkpoints").mkdir(parents=True)
    assert main(["inspect", str(run_folder)]) == FAILED
    assert "must be a run folder with checkpoints, got none" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_from_training_to_a_damaged_checkpoint(
    config: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run serves all steps, because training is what takes time."""
    with without_plots():
        assert main(_arguments("train", config, run_folder)) == DONE
    report = json.loads((run_folder / "report.json").read_text())
    assert (report["status"], report["updates"]) == ("completed", 2)
    capsys.readouterr()

    assert main(_arguments("eval", config, run_folder)) == DONE
    measured = json.loads(capsys.readouterr().out)
    assert measured["psnr_db"] == pytest.approx(
        report["metrics"]["psnr_db_after"], abs=1e-9
    )  # the same code on the same weights
    assert len(measured["clips"]) == len(set(measured["clips"])) > 0
    assert {entry["measure"] for entry in measured["not_judged"]} <= {"flicker_ratio"}

    converted = run_folder.with_name("converted")
    assert main(["convert", str(run_folder), str(converted), "--verify"]) == DONE
    capsys.readouterr()
    exported, found = (
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (run_folder / "export", converted)
    )
    assert exported.keys() == found.keys()  # the export measures latents_mean and latents_std
    assert all(
        torch.equal(found[name], value) for name, value in exported.items() if not name.startswith("latents_")
    )

    assert main(["inspect", str(run_folder), "--json"]) == DONE
    (shown,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (shown["name"], shown["problem"], shown["clock"]["updates"]) == ("update_000002", None, 2)
    assert main(["inspect", str(run_folder)]) == DONE
    assert "update_000002" in capsys.readouterr().out

    before = _contents(run_folder)
    assert main(_arguments("train", config, run_folder, "optimizer.weight_decay=0.5")) == BAD_CONFIGURATION
    assert "must be of the same configuration, got a checkpoint of another one" in capsys.readouterr().err
    assert main(_arguments("train", config, run_folder, f"{PHASE}.learning_rate=0.5")) == BAD_CONFIGURATION
    assert f"{PHASE}: must stay as it was" in capsys.readouterr().err
    assert (
        main([*_arguments("train", config, run_folder), "--resume", str(run_folder / "nowhere")])
        == BAD_CONFIGURATION
    )
    assert "--resume: must be auto, never or a checkpoint folder" in capsys.readouterr().err
    assert _contents(run_folder) == before

    (run_folder / "checkpoints" / "update_000002" / "state.json").write_text("{}")
    assert main(["inspect", str(run_folder), "--json"]) == FAILED
    (shown,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert "state.json: must have" in shown["problem"]
    assert main(_arguments("train", config, run_folder)) == FAILED
    assert "none of 1 checkpoints is whole" in capsys.readouterr().err


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [(SpikeError("x"), 78), (NonFiniteError("x"), 78), (DivergenceError("x"), 77), (DataError("x"), 1)],
)
def test_each_way_to_fail_has_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_arguments: object) -> int:
        raise error

    monkeypatch.setattr("aiprod_ds.cli._train", fail)
    assert main(["train", "any.yaml"]) == code
