"""Held-out measures of a run: what is refused before training, what is named, and what `eval` says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.cli import _found
from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.losses import PerceptualConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.losses import vgg
from aiprod_ds.losses.perceptual import PerceptualLoss
from aiprod_ds.metrics.evaluations import EVERY_MEASURE, NotJudged, read_evaluations
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_oobleck
from aiprod_ds.train.unit import Evaluation
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.measures import share_text
from aiprod_ds.trainers.video_vae import VideoVAETrainer

RATE_HZ = 8_000
PHASE = {"name": "only", "global_batch_size": 2, "updates": 1, "learning_rate": 1e-3}
FRAMES = 5


class ColourFeatures(nn.Module):
    """Six features: mean and spread of each colour; what a test has in place of I3D."""

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        flat_BCN = video_BCTHW.flatten(2)
        return torch.cat([flat_BCN.mean(2), flat_BCN.std(2)], dim=1)


def colour_features() -> nn.Module:
    return ColourFeatures()


FVD = {"network": f"{__name__}:colour_features", "size": 16}


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    yield
    dist.shutdown()


def _clips(count: int, *, frames: int = FRAMES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, frames, 16, 16, generator=generator) * 2 - 1 for _ in range(count)]


def _video(
    folder: Path,
    *,
    measures: dict[str, Any] | None = None,
    resolution: str = "16x16",
    validation: list[Tensor] | None = None,
    evaluation: dict[str, Any] | None = None,
    **sections: Any,
) -> VideoVAETrainer:
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**PHASE, "resolution": resolution, "duration": {"frames": FRAMES}}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "evaluation": {"max_clips": 4, "num_pictures": 0, "measures": measures or {}, **(evaluation or {})},
        **sections,
    }
    torch.manual_seed(0)
    return VideoVAETrainer(
        VAETrainerConfig.model_validate(values),
        model=TinyVideoVAE(),
        dataset=_clips(2),
        validation=validation or _clips(3, seed=1),
    )


def _audio(
    folder: Path,
    *,
    sounds: list[Tensor] | None = None,
    measures: dict[str, Any] | None = None,
    **sections: Any,
) -> AudioVAETrainer:
    model = {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ}
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"source": "AutoencoderOobleck", "config": model},
        "data": {"train": "given_in_code", "num_workers": 0, "sample_rate_hz": RATE_HZ, "channels": 1},
        "loss": {"spectral": {"fft_sizes": [64]}},
        "curriculum": {"phases": [{**PHASE, "duration": {"frames": 1040}}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "evaluation": {"max_clips": 4, "num_pictures": 0, "measures": measures or {}},
        **sections,
    }
    noise = [torch.rand(1040) - 0.5, torch.zeros(1040), torch.rand(1040) - 0.5]
    found = sounds or noise
    # Nothing can be learned from silence alone, so it is refused in training.
    clips = noise if all(not sound.any() for sound in found) else found
    return AudioVAETrainer(AudioVAETrainerConfig.model_validate(values), dataset=clips, validation=found)


@pytest.fixture
def vgg_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A VGG16 of random weights, which only a wrong hash tells from the real one."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = vgg.vgg16(weights=None).features.state_dict()
    state = {
        f"features.{name}": torch.randn(value.shape, generator=generator)
        * (0.01 if value.dim() == 1 else (2 / value[0].numel()) ** 0.5)
        for name, value in shapes.items()
    }
    torch.save(state, tmp_path / "vgg.pth")
    monkeypatch.setattr(vgg, "SHA256_PREFIX", "")
    return tmp_path / "vgg.pth"


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


def test_lpips_without_weights_is_refused_before_training(tmp_path: Path, no_weights: Path) -> None:
    with pytest.raises(PlanError) as caught:
        _video(tmp_path, measures={"lpips": "on"}).plan()
    message = str(caught.value)
    assert "configuration: evaluation.measures.lpips: needs VGG16 weights; not configured, not in" in message
    assert str(no_weights) in message
    assert "Set loss.perceptual.weights to a local copy of vgg16-397923af.pth" in message
    assert not no_weights.exists()


def test_a_configured_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    loss = {"perceptual_weight": 0.0, "perceptual": {"weights": "nowhere.pth"}}
    with pytest.raises(
        PlanError, match=r"measures\.lpips: perceptual\.weights: must be a file .* 'nowhere\.pth'"
    ):
        _video(tmp_path, measures={"lpips": "on"}, loss=loss).plan()


def test_lpips_of_small_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"must not be on for a last phase under 16x16, got 8x8"):
        _video(tmp_path, measures={"lpips": "on"}, resolution="8x8").plan()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("lpips", ["auto", "off"])
def test_without_it_no_weights_are_needed(tmp_path: Path, lpips: str) -> None:
    trainer = _video(tmp_path, measures={"lpips": lpips})
    assert trainer.measures(trainer.plan()) == ("psnr_db", "ssim", "flicker_error", "flicker_ratio")


@pytest.mark.parametrize(
    ("fvd", "evaluation", "message"),
    [
        (
            {"network": "nowhere.pt"},
            {},
            "configuration: evaluation.measures.fvd.network: must be a file, got",
        ),
        (FVD, {"max_clips": 1}, "evaluation.max_clips: must be at least 2 with evaluation.measures.fvd"),
        ({"network": f"{__name__}:no_such_thing"}, {}, "evaluation.measures.fvd.network: must be importable"),
    ],
)
def test_rfvd_that_cannot_be_measured_is_refused(
    tmp_path: Path, fvd: dict[str, Any], evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        _video(tmp_path, measures={"fvd": fvd}, evaluation=evaluation).plan()
    assert message in str(caught.value)


def test_check_is_told_that_few_clips_bias_rfvd(tmp_path: Path) -> None:
    trainer = _video(tmp_path, measures={"fvd": FVD})
    few, enough = (trainer._open_datasets(_clips(1), _clips(count)) for count in (3, 12))
    more = _video(tmp_path, measures={"fvd": FVD}, evaluation={"max_clips": 12})

    assert trainer.measure_notes(trainer.plan(), few)[0].startswith(
        "rfvd: measured on 3 clips; below 12, twice"
    )
    assert trainer.measure_notes(trainer.plan(), enough)[0].startswith("rfvd: measured on 4 clips")
    assert more.measure_notes(more.plan(), enough) == ()
    assert _video(tmp_path).measure_notes(trainer.plan(), few) == ()


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [
        ("psnr", "max", r"metric: must be one of psnr_db, ssim, .*got 'psnr'\. Did you mean 'psnr_db'"),
        ("rfvd", "min", r"metric: must be one of .*got 'rfvd'"),
        ("psnr_db", "min", r"mode: must be max for psnr_db, of which higher values are better, got min"),
        ("flicker_error", "max", r"mode: must be min for flicker_error"),
        ("flicker_ratio", "max", r"metric: must be best at .* best at 1\. Take flicker_error with mode: min"),
    ],
)
def test_keep_best_is_checked_against_what_is_measured(
    tmp_path: Path, metric: str, mode: str, message: str
) -> None:
    rule = {"metric": metric, "mode": mode}
    with pytest.raises(PlanError, match=r"configuration: checkpoint\.keep_best\." + message):
        _video(tmp_path, checkpoint={"keep_last": 1, "keep_best": rule}).plan()


def test_keep_best_may_name_what_the_run_measures(tmp_path: Path) -> None:
    rule = {"keep_last": 1, "keep_best": {"metric": "rfvd", "mode": "min"}}
    assert _video(tmp_path, checkpoint=rule, measures={"fvd": FVD}).plan().phases


class OwnTrainer(VideoVAETrainer):
    """May measure more than the class that it is derived from."""


def test_keep_best_of_a_trainer_of_ones_own_is_not_judged(tmp_path: Path) -> None:
    trainer = _video(tmp_path, checkpoint={"keep_last": 1, "keep_best": {"metric": "mine", "mode": "max"}})
    own = OwnTrainer(trainer.config, model=TinyVideoVAE(), dataset=_clips(2), validation=_clips(2))
    assert own.plan().phases


@pytest.mark.slow
def test_visqol_of_short_clips_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("visqol")
    with pytest.raises(PlanError, match=r"must give 1 s in the last phase for evaluation\.measures\.visqol"):
        _audio(tmp_path, measures={"visqol": True}).plan()


def test_a_share_is_told_only_where_clips_are_left_out() -> None:
    left_out = [
        NotJudged(clip="b", measure="ssim", reason="small"),
        NotJudged(clip="c", measure=EVERY_MEASURE, reason="short"),
    ]
    assert share_text("ssim", ["a", "b"], left_out) == " (1 of 2 clips)"
    assert share_text("psnr_db", ["a", "b"], left_out) == ""


@pytest.mark.slow
def test_a_run_measures_what_it_was_asked_for_and_says_on_which_clips(tmp_path: Path, vgg_file: Path) -> None:
    still = torch.zeros(3, FRAMES, 16, 16)
    short = _clips(1, frames=FRAMES - 2)[0]
    clips = [*_clips(2, seed=1), short, still]
    trainer = _video(
        tmp_path,
        measures={"lpips": "on", "fvd": FVD},
        validation=clips,
        loss={"perceptual_weight": 0.0, "perceptual": {"weights": str(vgg_file)}},
    )
    summary = trainer.train()
    *_, record = read_evaluations(tmp_path / "run")

    names = ("psnr_db", "ssim", "lpips_vgg", "rfvd", "flicker_error", "flicker_ratio")
    assert set(record.metrics) == set(names)
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert len(record.clips) == 3
    assert [(entry.measure, entry.reason) for entry in record.not_judged] == [
        ("flicker_ratio", "the original does not move"),
        (EVERY_MEASURE, "under 5 frames"),
    ]
    assert record.not_judged[0].clip == record.clips[-1]
    assert record.not_judged[1].clip not in record.clips
    assert [record.num_judged(name) for name in names] == [3, 3, 3, 3, 3, 2]
    assert [note for note in summary.replacements if note.startswith("rfvd: measured on 3 clips; below 12")]

    again = trainer.evaluation()
    assert (again.metrics, again.clips) == (record.metrics, record.clips)
    assert again.not_judged == record.not_judged


@pytest.mark.slow
def test_measures_change_no_update(tmp_path: Path, vgg_file: Path) -> None:
    loss = {"perceptual_weight": 0.0, "perceptual": {"weights": str(vgg_file)}}
    plain = _video(tmp_path / "plain", loss=loss).train()
    more = _video(tmp_path / "more", measures={"lpips": "on", "fvd": FVD}, loss=loss).train()

    assert plain.final_state_sha256 == more.final_state_sha256
    assert more.metrics.items() > plain.metrics.items()


@pytest.mark.slow
def test_auto_measures_with_the_network_of_the_loss(tmp_path: Path, vgg_file: Path) -> None:
    loss = {"perceptual_weight": 0.1, "perceptual": {"weights": str(vgg_file), "frames_per_clip": 1}}
    clips = _clips(2, seed=1)
    trainer = _video(tmp_path, validation=clips, loss=loss)
    trainer.train()
    found = trainer.evaluation()

    assert "lpips_vgg" in trainer.measures(trainer.plan())
    assert 0 < found.metrics["lpips_vgg"] < math.inf


@pytest.mark.slow
def test_lpips_is_measured_on_all_frames_in_pieces(vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PerceptualConfig(weights=str(vgg_file), frames_per_clip=1)
    x, y = (torch.stack(_clips(2, seed=seed)) for seed in (1, 2))
    everything = PerceptualLoss(config.model_copy(update={"frames_per_clip": 0}))
    expected = everything(y, x).item()

    monkeypatch.setattr("aiprod_ds.losses.perceptual._PIXELS_AT_ONCE", 3 * 16 * 16)
    # fp32 means over pieces of 3, 3, 3 and 1 images against one over 10.
    assert PerceptualLoss(config).measure(y, x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_silent_sound_is_named_and_the_headline_says_of_how_many_it_is(tmp_path: Path) -> None:
    trainer = _audio(tmp_path)
    trainer.train()
    *_, record = read_evaluations(tmp_path / "run")

    assert record.headline.endswith("(2 of 3 clips)")
    assert [record.num_judged(name) for name in ("mel_distance", "si_sdr_db")] == [2, 2]
    assert {entry.clip for entry in record.not_judged} == {record.clips[1]}
    assert {entry.reason for entry in record.not_judged} == {"digital silence"}


@pytest.mark.slow
def test_nothing_but_silence_is_said_and_stops_nothing(tmp_path: Path) -> None:
    summary = _audio(tmp_path, sounds=[torch.zeros(1040)] * 2).train()
    *_, record = read_evaluations(tmp_path / "run")

    assert record.headline == "no clip could be judged"
    assert record.metrics == {}
    assert len(record.not_judged) == 6
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == summary.status.value


@pytest.mark.slow
def test_visqol_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("visqol")
    phases = [{**PHASE, "duration": {"seconds": 1.0}}]
    sounds = [torch.rand(RATE_HZ, generator=torch.Generator().manual_seed(seed)) - 0.5 for seed in (0, 1)]
    trainer = _audio(tmp_path, sounds=sounds, measures={"visqol": True}, curriculum={"phases": phases})
    trainer.train()

    assert trainer.measures(trainer.plan())[-1] == "visqol"
    assert 1 <= read_evaluations(tmp_path / "run")[-1].metrics["visqol"] < 5


def test_a_keyword_of_another_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="visqol"):
        _video(tmp_path, measures={"visqol": True})


def test_what_eval_prints_is_json_also_of_a_model_that_diverged() -> None:
    left_out = (NotJudged(clip="b.mp4", measure="flicker_ratio", reason="one frame"),)
    metrics = {"psnr_db": math.nan, "ssim": 0.5}
    found = Evaluation(
        metrics=metrics, headline="", examples=None, clips=("a.mp4", "b.mp4"), not_judged=left_out
    )

    assert json.loads(json.dumps(_found(found), allow_nan=False)) == {
        "psnr_db": "nan",
        "ssim": 0.5,
        "clips": ["a.mp4", "b.mp4"],
        "not_judged": [{"clip": "b.mp4", "measure": "flicker_ratio", "reason": "one frame"}],
    }
