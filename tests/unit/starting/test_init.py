"""`aiprod-ds init` writes files that check and fit, for each kind of run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from aiprod_ds.cli import main
from aiprod_ds.config.load import load_config
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.tiny import tiny_ltx_vae

_SAMPLES = Path(__file__).resolve().parents[3] / "samples"
_T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shipped clips in it, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(_SAMPLES, tmp_path / "clips")
    (tmp_path / "clips" / "notes.txt").write_text("nothing of it is trained on")
    return tmp_path / "clips"


def _init(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["init", *arguments])
    caught = capsys.readouterr()
    assert code == 0, caught.err
    return caught.out + caught.err


def test_a_video_vae_of_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = _init(
        capsys, "run.yaml", "--train", "video_vae", "--data", "clips", "--machine", "cpu", "--gpus", "2"
    )
    assert "run.yaml: good\nNext:\n  aiprod-ds launch run.yaml\n" in said
    config = load_config(Path("run.yaml"))
    assert (config.data.train, config.output_dir) == ("clips", "runs/run")
    assert all(phase.resolution.height <= 180 for phase in config.curriculum.phases if phase.resolution)
    text = Path("run.yaml").read_text()
    assert "#   for clips: 11 clips, 180 pixels and more in the shorter side" in text
    assert sum(" # " in line for line in text.splitlines()) > 10
    assert main(["plan", "run.yaml", "--world-size", "2"]) == 0


def test_an_audio_vae_of_a_cpu(capsys: pytest.CaptureFixture[str], clips: Path) -> None:
    said = _init(capsys, "--train", "audio_vae", "--data", str(clips), "--machine", "cpu")
    assert "audio_vae.yaml: good" in said
    assert "6 files cannot be used" in said  # films without sound
    config: Any = load_config(Path("audio_vae.yaml"))
    assert (config.data.sample_rate_hz, config.data.channels) == (16_000, 1)
    assert config.data.max_unreadable_fraction > 6 / 11


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LTX-Video, with the parts of the published one."""
    root = tmp_path_factory.mktemp("ltx")
    vae = tiny_ltx_vae(patch_size=4, scaling=(True, True, True, False))
    transformer = ModelConfig(source=LTXVideo.transformer_class, config=LTXVideo.tiny_config())
    build_model(transformer, seed=0).save_pretrained(root / "transformer")
    build_model(ModelConfig(source="AutoencoderKLLTXVideo", config=vae), seed=0).save_pretrained(root / "vae")
    with torch.random.fork_rng():
        T5EncoderModel(T5Config(**_T5)).save_pretrained(root / "text_encoder")
    ByT5Tokenizer(extra_ids=0).save_pretrained(str(root / "tokenizer"))
    return str(root)


def test_a_lora_of_ltx_video_from_clips_to_what_trains(capsys: pytest.CaptureFixture[str], ltx: str) -> None:
    given = ("--train", "ltx_lora", "--data", "clips/validation.csv", "--model", ltx, "--machine", "cpu")
    said = _init(capsys, "lora.yaml", *given)
    assert "lora_encode.yaml: good, for encode: 3 clips" in said
    assert said.endswith("Next:\n  aiprod-ds launch lora_encode.yaml\n  aiprod-ds launch lora.yaml\n")
    assert main(["check", "lora.yaml"]) == 2  # there are no latents yet
    assert main(["encode", "lora_encode.yaml"]) == 0
    assert main(["check", "lora.yaml"]) == 0, capsys.readouterr().err
    config: Any = load_config(Path("lora.yaml"))
    assert (config.training_mode, config.lora.rank) == ("lora", 32)


def test_what_is_written_for_gpus_fits_them(capsys: pytest.CaptureFixture[str], ltx: str) -> None:
    given = ("--train", "ltx_full", "--data", "clips/train.csv", "--model", ltx)
    _init(capsys, "full.yaml", *given, "--machine", "h100-80gb", "--gpus", "8")
    config = load_config(Path("full.yaml"))
    assert config.engine.deepspeed_config == "zero1_bf16"
    for phase in config.curriculum.phases:
        assert phase.micro_batch_size
        assert phase.activation_checkpointing is not None
    assert main(["plan", "full.yaml", "--machine", "h100-80gb", "--gpus", "8", "--json"]) == 0
    assert '"fits": false' not in capsys.readouterr().out
    assert main(["init", "other.yaml", *given, "--machine", "v100-32gb"]) == 2
    assert "model.attention_head_dim: must be a multiple of 8 in fp16" in capsys.readouterr().err


def test_clips_without_captions_and_of_many_shapes_are_told(
    capsys: pytest.CaptureFixture[str], clips: Path, ltx: str
) -> None:
    for name in ("train.csv", "validation.csv"):
        (clips / name).unlink()
    said = _init(
        capsys, "lora.yaml", "--train", "ltx_lora", "--data", "clips", "--model", ltx, "--machine", "cpu"
    )
    assert "11 of 11 clips have no caption and are trained with an empty one" in said
    assert 'default_caption: ""' in Path("lora_encode.yaml").read_text()


def test_missing_options_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 2
    errors = capsys.readouterr().err
    assert "--train: must be given" in errors
    assert "--data: must be given" in errors


def test_a_file_is_not_written_over_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("video_vae.yaml").write_text("mine")
    given = ("--train", "video_vae", "--data", "clips", "--machine", "cpu")
    assert main(["init", *given]) == 2
    assert "video_vae.yaml: must not exist, got a file" in capsys.readouterr().err
    assert Path("video_vae.yaml").read_text() == "mine"
    _init(capsys, *given, "--force")


@pytest.mark.parametrize(("data", "problem"), [("nowhere", "got nothing there"), ("one", "at least 2 clips")])
def test_media_that_do_not_do_are_told(
    capsys: pytest.CaptureFixture[str], clips: Path, data: str, problem: str
) -> None:
    Path("one").mkdir()
    shutil.copy(clips / "train" / "bunny_meadow.mp4", "one")
    assert main(["init", "--train", "video_vae", "--data", data, "--machine", "cpu"]) != 0
    assert problem in capsys.readouterr().err
    assert not Path("video_vae.yaml").exists()


def test_a_terminal_is_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("video_vae\nno_such_folder\nclips\ncpu\n1\n"))
    said = _init(capsys)
    assert "What do you train?" in said
    assert "no_such_folder: nothing is there" in said
    assert "video_vae.yaml: good" in said
