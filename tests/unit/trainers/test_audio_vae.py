"""The audio trainer on the local engine: run folder, report, resume, mel models, and what it refuses before
training."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.metrics.evaluations import read_evaluations
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.tiny import tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer

pytestmark = pytest.mark.slow

RATE_HZ = 8_000
SHORT_UPDATES, LONG_UPDATES = 3, 2
OOBLECK = {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ}
HOP_8 = {"source": "given_in_code", "temporal_stride": 8}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MEL_MODEL = {"base_channels": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "latent_channels": 4}


def _sounds(count: int, *, seed: int = 0, samples: int = 2_400) -> list[Tensor]:
    """Chords of three sines, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.arange(samples) / RATE_HZ
    chords = 100 + 900 * torch.rand(count, 3, generator=generator)
    return [0.2 * torch.sin(2 * torch.pi * chord[:, None] * seconds).sum(0) for chord in chords]


def _config(folder: Path, **sections: Any) -> AudioVAETrainerConfig:
    short = {"name": "short", "duration": {"frames": 512}, "global_batch_size": 4, "micro_batch_size": 2}
    long = {"name": "long", "duration": {"seconds": 0.13}, "global_batch_size": 2}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "AutoencoderOobleck", "config": OOBLECK},
        "data": {"train": "given_in_code", "num_workers": 0, "sample_rate_hz": RATE_HZ, "channels": 1},
        "loss": {"spectral": {"fft_sizes": [256, 64]}},
        "curriculum": {
            "phases": [
                {**short, "updates": SHORT_UPDATES, "learning_rate": 3e-3, "warmup_updates": 1},
                {**long, "updates": LONG_UPDATES, "learning_rate": 1e-3, "loss": {"mel_weight": 0.1}},
            ]
        },
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "checkpoint": {"every_updates": 2},
        "evaluation": {"max_clips": 2, "num_pictures": 1},
        **sections,
    }
    return AudioVAETrainerConfig.model_validate(values)


def _trainer(
    folder: Path, *, module: nn.Module | None = None, dataset: Any = None, **sections: Any
) -> AudioVAETrainer:
    clips = {"dataset": dataset or _sounds(6), "validation": _sounds(3, seed=1)}
    return AudioVAETrainer(_config(folder, **sections), model=module, **clips)


