"""Pictures, films, sounds and tables in TensorBoard and Weights & Biases, read back from what they wrote, and
trackers that hang, vanish or refuse."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aiprod_ds.config.run import WandbConfig
from aiprod_ds.media.mp4 import Sound, encode_mp4
from aiprod_ds.media.sounds import save_wav
from aiprod_ds.metrics import sinks
from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium, NotJudged, append_evaluation
from aiprod_ds.metrics.shown import named_media
from aiprod_ds.metrics.sinks import MirrorSink, OwnThreadSink
from aiprod_ds.metrics.tensorboard import TensorBoardSink
from aiprod_ds.metrics.wandb import open_wandb

FRAMES, RATE_HZ = 8, 12.0
SOUND = torch.sin(torch.arange(8000) / 10)[None] * 0.5


@pytest.fixture(name="record")
def _record(tmp_path: Path) -> EvaluationRecord:
    """An evaluation with one medium of each kind and role, and a file that is not there."""
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(samples / "sheet.png")
    grey = np.linspace(0, 255, FRAMES).astype(np.uint8)
    film = np.broadcast_to(grey[:, None, None, None], (FRAMES, 48, 640, 3))
    sound = Sound(samples=SOUND, sample_rate_hz=16_000)
    (samples / "made.mp4").write_bytes(encode_mp4(film, frame_rate_hz=RATE_HZ, sound=sound))
    (samples / "original.mp4").write_bytes(encode_mp4(film, frame_rate_hz=RATE_HZ))
    save_wav(SOUND, samples / "made.wav", sample_rate_hz=16_000)
    media = (
        Medium(path="samples/sheet.png", kind="picture", role="sheet", caption="after phase low"),
        Medium(
            path="samples/original.mp4",
            kind="film",
            role="original",
            caption="clip 1",
            clip=1,
            source="a.mp4",
        ),
        Medium(
            path="samples/made.mp4", kind="film", role="preview", caption="clip 1", clip=1, prompt="a dog"
        ),
        Medium(path="samples/made.wav", kind="sound", role="reconstruction", caption="clip 2", clip=2),
        Medium(path="samples/gone.wav", kind="sound", role="reconstruction", caption="clip 3", clip=3),
    )
    return EvaluationRecord(
        update=5,
        samples=40,
        phase="low",
        phase_index=0,
        reason="interval",
        seconds=1.25,
        metrics={"psnr_db": 21.5},
        clips=("a.mp4", "b.wav"),
        not_judged=(NotJudged(clip="b.wav", measure="si_sdr_db", reason="digital silence"),),
        media=media,
    )


def two_evaluations(sink: Any, record: EvaluationRecord, folder: Path) -> None:
    """As a run does: rows and evaluations in turn; the file of evaluations has what came before."""
    for update, psnr_db in ((5, 21.5), (10, 23.25)):
        one = replace(record, update=update, metrics={"psnr_db": psnr_db})
        sink.log(update, {"loss/total": 1 / update})
        sink.log(update, {"evaluation/psnr_db": psnr_db})
        append_evaluation(folder, one)
        sink.log_evaluation(one, folder)


def test_names_stay_the_same_and_tell_kinds_of_one_clip_apart(
    record: EvaluationRecord, tmp_path: Path
) -> None:
    film = record.media[2]
    record = replace(
        record, media=(*record.media, replace(film, path="samples/made.wav", kind="sound"), film)
    )
    assert list(named_media(record, tmp_path / "run")) == [
        "samples/sheet",
        "samples/original_1",
        "samples/preview_1",
        "samples/reconstruction_2",
        "samples/preview_1_sound",
        "samples/preview_1_film",
    ]


def test_tensorboard_gives_back_pictures_films_sounds_and_tables(
    record: EvaluationRecord, tmp_path: Path
) -> None:
    """The film is grey from 0 to 255 in equal steps; coded twice, each frame's grey is within 8 of it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    sink = TensorBoardSink(folder / "tensorboard")
    two_evaluations(sink, record, folder)
    sink.close()
    # Without limits; by default only some of each kind are kept.
    limits = {"images": 0, "audio": 0, "tensors": 0, "scalars": 0}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=limits).Reload()
    assert sorted(events.Tags()["images"]) == ["samples/original_1", "samples/preview_1", "samples/sheet"]
    assert [event.step for event in events.Images("samples/sheet")] == [5, 10]
    assert [event.step for event in events.Images("samples/original_1")] == [5]  # the same at both
    sheet = events.Images("samples/sheet")[0]
    assert sheet.encoded_image_string == (folder / "samples" / "sheet.png").read_bytes()

    with Image.open(io.BytesIO(events.Images("samples/preview_1")[1].encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", FRAMES, (320, 24))
        assert gif.info["duration"] == pytest.approx(1000 / RATE_HZ, abs=10)  # GIF counts in 10 ms
        greys = []
        for number in range(FRAMES):
            gif.seek(number)
            greys.append(float(np.asarray(gif.convert("L")).mean()))
    assert greys == pytest.approx(np.linspace(0, 255, FRAMES), abs=8)

    assert sorted(events.Tags()["audio"]) == ["samples/preview_1", "samples/reconstruction_2"]
    sound = events.Audio("samples/reconstruction_2")[0]
    assert (sound.content_type, sound.sample_rate, sound.length_frames) == ("audio/wav", 16_000, 8000)
    with wave.open(io.BytesIO(sound.encoded_audio_string)) as file:
        heard = np.frombuffer(file.readframes(8000), "<i2") / 32767
    assert heard == pytest.approx(SOUND[0].numpy(), abs=1e-4)  # a 16-bit step is 3e-5

    tables = [
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("evaluations/text_summary")
    ]
    assert tables[1].splitlines()[0].startswith("| update | samples | phase | reason | psnr_db |")
    assert tables[1].splitlines()[2:] == [
        "| 5 | 40 | low | interval | 21.5 | 1.2 | 2 | b.wav: si_sdr_db (digital silence) |",
        "| 10 | 40 | low | interval | 23.25 | 1.2 | 2 | b.wav: si_sdr_db (digital silence) |",
    ]
    prompts = events.Tensors("prompts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert prompts == "- `samples/preview_1`: a dog"
    about = {tag: events.SummaryMetadata(tag) for tag in ("samples/original_1", "samples/preview_1")}
    assert about["samples/original_1"].summary_description == "clip 1 | a.mp4"


@pytest.fixture(name="wandb_home")
def _wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own home, no credentials of the machine, no wandb service process left behind."""
    import wandb

    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "home").mkdir()
    yield tmp_path / "run"
    wandb.teardown()


@pytest.mark.slow
def test_wandb_offline_gives_back_media_captions_and_tables(
    record: EvaluationRecord, wandb_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    config = WandbConfig(
        mode="offline", entity="team", group="ablation", notes="why it was run", tags=("tiny", "cpu")
    )
    with caplog.at_level(logging.WARNING, logger="aiprod_ds"):
        sink = open_wandb(config, folder=wandb_home, run_config={"seed": 1})
        assert sink is not None
        two_evaluations(sink, record, wandb_home)
        sink.close()
    wandb.teardown()  # as at the end of a process: only now is everything written
    assert not [entry for entry in caplog.records if entry.name.startswith("aiprod_ds")]
    (run,) = (wandb_home / "wandb").glob("offline-run-*/")
    records = wandb_records(next(run.glob("*.wandb")))
    (begun,) = [one.run for one in records if one.WhichOneof("record_type") == "run"]
    assert (begun.entity, begun.run_group, begun.notes) == ("team", "ablation", "why it was run")
    assert list(begun.tags) == ["tiny", "cpu"]

    rows: dict[int, dict[str, Any]] = {}
    for one in records:
        if one.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in one.history.item:
                name, *part = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[name] = {**row.get(name, {}), part[0]: value} if part else value
            rows[row["_step"]] = row
    assert sorted(rows) == [5, 10]
    assert (rows[10]["loss/total"], rows[10]["evaluation/psnr_db"]) == (0.1, 23.25)
    kinds = {name: value["_type"] for name, value in rows[5].items() if name.startswith("samples/")}
    assert kinds == {
        "samples/sheet": "image-file",
        "samples/original_1": "video-file",
        "samples/preview_1": "video-file",
        "samples/reconstruction_2": "audio-file",
    }
    assert "samples/original_1" not in rows[10]
    assert rows[5]["samples/preview_1"]["caption"] == "clip 1 | a dog"
    for name, original in (
        ("preview_1", "made.mp4"),
        ("reconstruction_2", "made.wav"),
        ("sheet", "sheet.png"),
    ):
        kept = run / "files" / rows[10][f"samples/{name}"]["path"]
        assert kept.read_bytes() == (wandb_home / "samples" / original).read_bytes()
    table = json.loads((run / "files" / rows[10]["evaluations"]["path"]).read_text())
    measure = table["columns"].index("psnr_db")
    assert [row[measure] for row in table["data"]] == [21.5, 23.25]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "vanishes"])
def test_a_wandb_that_hangs_or_vanishes_in_mid_run_delays_nothing(
    record: EvaluationRecord, wandb_home: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    """In a process of its own, because wandb's way out at exit is part of it.

    Pass: every call is back in 1 s, and the process ends in under 40 s with a wait of 2 s.
    """
    script = f"""
import json, logging, os, signal, sys, time
from pathlib import Path
from aiprod_ds.config.run import WandbConfig
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.wandb import open_wandb
logging.basicConfig(level="WARNING")
folder = Path({str(wandb_home)!r})
record = EvaluationRecord.from_dict(json.loads({json.dumps(record.to_dict())!r}))
sink = open_wandb(WandbConfig(mode="offline"), folder=folder, run_config={{}}, wait_seconds=2.0)
sink.log(1, {{"loss/total": 1.0}})
services = [int(name) for name in os.listdir("/proc") if name.isdigit()
            and os.path.exists(f"/proc/{{name}}/stat")
            and int(open(f"/proc/{{name}}/stat").read().rpartition(")")[2].split()[1]) == os.getpid()]
assert services
print(*services, flush=True)
for service in services:
    os.kill(service, {int(stop)})
worst = 0.0
for update in range(2, 3000):
    began = time.monotonic()
    sink.log(update, {{f"loss/{{n}}": 1.0 for n in range(50)}})
    if update % 100 == 0:
        sink.log_evaluation(record, folder)
    worst = max(worst, time.monotonic() - began)
began = time.monotonic()
sink.close()
print(worst, time.monotonic() - began, flush=True)
"""
    began = time.monotonic()
    out, errors = tmp_path / "out.txt", tmp_path / "errors.txt"  # a stopped service keeps pipes open
    with out.open("w") as out_file, errors.open("w") as errors_file:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=out_file, stderr=errors_file)
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
        for pid in out.read_text().splitlines()[0].split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert process.returncode == 0, errors.read_text()
    worst, close = (float(value) for value in out.read_text().splitlines()[1].split())
    assert worst < 1
    assert close < 10
    assert time.monotonic() - began < 40
    assert "mirror=wandb" in errors.read_text()


class StuckSink:
    """Does not come back from the call that it is told to hang in."""

    def __init__(self, *, hangs_in: str) -> None:
        self.hangs_in = hangs_in
        self.done: list[str] = []
        self.let_go = threading.Event()

    def _call(self, name: str, *_: object) -> None:
        if name == self.hangs_in:
            self.let_go.wait(60)
        self.done.append(name)

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self._call("log", update, metrics)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        self._call("log_evaluation", record, folder)

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("call", ["log", "log_evaluation", "close"])
def test_nobody_waits_for_a_sink_that_hangs(
    record: EvaluationRecord, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, abandoned = StuckSink(hangs_in=call), []
    sink = OwnThreadSink(
        MirrorSink(stuck, name="tracker"),
        name="tracker",
        close_seconds=0.2,
        on_abandoned=lambda: abandoned.append(True),
    )
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sink.log(1, {})
        sink.log_evaluation(record, Path("run"))
        sink.log(2, {})
        sink.close()
        sink.close()
        sink.log(3, {})
    assert time.monotonic() - began < 5
    stuck.let_go.set()
    assert abandoned == [True]
    assert [entry.getMessage() for entry in caplog.records] == [
        "mirror=tracker abandoned: did not end within 0 s; metrics.jsonl still holds everything"
    ]


def test_a_sink_that_takes_nothing_is_given_up_before_memory_fills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "_MAX_WAITING", 5)
    stuck = StuckSink(hangs_in="log")
    sink = OwnThreadSink(MirrorSink(stuck, name="tracker"), name="tracker", close_seconds=60)
    began = time.monotonic()
    for update in range(20):
        sink.log(update, {})
    sink.close()
    stuck.let_go.set()
    assert time.monotonic() - began < 5
    assert len(caplog.records) == 1
    assert "has not taken 5 rows" in caplog.text


def test_what_waits_is_delivered_in_order_before_the_end(record: EvaluationRecord) -> None:
    sink = StuckSink(hangs_in="nothing")
    own = OwnThreadSink(sink, name="tracker", close_seconds=10)
    own.log(1, {})
    own.log_evaluation(record, Path("run"))
    own.log(2, {})
    own.close()
    assert sink.done == ["log", "log_evaluation", "log", "close"]


def wandb_records(path: Path) -> list[Any]:
    """Reads a .wandb file: 7 bytes of head, then LevelDB's log format with blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a head: the block's end is empty
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
