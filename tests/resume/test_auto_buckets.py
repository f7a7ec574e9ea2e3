"""A training whose buckets are found from its clips: what `plan` shows is what runs, and a resumed run has
the same buckets and repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.cli import main
from aiprod_ds.config.load import load_config
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.strict_yaml import write_yaml
from aiprod_ds.testing.runs import record_of, repeatable_rows, train_and_resume
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six wide, three tall and two short clips and two held-out ones, and a configuration."""
    root = tmp_path_factory.mktemp("auto")
    write_synthetic_clips(root / "clips" / "wide", num_clips=6, frames=12, height=32, width=64)
    write_synthetic_clips(root / "clips" / "tall", num_clips=3, frames=12, height=64, width=32, seed=1)
    write_synthetic_clips(root / "clips" / "short", num_clips=2, frames=4, height=32, width=64, seed=2)
    write_synthetic_clips(root / "held_out", num_clips=2, frames=12, height=32, width=64, seed=3)
    values = {
        "trainer": "video_vae",
        "output_dir": str(root / "out"),
        "model": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"},
        "data": {"train": str(root / "clips"), "validation": str(root / "held_out"), "num_workers": 0},
        "curriculum": {
            "phases": [
                {
                    "name": "low",
                    "resolution": "16x16",
                    "duration": {"frames": 5},
                    "buckets": "auto",
                    "micro_batch_size": 2,
                    "epochs": 2,
                    "schedule": "constant",
                    "learning_rate": 1e-3,
                }
            ]
        },
        "engine": {"kind": "local"},
        "loss": {"perceptual_weight": 0.0},
        "checkpoint": {"every_updates": 3, "keep_last": 9},
        "report": {"flush_updates": 1},
    }
    (root / "auto.yaml").write_text(write_yaml(values))
    return root


# Of 3x5 cells of 4 pixels each keeps most: 45 tokens of at most 48, so that 2 of 96 tokens are 2; the short
# clips have 30, 3 would do, but there are two.
SHAPES = [
    (5, 12, 20, 2, 6),
    (5, 20, 12, 2, 3),
    (3, 12, 20, 2, 2),
]


def test_plan_shows_what_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "auto.yaml"), "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    rows = [
        (row["frames"], row["height"], row["width"], row["global_batch_size"], row["clips"])
        for row in page["phases"]
    ]
    assert rows == SHAPES
    assert [row["latent_tokens_per_update"] for row in page["phases"]] == [90, 90, 60]
    assert page["found"][0] == (
        "phase low, bucket 0: found for 6 of 11 clips (55%): 5 frames 12x20, 16.7% of pictures cropped, "
        "0.0% of lengths left out, 45 of at most 48 tokens a clip, micro-batch 2"
    )
    assert main(["plan", str(folder / "auto.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "bucket 2: found for 2 of 11 clips (18%): 3 frames 12x20, 16.7% of pictures cropped" in shown
    assert main(["check", str(folder / "auto.yaml")]) == 0
    assert "phase low, bucket 1: found for 3 of 11 clips (27%)" in capsys.readouterr().err


def test_a_resumed_run_has_the_same_buckets_bitwise(folder: Path, tmp_path: Path) -> None:
    def train(output: Path) -> dict[str, Any]:
        config = load_config(folder / "auto.yaml", output_dir=str(output))
        assert isinstance(config, VAETrainerConfig)
        return record_of(VideoVAETrainer(config).train(), output)

    records = train_and_resume(train, tmp_path / "whole", {"middle": 3})
    # Two passes: 6, 3 and 2 updates, since 3 clips fill a batch and a half a pass.
    assert records["whole"]["updates"] == [6 + 3 + 2]
    assert records["middle"]["resumed_from"] == ["update_000003"]
    for key in ("sha256", "rows", "updates"):
        assert records["middle"][key] == records["whole"][key]
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    found = [note for note in report["replacements"] if "found for" in note]
    assert len(found) == len(SHAPES)
    assert repeatable_rows(tmp_path / "whole")