def _losses(folder: Path) -> dict[int, float]:
    return {
        update: row["loss/total"]
        for update, row in read_metrics(folder / "metrics.jsonl")
        if "loss/total" in row
    }


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    yield
    dist.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with dist.process_group():
        _trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def report(whole: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((whole / "report.json").read_text())
    return found


def test_the_report_says_what_was_done(report: dict[str, Any]) -> None:
    assert (report["status"], report["trainer"], report["updates"]) == (
        "completed",
        "audio_vae",
        SHORT_UPDATES + LONG_UPDATES,
    )
    assert [(phase["name"], phase["resolution"], phase["frames"]) for phase in report["phases"]] == [
        ("short", "", 512),
        ("long", "", 1_040),
    ]
    assert report["phases"][1]["shapes"] == ["1,040 samples (0.13 s), batch 2"]
    measures = ("mel_distance", "stft_distance", "si_sdr_db")
    assert {f"{name}_{when}" for name in measures for when in ("before", "after")} == set(report["metrics"])
    assert (report["data"]["clips"], report["data"]["held_out_clips"], report["replacements"]) == (6, 3, [])


def test_there_is_something_to_see_and_to_hear(whole: Path, report: dict[str, Any]) -> None:
    assert [picture["path"] for picture in report["pictures"]] == [
        "samples/before.png",
        "samples/phase_1_short.png",
        "samples/phase_2_long.png",
        "samples/original_clip_1.wav",
        "samples/before_clip_1.wav",
        "samples/phase_1_short_clip_1.wav",
        "samples/phase_2_long_clip_1.wav",
    ]
    with wave.open(str(whole / "samples" / "before_clip_1.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE_HZ, 1, 1_040)
    page = (whole / "report.md").read_text()
    assert "| samples |" in page
    assert "[clip 1, after phase long](samples/phase_2_long_clip_1.wav)" in page


def test_an_evaluation_inside_a_phase_has_sounds_of_its_own(whole: Path, tmp_path: Path) -> None:
    evaluation = {"max_clips": 2, "num_pictures": 1, "every_updates": 2}
    summary = _trainer(tmp_path, evaluation=evaluation).train()
    report = json.loads((whole / "report.json").read_text())
    assert summary.final_state_sha256 == report["final_state_sha256"], "nothing in training changed"
    record = next(found for found in read_evaluations(tmp_path) if found.update == 2)
    assert record.clips == ("validation[0]", "validation[1]")
    assert [(medium.path, medium.kind, medium.role, medium.source) for medium in record.media] == [
        ("samples/update_000002.png", "picture", "sheet", ""),
        ("samples/original_clip_1.wav", "sound", "original", "validation[0]"),
        ("samples/update_000002_clip_1.wav", "sound", "reconstruction", "validation[0]"),
    ]
    assert all((tmp_path / medium.path).stat().st_size for medium in record.media)


def test_the_terms_that_are_measured_stand_in_every_row(whole: Path) -> None:
    rows = [row for _, row in read_metrics(whole / "metrics.jsonl") if "loss/total" in row]
    terms = {
        "loss/waveform_l1",
        "loss/spectral",
        "loss/kl",
        "loss/mel",
        "latent/mean",
        "latent/std",
        "latent/collapsed_share",
    }
    assert all(terms <= set(row) for row in rows)
    config = _config(whole).loss
    for row in rows[:SHORT_UPDATES]:  # fp32 sums of two micro-batches
        weighted = (
            config.waveform_weight * row["loss/waveform_l1"]
            + row["loss/spectral"]
            + config.kl_weight * row["loss/kl"]
        )
        assert row["loss/total"] == pytest.approx(weighted, rel=1e-5)
    assert rows[-1]["loss/total"] > rows[-1]["loss/spectral"] + 0.1 * rows[-1]["loss/mel"], (
        "the last phase weighs the mel term"
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")  # diffusers' own
def test_the_export_loads_in_diffusers_with_the_statistics_beside_it(whole: Path) -> None:
    model = diffusers.AutoencoderOobleck.from_pretrained(whole / "export")
    exported = load_file(whole / "export" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
    statistics = json.loads((whole / "export" / "latent_statistics.json").read_text())
    assert statistics["clips"] == 2
    start = (2_400 - 1_040) // 2  # held-out clips are the middle of each sound, in the last phase's length
    clips = torch.stack([sound[None, start : start + 1_040] for sound in _sounds(3, seed=1)[:2]])
    with torch.no_grad():
        mean = model.encode(clips).latent_dist.mean
    # Oracle: torch on the exported model; fp32 means in another batch.
    assert statistics["latents_mean"] == pytest.approx(mean.mean(dim=(0, 2)).tolist(), abs=1e-5)
    assert statistics["latents_std"] == pytest.approx(mean.std(dim=(0, 2), correction=0).tolist(), abs=1e-5)


@pytest.mark.parametrize("updates", [2, SHORT_UPDATES, 4], ids=["middle", "edge", "second phase"])
def test_resume_from_a_checkpoint_repeats_the_uninterrupted_run(
    whole: Path, report: dict[str, Any], run_folder: Path, updates: int
) -> None:
    summary = _trainer(run_folder).train(resume=str(whole / "checkpoints" / f"update_{updates:06d}"))
    assert summary.final_state_sha256 == report["final_state_sha256"]
    assert dict(summary.metrics) == report["metrics"]
    assert _losses(run_folder) == {
        update: loss for update, loss in _losses(whole).items() if update > updates
    }


def test_evaluation_repeats_the_reported_measures(whole: Path, report: dict[str, Any]) -> None:
    measures = _trainer(whole).evaluate()
    assert measures == {name: report["metrics"][f"{name}_after"] for name in measures}


def test_a_phase_may_recompute_activations(whole: Path, report: dict[str, Any], run_folder: Path) -> None:
    settings = {"activation_checkpointing": {"enabled": True}}
    summary = _trainer(run_folder, engine={"kind": "local", "deepspeed_config": settings}).train()
    assert summary.final_state_sha256 == report["final_state_sha256"], "recomputing repeats the same kernels"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_begin_as_fp32_does(whole: Path, run_folder: Path, precision: str) -> None:
    # 16 channels: bf16 convolutions of 8 with kernel 8 are wrong in oneDNN of torch 2.14.1 on a CPU with AMX.
    model = {
        "source": "AutoencoderOobleck",
        "config": {**OOBLECK, "encoder_hidden_size": 16, "decoder_channels": 16},
    }
    model["config"]["decoder_input_channels"] = 8
    phase = {"name": "only", "duration": {"frames": 1040}, "global_batch_size": 2, "learning_rate": 1e-3}
    curriculum = {"phases": [{**phase, "updates": 2}]}
    losses = {}
    for name in ("fp32", precision):
        settings: dict[str, Any] = {"zero_optimization": {"stage": 1}}
        if name != "fp32":
            settings[name] = (
                {"enabled": True} if name == "bf16" else {"enabled": True, "initial_scale_power": 8}
            )
        folder = run_folder.with_name(name)
        engine = {"kind": "local", "deepspeed_config": settings}
        summary = _trainer(folder, model=model, engine=engine, curriculum=curriculum).train()
        assert (summary.precision, summary.updates, summary.skipped_updates) == (name, 2, 0)
        losses[name] = list(_losses(folder).values())
    assert losses[precision] != losses["fp32"]
    # Oracle: fp32. Weights and activations have 8 or 11 bits; measured: 2e-4 in bf16, 7e-5 in fp16.
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], rel=2e-3)


def test_sound_that_diverged_is_shown_but_not_written(
    run_folder: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Loud(nn.Module):
        """Decodes to infinity."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv1d(1, 4, 8, stride=8)
            self.up = nn.ConvTranspose1d(2, 1, 8, stride=8)

        def encode(self, wave_BCN: Tensor) -> tuple[Tensor, Tensor]:
            mean, logvar = self.down(wave_BCN).chunk(2, dim=1)
            return mean, logvar

        def decode(self, latent: Tensor) -> Tensor:
            decoded: Tensor = self.up(latent)
            return decoded if self.training else decoded * torch.inf

    _trainer(run_folder, module=Loud(), model=HOP_8).train()
    assert (run_folder / "samples" / "original_clip_1.wav").is_file()
    assert not list((run_folder / "samples").glob("before*.wav"))
    assert "before_clip_1.wav reason=samples_not_finite" in caplog.text


def test_where_no_clip_can_be_judged_a_resumed_run_does_not_measure_before_training_again(
    run_folder: Path,
) -> None:
    config, clips = _config(run_folder), {"dataset": _sounds(6), "validation": [torch.zeros(2_400)] * 2}
    expected = AudioVAETrainer(config, **clips).train()
    middle = str(run_folder / "checkpoints" / "update_000002")
    assert AudioVAETrainer(config, **clips).train(resume=middle).metrics == expected.metrics == {}
    places = [(record.update, record.reason) for record in read_evaluations(run_folder)]
    assert places == [(0, "before"), (3, "phase_end"), (5, "phase_end")]


def test_a_mel_model_learns_spectrograms(run_folder: Path) -> None:
    samples = 640 * 8
    sections: dict[str, Any] = {
        "model": {"source": "AutoencoderKLLTX2Audio", "config": MEL_MODEL},
        "data": {"train": "given_in_code", "num_workers": 0, "sample_rate_hz": 16_000},
        "loss": {"mel_weight": 1.0, "waveform_weight": 0.0, "spectral_weight": 0.0},
        "curriculum": {
            "phases": [
                {
                    "name": "only",
                    "duration": {"frames": samples},
                    "global_batch_size": 2,
                    "updates": 20,
                    "learning_rate": 1e-2,
                }
            ]
        },
    }
    clips = {"dataset": _sounds(4, samples=samples), "validation": _sounds(2, seed=1, samples=samples)}
    summary = AudioVAETrainer(_config(run_folder, **sections), **clips).train()
    assert summary.metrics["log_mel_l1_after"] < 0.8 * summary.metrics["log_mel_l1_before"]
    pictures = [picture.path for picture in summary.pictures]
    assert pictures == ["samples/before.png", "samples/phase_1_only.png"], "and no sound"
    statistics = json.loads((run_folder / "export" / "latent_statistics.json").read_text())
    assert len(statistics["latents_std"]) == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"train": "s", "channels": 1}},
            "data.sample_rate_hz: must be the model's, 8000, got 44100. Set it",
        ),
        (
            {"data": {"train": "s", "sample_rate_hz": RATE_HZ}},
            "data.channels: must be the model's, 1, got 2. Set it",
        ),
    ],
)
def test_data_that_the_model_does_not_take_is_refused(
    run_folder: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        _trainer(run_folder, **sections).plan()


def _one_phase(**changes: Any) -> dict[str, Any]:
    phase = {
        "name": "a",
        "duration": {"frames": 2_048},
        "global_batch_size": 2,
        "updates": 2,
        "learning_rate": 1e-3,
        **changes,
    }
    return {"phases": [phase]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"curriculum": _one_phase(duration={"frames": 1_024})},
            r"phases\[0\].duration: must give at least 1025 samples in the last phase, .* got 1024",
        ),
        (
            {"curriculum": _one_phase(loss={"spectral_weight": 0.0, "waveform_weight": 0.0})},
            r"phases\[0\].loss: one of waveform_weight, spectral_weight, mel_weight must exceed 0",
        ),
        (
            {"curriculum": {**_one_phase(duration={"seconds": 0.2002}), "frames_policy": "strict"}},
            (
                r"duration.seconds: must give 8 \* k samples for this model \(frames_policy: strict\), got "
                r"1602. Use 1600 or 1608"
            ),
        ),
    ],
)
def test_phases_that_cannot_be_trained_or_measured_are_refused(
    run_folder: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        _trainer(run_folder, **sections).plan()


def test_a_mel_model_is_not_trained_on_waveforms(run_folder: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"source": "AutoencoderKLLTX2Audio", "config": MEL_MODEL},
        "data": {"train": "s", "sample_rate_hz": 16_000},
        "curriculum": _one_phase(),
    }
    with pytest.raises(PlanError) as caught:
        _trainer(run_folder, **sections).plan()
    text = str(caught.value)
    assert "curriculum.phases[0].loss: one of mel_weight must exceed 0 in this phase, got 0 for all." in text
    assert (
        "waveform_weight has no effect on a model of mel spectrograms, got 0.1. Set loss.waveform_weight to "
        "0." in text
    )
    assert "loss.mel: neither this nor loss.spectral has an effect on a model of mel spectrograms" in text


def test_sounds_that_are_too_short_are_named(run_folder: Path) -> None:
    sounds = [*_sounds(3), *_sounds(1, samples=600)]
    summary = _trainer(run_folder, dataset=sounds).train()
    assert summary.data.too_short == (("dataset[3]", "under 1,040 samples (0.13 s), unused in phase long"),)
    with pytest.raises(
        PlanError, match=r"duration: must be at most the samples of the longest clip at 8000 Hz \(600, "
    ):
        _trainer(run_folder, dataset=_sounds(2, samples=600)).train()


class _Plain(nn.Module):
    """Encodes to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, 2, 8, stride=8)
        self.decode = nn.ConvTranspose1d(2, 1, 8, stride=8)


def test_a_deterministic_model_is_trained_without_a_divergence(run_folder: Path) -> None:
    module = _Plain()
    before = module.encode.weight.detach().clone()
    summary = _trainer(run_folder, module=module, model=HOP_8).train()
    assert summary.updates == SHORT_UPDATES + LONG_UPDATES
    rows = [row for _, row in read_metrics(run_folder / "metrics.jsonl") if "loss/total" in row]
    assert {"loss/kl", "latent/collapsed_share"} & {name for row in rows for name in row} == set()
    assert "latent/std" in rows[0]
    assert not torch.equal(load_file(run_folder / "export" / WEIGHTS)["encode.weight"], before)


def test_a_decoder_alone_leaves_the_encoder_as_it_is(run_folder: Path) -> None:
    phase = {"name": "decoder", "duration": {"frames": 1_040}, "global_batch_size": 2, "updates": 1}
    stage = {"decoder_only": True, "latents": "mode", "learning_rate": 1e-2}
    trainer = _trainer(run_folder, curriculum={"phases": [{**phase, **stage}]})
    trainer.train()
    before = build_model(trainer.config.model, seed=trainer.config.seed).state_dict()
    after = load_file(run_folder / "export" / WEIGHTS)
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"decoder"}


def test_a_divergence_is_refused_where_there_is_none(run_folder: Path) -> None:
    loss = {"spectral": {"fft_sizes": [256, 64]}, "kl_weight": 0.1, "kl_free_bits": 0.5}
    with pytest.raises(PlanError) as caught:
        _trainer(run_folder, module=_Plain(), model=HOP_8, loss=loss).plan()
    text = str(caught.value)
    assert "loss.kl_weight: has no effect for a model without a posterior, got 0.1. Remove it." in text
    assert "loss.kl_free_bits: has no effect for a model without a posterior, got 0.5. Remove it." in text


def test_held_out_clips_need_training_clips(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="AudioVAETrainer: validation has no effect without dataset"):
        AudioVAETrainer(_config(run_folder), validation=_sounds(2))
