"""The diffusion trainer on the local engine: every family, full and LoRA, its report, and what it refuses
before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.errors import CheckpointError, ConfigError, PlanError
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.trainers.diffusion import DiffusionTrainer

pytestmark = pytest.mark.slow

LEVELS = (0.25, 0.75)
SOUND = {"audio_vae": {"source": "AutoencoderKLLTX2Audio"}}
FAMILIES: dict[str, dict[str, Any]] = {
    family.name: {
        "model": {"source": family.transformer_class, "config": family.tiny_config()},
        "vae": {
            "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
            "spatial_stride": 32,
            "temporal_stride": 8,
        },
        **(SOUND if "audio" in family.modalities else {}),
    }
    for family in registry.FAMILIES
}


def _clips(count: int, *, seed: int, channels: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"latents": (channels, 2, 4, 4), "audio_latents": (2, 5, 4), "prompt_embeds": (3, 16)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def _trainer(
    folder: Path,
    family: str,
    *,
    clips: list[dict[str, Tensor]] | None = None,
    latent_rows: int = 4,
    updates: int = 2,
    **sections: Any,
) -> DiffusionTrainer:
    chosen = {**FAMILIES[family], **sections}
    stride = chosen["vae"]["spatial_stride"]
    phase = {"name": "only", "resolution": f"{latent_rows * stride}x{4 * stride}", "duration": {"frames": 9}}
    config = DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "data": {"train": "given_in_code", "num_workers": 0},
            "curriculum": {
                "phases": [{**phase, "updates": updates, "learning_rate": 3e-3, "global_batch_size": 4}]
            },
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 2, "num_pictures": 0, "noise_levels": LEVELS},
            **chosen,
        }
    )
    clips = clips or _clips(8, seed=0)
    return DiffusionTrainer(config, source="test.yaml", dataset=clips[:6], validation=clips[6:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_run_reports_every_noise_level_and_exports_a_model_that_loads(
    tmp_path: Path, family: str
) -> None:
    _trainer(tmp_path, family).train()
    report = json.loads((tmp_path / "report.json").read_text())
    modalities = ("video", "audio") if "audio_vae" in FAMILIES[family] else ("video",)
    measures = {f"{modality}_loss_at_{level}" for modality in modalities for level in LEVELS}
    assert {f"{name}_{when}" for name in measures for when in ("before", "after")} <= set(report["metrics"])
    assert report["metrics"]["loss_after"] != report["metrics"]["loss_before"]
    source = FAMILIES[family]["model"]["source"]
    _, problems = getattr(diffusers, source).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(problems.values())


def test_rows_have_the_tokens_and_the_flops_of_the_family(tmp_path: Path) -> None:
    """2 frames of 4 x 4 latents are 32 tokens; the family's FLOPs are compared with torch's elsewhere."""
    trainer = _trainer(tmp_path, "ltx")
    transformer = trainer.shapes
    expected = trainer.family.flops_per_update(transformer, batch_size=1, num_tokens={"video": 32})
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "throughput/tokens_per_second" in row]
    assert len(rows) == 2
    for row in rows:
        clips = row["throughput/clips_per_second"]
        assert row["throughput/tokens_per_second"] == pytest.approx(32 * clips)
        assert row["throughput/tflops_per_device"] == pytest.approx(expected * clips / 1e12)
        assert row["throughput/updates_per_second"] == pytest.approx(1 / row["time/update_seconds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_passes_train_the_same_bit_for_bit(tmp_path: Path, family: str) -> None:
    hashes = set()
    for graphs in ("off", "passes"):
        summary = _trainer(tmp_path / graphs, family, performance={"graphs": graphs}).train()
        hashes.add(summary.final_state_sha256)
    assert len(hashes) == 1
    rows = [(tmp_path / graphs / "metrics.jsonl").read_text().splitlines() for graphs in ("off", "passes")]
    losses = [[json.loads(line).get("loss/total") for line in lines] for lines in rows]
    assert losses[0] == losses[1]


def test_recomputing_every_second_block_trains_the_same_bit_for_bit(tmp_path: Path) -> None:
    hashes = set()
    for recompute in ("none", "every_n"):
        summary = _trainer(tmp_path / recompute, "ltx", performance={"recompute": recompute}).train()
        hashes.add(summary.final_state_sha256)
    assert len(hashes) == 1
    told = json.loads((tmp_path / "every_n" / "report.json").read_text())["performance"]
    assert told[-1] == "recompute 1 of 2 blocks in phase only: as configured"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_run_trains_adapters_alone_and_exports_them(tmp_path: Path, family: str) -> None:
    trainer = _trainer(tmp_path, family, training_mode="lora", lora={"rank": 2})
    summary = trainer.train()
    assert summary.updates == 2
    adapters = load_file(tmp_path / "export" / "peft" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)
    assert all(value.abs().max() > 0 for name, value in adapters.items() if ".lora_B." in name), (
        "B starts at zero"
    )
    assert not (tmp_path / "export" / "config.json").exists()


def test_the_loss_falls_at_every_noise_level_on_clips_that_are_alike(tmp_path: Path) -> None:
    alike = [{**clip, "latents": _clips(1, seed=3)[0]["latents"]} for clip in _clips(8, seed=0)]
    metrics = (
        _trainer(tmp_path, "ltx", clips=alike, updates=60, loss={"noise_level": {"uniform_fraction": 1.0}})
        .train()
        .metrics
    )
    for level in LEVELS:
        assert metrics[f"video_loss_at_{level}_after"] < 0.9 * metrics[f"video_loss_at_{level}_before"]


def test_the_held_out_loss_goes_on_where_it_was_when_all_weights_are_trained(tmp_path: Path) -> None:
    """Phases after the first move nothing: what they measure is what the adapters have reached, through both
    changes."""
    alike = [{**clip, "latents": _clips(1, seed=3)[0]["latents"]} for clip in _clips(8, seed=0)]
    phase = {"resolution": "128x128", "duration": {"frames": 9}, "global_batch_size": 4}
    lora = {"training_mode": "lora", "lora": {"rank": 4}}
    phases = [
        {**phase, **lora, "name": "adapters", "updates": 40, "learning_rate": 1e-2},
        {**phase, "training_mode": "full", "name": "whole", "updates": 1, "learning_rate": 1e-20},
        {**phase, **lora, "name": "new_adapters", "updates": 1, "learning_rate": 1e-20},
    ]
    _trainer(tmp_path, "ltx", clips=alike, curriculum={"phases": phases}).train()
    report = json.loads((tmp_path / "report.json").read_text())
    reached, whole, again = (phase["metrics"] for phase in report["phases"])
    for level in LEVELS:
        name = f"video_loss_at_{level}"
        learned = report["metrics"][f"{name}_before"] - reached[name]
        assert learned > 0.01, "or the adapters would not be missed"
        assert whole[name] == pytest.approx(
            reached[name], rel=1e-6, abs=0
        )  # fp32: W x + B (A x) against (W + B A) x
        assert again[name] == pytest.approx(reached[name], rel=1e-6, abs=0)


@pytest.mark.parametrize("form", ["peft", "comfyui.safetensors"])
@pytest.mark.parametrize("family", ["ltx", "wan"])
def test_a_run_goes_on_from_a_lora_merged_or_as_adapters(tmp_path: Path, family: str, form: str) -> None:
    """Both start with the function that the first run ended with: the same loss on the same held-out clips
    and noise."""
    lora = {"training_mode": "lora", "lora": {"rank": 2, "alpha": 3.0}}
    before = _trainer(tmp_path / "first", family, **lora).train().metrics
    file = {"path": str(tmp_path / "first" / "export" / form)}
    model = FAMILIES[family]["model"]
    merged = _trainer(tmp_path / "merged", family, model={**model, "lora_checkpoint": file}).train().metrics
    assert not (tmp_path / "first" / "export" / "base").exists(), "everybody has it"
    again = _trainer(tmp_path / "again", family, model={**model, "lora_checkpoint": file}, **lora)
    again.train()
    assert (tmp_path / "again" / "export" / "base" / "config.json").exists(), "nobody else has it"
    further = (
        _trainer(tmp_path / "further", family, model={**model, "lora_init": file}, **lora).train().metrics
    )
    assert before["loss_after"] != before["loss_before"]
    for found in (merged, further):
        assert found["loss_before"] == pytest.approx(
            before["loss_after"], rel=1e-6
        )  # fp32 sums in another order
        assert found["loss_after"] != found["loss_before"]


@pytest.mark.parametrize("key", ["lora_checkpoint", "lora_init"])
def test_a_lora_that_does_not_fit_is_refused_before_weights_are_loaded(tmp_path: Path, key: str) -> None:
    lora = {"training_mode": "lora", "lora": {"rank": 2}}
    _trainer(tmp_path / "wan", "wan", **lora).train()
    file = {"path": str(tmp_path / "wan" / "export" / "peft")}
    with pytest.raises(CheckpointError, match=r"peft.*must"):
        _trainer(tmp_path / "ltx", "ltx", model={**FAMILIES["ltx"]["model"], key: file}, **lora).plan()


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        (
            "ltx2",
            {"audio_vae": None},
            "test.yaml: audio_vae: must be given for the family 'ltx2', which makes sound",
        ),
        (
            "ltx2",
            {
                "model": {
                    "source": "LTX2VideoTransformer3DModel",
                    "config": {**LTX2.tiny_config(), "audio_hop_length": 320},
                }
            },
            (
                "test.yaml: model.config: audio_sampling_rate / audio_hop_length / audio_scale_factor must "
                "be "
                ".* 25, got 12.5"
            ),
        ),
        ("ltx", SOUND, "test.yaml: audio_vae: has no effect for the family"),
        (
            "ltx",
            {"loss": {"shared_noise_level": True}},
            "test.yaml: loss.shared_noise_level: has no effect for the family",
        ),
        (
            "ltx",
            {"loss": {"video_weight": 0.0}},
            r"test.yaml: curriculum.phases\[0\].loss: video_weight must exceed 0, got 0",
        ),
    ],
)
def test_settings_that_do_not_fit_the_family_are_refused(
    tmp_path: Path, family: str, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        _trainer(tmp_path, family, **sections).plan()


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "ltx", training_mode="lora", lora={"targets": ["to_q", "to_z"]})
    with pytest.raises(ConfigError, match=r"lora.targets\[1\]: must match a Linear layer of .*'to_z'"):
        trainer.plan()


def test_latents_of_another_vae_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="takes 4 values per token, got 8"):
        _trainer(tmp_path / "run", "ltx", clips=_clips(8, seed=0, channels=8)).train()
    assert not (tmp_path / "run").exists()


def test_latents_of_another_size_than_the_phase_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"validation\[0\]: must have latents of 2 frames of 8x4"):
        _trainer(tmp_path, "ltx", latent_rows=8).train()


def test_an_unknown_transformer_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path, "ltx", model={"source": "torch.nn:Linear", "config": {"in_features": 1, "out_features": 1}}
    )
    with pytest.raises(ConfigError, match="must be a transformer of a known family"):
        trainer.plan()
