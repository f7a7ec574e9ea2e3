"""A run folder as a run leaves it, made in milliseconds."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium, NotJudged, append_evaluation

PHASES = (("low", 60, 64, 9, 8), ("high", 40, 128, 17, 2))
TOTAL = 100
COMMAND = "NUM_ACCELERATORS=2 launch/train_local.sh configs/tiny.yaml runs/tiny"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes the folder of a video run of 100 updates in two phases."""

    def make(
        name: str = "tiny",
        *,
        updates: int = TOTAL,
        status: str | None = "completed",
        psnr_db: Sequence[float] = (10.0, 18.0, 22.0),
        clip: str = "bunny.mp4",
        phases: Sequence[tuple[str, int, int, int, int]] = PHASES,
        **report: Any,
    ) -> Path:
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        (folder / "config.yaml").write_text("trainer: video_vae\noptimizer:\n  weight_decay: 0.01\n")
        (folder / "plan.json").write_text(json.dumps(_plan(phases)))
        environment = {"command": COMMAND, "ranks": 2, "hosts": 1, "versions": {"torch": "2.14.1"}}
        (folder / "environment.json").write_text(json.dumps(environment))
        started = {"model": "AutoencoderKLLTXVideo", "parameters": 1_770_000, "world_size": 2}
        (folder / "start.json").write_text(json.dumps(started))
        of_updates = [index for index, (_, length, *_) in enumerate(phases) for _ in range(length)]
        rows = [_row(update, of_updates[update - 1]) for update in range(1, updates + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _write_media(folder)
        moments = [(0, "before"), (60, "phase_end"), (100, "phase_end")]
        for (update, reason), value in zip(moments, psnr_db, strict=False):
            if update <= updates:
                append_evaluation(folder, _record(update, reason, value, clip))
        if status is not None:
            told = {"status": status, "updates": updates, "planned_updates": TOTAL, **started, **report}
            (folder / "report.json").write_text(json.dumps(told))
        return folder

    return make


def _plan(phases: Sequence[tuple[str, int, int, int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "phase": index,
            "name": name,
            "bucket": 0,
            "height": side,
            "width": side,
            "frames": frames,
            "global_batch_size": batch,
            "updates": length,
            "pixels_per_update": side * side * frames * batch,
            "learning_rate_max": 1e-3,
        }
        for index, (name, length, side, frames, batch) in enumerate(phases)
    ]


def _row(update: int, phase: int) -> dict[str, Any]:
    return {
        "update": update,
        "loss/total": 2.0 ** (-update / 20),
        "loss/kl": 1.0,
        "learning_rate": 1e-3,
        "time/update_seconds": 2.0,
        "throughput/clips_per_second": 4.0,
        "memory/rss_bytes": 2.0**30,
        "clock/phase": phase,
    }


def _record(update: int, reason: Any, psnr_db: float, clip: str) -> EvaluationRecord:
    film: dict[str, Any] = {"kind": "film", "clip": 1, "source": clip, "caption": "clip 1"}
    sound: dict[str, Any] = {"kind": "sound", "clip": 2, "source": "chord.wav", "caption": "clip 2"}
    return EvaluationRecord(
        update=update,
        samples=8 * update,
        phase="low" if update <= 60 else "high",
        phase_index=0 if update <= 60 else 1,
        reason=reason,
        seconds=3.0,
        metrics={"psnr_db": psnr_db, "ssim": psnr_db / 50},
        clips=(clip, "silent.mp4"),
        not_judged=(NotJudged(clip="silent.mp4", measure="psnr_db", reason="digital silence"),),
        media=(
            Medium(path="samples/original_clip_1.mp4", role="original", **film),
            Medium(path=f"samples/update_{update:06d}_clip_1.mp4", role="reconstruction", **film),
            Medium(path="samples/original_clip_2.wav", role="original", **sound),
            Medium(path=f"samples/update_{update:06d}_clip_2.wav", role="reconstruction", **sound),
            Medium(
                path=f"samples/update_{update:06d}_preview_1.mp4",
                kind="film",
                role="preview",
                caption="",
                clip=1,
                prompt="a red cat",
            ),
            Medium(path=f"samples/update_{update:06d}.png", kind="picture", role="sheet", caption=""),
        ),
    )


def _write_media(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(picture, format="PNG")
    for update in (0, 60, 100):
        (folder / f"samples/update_{update:06d}.png").write_bytes(picture.getvalue())
        for name in ("clip_1", "preview_1"):
            (folder / f"samples/update_{update:06d}_{name}.mp4").write_bytes(b"film" * 100)
        write_tone(folder / f"samples/update_{update:06d}_clip_2.wav")
    (folder / "samples/original_clip_1.mp4").write_bytes(b"film" * 100)
    write_tone(folder / "samples/original_clip_2.wav")


def write_tone(path: Path, *, pitch_hz: float = 1000.0, rate_hz: int = 8000, seconds: float = 1.0) -> None:
    """Writes a sine of half of full scale."""
    times = np.arange(int(rate_hz * seconds)) / rate_hz
    samples = (16_384 * np.sin(2 * np.pi * pitch_hz * times)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())


@pytest.fixture
def tone() -> Callable[..., None]:
    """Returns `write_tone`."""
    return write_tone
