"""The run report end to end: plots, pictures, sounds and both files from made-up results, read back and
checked."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from aiprod_ds.errors import DataError
from aiprod_ds.media.pictures import save_comparison, save_comparison_video, to_pixels
from aiprod_ds.media.sounds import save_spectrograms, save_wav
from aiprod_ds.metrics.jsonl import MetricRow
from aiprod_ds.report.console import print_summary
from aiprod_ds.report.curves import smooth
from aiprod_ds.report.environment import describe_environment
from aiprod_ds.report.plots import save_plots
from aiprod_ds.report.report_view import render_report
from aiprod_ds.report.run_report import write_report
from aiprod_ds.report.summary import DataSummary, PhaseSummary, Picture, RunStatus, RunSummary


def example_summary(**changes: object) -> RunSummary:
    phases = tuple(
        PhaseSummary(
            name=name,
            updates=300,
            resolution=f"{side}x{side}",
            frames=9,
            batch=8,
            lr_max=1e-3,
            seconds=seconds,
            ended_by="updates",
        )
        for name, side, seconds in (("low", 64, 40.2), ("medium", 96, 80.0), ("high", 128, 3700.0))
    )
    summary = RunSummary(
        name="video_vae_tiny",
        trainer="video_vae",
        model="AutoencoderKLLTXVideo",
        parameters=1_234_567,
        status=RunStatus.COMPLETED,
        updates=900,
        planned_updates=900,
        skipped_updates=0,
        phases=phases,
        metrics={"ssim_before": 0.112, "ssim_after": 0.713, "psnr_db_before": 11.31, "psnr_db_after": 23.71},
        final_state_sha256="ab" * 32,
        world_size=2,
        engine="DeepSpeed",
        zero_stage=1,
        precision="bf16",
        time_seconds={"start": 8.0, "train": 233.0, "evaluation": 26.0},
        peak_rss_bytes=3 * 2**30,
        environment=describe_environment(),
        data=DataSummary(clips=12, held_out_clips=4),
    )
    return dataclasses.replace(summary, **changes)  # type: ignore[arg-type]


def example_rows() -> list[MetricRow]:
    rows: list[MetricRow] = []
    for update in range(1, 91):
        phase = (update - 1) // 30
        loss = math.exp(-update / 30)
        values = {
            "loss/total": loss,
            "loss/kl": 1.0,
            "learning_rate": 1e-3,
            "clock/phase": phase,
            "memory/rss_bytes": 2.0**30,
        }
        values |= {
            "throughput/clips_per_second": 9.0,
            "gradient/loss_scale": 1.0,
            "gradient/norm": 1.0 if update != 7 else math.nan,
        }
        rows.append((update, {name: float(value) for name, value in values.items()}))
    rows.append((90, {"evaluation/psnr_db": 21.0}))
    return rows


def example_clips(num_frames: int = 9, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(2, 3, num_frames, side, side, generator=generator) * 2 - 1
    return original, original * 0.5


@pytest.mark.slow
def test_a_whole_report_is_written_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    plots = save_plots(example_rows(), tmp_path / "plots", phase_names=["low", "medium", "high"])
    original, reconstruction = example_clips()
    save_comparison(
        original, reconstruction, tmp_path / "samples/high.png", title="high", psnr_db=[20.1, 19.9]
    )
    save_comparison_video(original, reconstruction, tmp_path / "samples/high.mp4")
    pictures = (
        Picture(path="samples/high.png", caption="Phase high"),
        Picture(path="samples/high.mp4", caption="Film"),
    )
    json_path, page_path = write_report(tmp_path, example_summary(plots=plots, pictures=pictures))

    page = page_path.read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert set(links) == {"samples/high.png", "samples/high.mp4", *(plot.path for plot in plots)}
    assert all((tmp_path / link).stat().st_size > 1000 for link in links)
    assert "**PSNR on 4 held-out clips: 11.31 → 23.71 dB (+12.40 dB)**" in page
    assert page.index("PSNR |") < page.index("SSIM |")
    assert "| high | 300 | updates | 128x128 | 9 | 8 | 1.00e-03 | 1 h 01 min |" in page
    assert "Nothing: every setting took effect" in page
    assert "Every file could be used." in page
    assert list(tmp_path.glob("*.tmp")) == []
    assert json.loads(json_path.read_text())["plots"][0] == {
        "path": "plots/loss.png",
        "caption": "Loss terms, raw and smoothed",
    }


@pytest.mark.parametrize(
    ("measured", "judged", "expected"),
    [
        (5, {"psnr_db": 4}, "**PSNR on 4 of 5 held-out clips: "),
        (3, {"psnr_db": 3}, "**PSNR on 3 held-out clips: "),  # of more that were held out
        (0, {}, "**PSNR on 4 held-out clips: "),
    ],
)
def test_the_headline_stands_over_the_clips_that_were_judged(
    measured: int, judged: dict[str, int], expected: str
) -> None:
    assert expected in render_report(example_summary(measured_clips=measured, judged_clips=judged))


def test_report_json_holds_what_the_contract_names(tmp_path: Path) -> None:
    json_path, _ = write_report(
        tmp_path, example_summary(metrics={"psnr_db_before": math.inf, "psnr_db_after": 2.0})
    )
    report = json.loads(
        json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON")
    )
    assert (report["status"], report["updates"], report["world_size"], report["zero_stage"]) == (
        "completed",
        900,
        2,
        1,
    )
    assert report["precision"] == "bf16"
    assert report["final_state_sha256"] == "ab" * 32
    assert report["metrics"] == {"psnr_db_before": "inf", "psnr_db_after": 2.0}
    assert report["versions"]["torch"] == torch.__version__
    assert {"name", "updates", "resolution", "frames", "batch", "lr_max", "seconds"} <= set(
        report["phases"][0]
    )
    assert report["data"]["unreadable"] == []


def test_problems_are_told_in_both_files(tmp_path: Path) -> None:
    many = tuple((f"clip_{index:03d}.mp4", "5 frames, need 17") for index in range(60))
    summary = example_summary(
        status=RunStatus.FAILED,
        updates=400,
        error="loss became NaN at update 401",
        skipped_updates=3,
        final_state_sha256=None,
        replacements=("frames 8 -> 9 in phase low",),
        resumed_from=("checkpoints/update_000300",),
        not_saved=({"update": 200, "reason": "the disk is full"}, {"update": 1300, "reason": "it still is"}),
        data=DataSummary(
            clips=12,
            held_out_clips=4,
            unreadable=(("a|b.mp4", "Invalid | data\nfound"),),
            too_short=many,
            replaced=(("c.mp4", "damaged after frame 3"),),
        ),
        worker_restarts=2,
    )
    json_path, page_path = write_report(tmp_path, summary)
    page, report = page_path.read_text(), json.loads(json_path.read_text())
    assert "Failed after 400 of 900 updates; `--resume auto` goes on from the newest checkpoint." in page
    assert "> **Error:** loss became NaN at update 401" in page
    assert "- frames 8 -> 9 in phase low" in page
    assert r"Invalid \| data found |" in page
    assert "Too short: 60 files" in page
    assert "Unreadable in training: 1 file, replaced by other clips." in page
    assert "| `c.mp4` | damaged after frame 3 |" in page
    assert "Workers of the loader died and were started again: 2 times." in page
    assert report["data"]["replaced"] == [{"path": "c.mp4", "reason": "damaged after frame 3"}]
    assert report["worker_restarts"] == 2
    assert "10 more are in `report.json`" in page
    assert "3 updates were skipped: for a gradient that was not finite, or left out with a spike." in page
    assert "`checkpoints/update_000300`" in page
    assert "No room for a checkpoint at update 200, 1,300; the last time: it still is" in page
    assert report["not_saved"][0] == {"update": 200, "reason": "the disk is full"}
    assert "sha256" not in page
    assert report["replacements"] == ["frames 8 -> 9 in phase low"]
    assert report["data"]["unreadable"] == [{"path": "a|b.mp4", "reason": "Invalid | data\nfound"}]
    assert len(report["data"]["too_short"]) == 60


def test_a_report_without_evaluation_or_time_still_reads_well(tmp_path: Path) -> None:
    _, page_path = write_report(
        tmp_path, example_summary(metrics={}, time_seconds={}, status=RunStatus.INTERRUPTED, updates=5)
    )
    page = page_path.read_text()
    assert "Interrupted after 5 of 900 updates" in page
    assert "held-out clips:" not in page
    assert "\n\n\n" not in page


def summary_text(summary: RunSummary) -> str:
    text = io.StringIO()
    print_summary(Console(file=text, width=80), summary, report=Path("runs/tiny/report.md"))
    return text.getvalue()


def test_the_printed_summary_shows_status_measures_and_report() -> None:
    shown = summary_text(example_summary())
    assert "completed  900 of 900 updates in 0:04:27\n" in shown
    resumed = example_summary(resumed_from=("update_000500",))
    assert "in 0:04:27 since the last start\n" in summary_text(resumed)
    assert re.search(r"PSNR +11\.31 dB +23\.71 dB +\+12\.40 dB", shown)
    assert shown.endswith("report  runs/tiny/report.md\n")
    assert "loss became NaN" in summary_text(
        example_summary(status=RunStatus.FAILED, error="loss became NaN")
    )


@pytest.mark.slow
def test_plots_are_made_only_of_what_was_measured(tmp_path: Path) -> None:
    names = [
        picture.path
        for picture in save_plots(example_rows(), tmp_path / "plots", phase_names=["low", "medium", "high"])
    ]
    assert names == ["plots/loss.png", "plots/quality.png", "plots/training.png", "plots/speed.png"]
    assert save_plots([], tmp_path / "none", phase_names=[]) == ()
    only = save_plots([(1, {"loss/total": math.nan})], tmp_path / "nan", phase_names=[])
    assert [picture.path for picture in only] == ["nan/loss.png"]


def test_smoothing_is_centred_and_leaves_out_what_is_not_finite() -> None:
    """Closed form: means of the neighbours; values are exact in binary."""
    assert smooth(np.array([1.0, 4.0, 7.0]), 1).tolist() == [2.5, 4.0, 5.5]
    assert smooth(np.array([1.0, math.nan, 3.0, math.inf]), 1).tolist() == [1.0, 2.0, 3.0, 3.0]
    assert np.isnan(smooth(np.array([math.nan]), 1)).all()


def test_pixels_have_the_range_of_bytes_and_show_what_is_not_finite() -> None:
    video = torch.tensor([-1.0, 0.0, 1.0, 5.0, math.nan]).reshape(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert to_pixels(video)[0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3, [255] * 3, [255, 0, 255]]


def test_a_comparison_shows_every_pixel_of_both(tmp_path: Path) -> None:
    """16 pixels are enlarged by 10: the first tile is the first frame, the one below it its
    reconstruction."""
    original, reconstruction = example_clips()
    save_comparison(original, reconstruction, tmp_path / "a.png", title="low")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape[1] <= 1760
    (top, left) = (64, 118)
    tile = sheet[top : top + 160, left : left + 160]
    below = sheet[top + 166 : top + 326, left : left + 160]
    assert (tile[5::10, 5::10] == to_pixels(original[0])[0]).all()
    assert (below[5::10, 5::10] == to_pixels(reconstruction[0])[0]).all()


@pytest.mark.parametrize(("num_frames", "side"), [(1, 300), (2, 33)])
def test_single_frames_and_odd_sizes_are_drawn(tmp_path: Path, num_frames: int, side: int) -> None:
    original, reconstruction = example_clips(num_frames, side)
    save_comparison(original, reconstruction, tmp_path / "a.png", title="one")
    save_comparison_video(original, reconstruction, tmp_path / "a.mp4", num_loops=1)
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert len(list(film.decode(video=0))) == num_frames


def test_a_film_has_originals_left_and_reconstructions_right(tmp_path: Path) -> None:
    """White against black; H.264 keeps flat areas within a few levels of 255."""
    white = torch.ones(1, 3, 4, 32, 32)
    save_comparison_video(white, -white, tmp_path / "a.mp4", frame_rate_hz=23.976, num_loops=2)
    with av.open(str(tmp_path / "a.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 8
    half = frames[0].shape[1] // 2
    assert frames[0][:, : half - 8].min() > 245
    assert frames[0][:, half + 8 :].max() < 10


@pytest.mark.parametrize(
    "save", [save_comparison_video, lambda a, b, path: save_comparison(a, b, path, title="x")]
)
def test_videos_of_different_shape_are_refused(tmp_path: Path, save: object) -> None:
    original, reconstruction = example_clips()
    with pytest.raises(ValueError, match=r"of one shape, got .* Crop the reconstruction"):
        save(original, reconstruction[:, :, :8], tmp_path / "a")  # type: ignore[operator]


def test_spectrograms_are_drawn_also_of_silence(tmp_path: Path) -> None:
    sound = torch.sin(torch.arange(8000) * 0.3).expand(2, 1, 8000).clone()
    sound[1] = 0
    save_spectrograms(sound, sound * 0.5, tmp_path / "a.png", sample_rate_hz=16000, title="tone and silence")
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
    with pytest.raises(ValueError, match="Crop the reconstruction"):
        save_spectrograms(sound, sound[..., :10], tmp_path / "b.png", sample_rate_hz=16000, title="")


def test_wav_files_are_read_back_to_half_a_step(tmp_path: Path) -> None:
    """16 bits: a step is 1 / 32767, rounding is off by at most half of it; 2.0 is clipped to 1."""
    sound = torch.tensor([[0.0, 0.25, -1.0, 2.0], [0.1, -0.1, 0.5, -0.5]])
    save_wav(sound, tmp_path / "a.wav", sample_rate_hz=8000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 4)
        samples = np.frombuffer(file.readframes(4), dtype="<i2").reshape(4, 2).T / 32767
    assert np.abs(samples - sound.clamp(-1, 1).numpy()).max() <= 0.5 / 32767 + 1e-9
    with pytest.raises(DataError, match=r"b\.wav: samples must be finite"):
        save_wav(torch.tensor([[math.nan]]), tmp_path / "b.wav", sample_rate_hz=8000)
    assert not (tmp_path / "b.wav").exists()
