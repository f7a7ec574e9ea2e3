"""TensorBoard and Weights & Biases for real: what they write, and that a dead service costs a warning and a
bounded wait."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiprod_ds.config.run import WandbConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.metrics.tensorboard import TensorBoardSink
from aiprod_ds.metrics.wandb import open_wandb


def test_tensorboard_scalars_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for update in (1, 2, 3):
        sink.log(update, {"loss/total": update / 4, "learning_rate": 0.5})
    sink.close()
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss/total"]
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]


def test_what_a_killed_run_gave_to_tensorboard_stands_once_beside_what_the_resumed_ones_add(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in range(4):  # within a second, from checkpoints of the updates 0, 2, 4, 6
        sink = TensorBoardSink(tmp_path, resume_from_update=2 * start)
        for update in range(2 * start + 1, 2 * start + 4):
            sink.log(update, {"loss/total": float(start)})
        # Killed here: nobody closes it.
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/total")
    expected = [(update, (update - 1) // 2) for update in range(1, 9)] + [(9, 3)]
    assert [(event.step, event.value) for event in events] == expected


def test_tensorboard_that_is_not_installed_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"report\.tensorboard: needs the package tensorboard.*pip install"):
        TensorBoardSink(tmp_path)


@pytest.fixture(name="wandb_home")
def _wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own home, no credentials of the machine, no wandb service process left behind."""
    import wandb

    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "home").mkdir()
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    yield run_folder
    wandb.teardown()


def open_with(folder: Path, mode: str, wait_seconds: float = 15.0) -> object:
    config = WandbConfig.model_validate({"mode": mode, "tags": ["tiny"]})
    return open_wandb(config, folder=folder, run_config={"seed": 1}, wait_seconds=wait_seconds)


def test_wandb_off_touches_nothing(tmp_path: Path) -> None:
    assert open_with(tmp_path, "off") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_and_its_id_in_the_run_folder(wandb_home: Path) -> None:
    for update in (1, 2):
        sink = open_wandb(WandbConfig(mode="offline"), folder=wandb_home, run_config={"seed": 1})
        assert sink is not None
        sink.log(update, {"loss/total": 0.5})
        sink.close()
    run_id = (wandb_home / "wandb" / "run_id").read_text()
    files = list((wandb_home / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert any(b"loss/total" in file.read_bytes() for file in files)


def test_wandb_online_without_a_key_does_not_ask(wandb_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="aiprod_ds"):
        assert open_with(wandb_home, "online") is None
    assert "needs an API key, found none" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("accepts", [False, True], ids=["refused", "silent"])
def test_a_dead_wandb_costs_one_warning_and_a_bounded_wait(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, accepts: bool
) -> None:
    """A port that nobody listens on, and one that takes connections and never answers. Pass: under 30 s for a
    wait of 1 s."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if accepts:
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="aiprod_ds"):
            assert open_with(wandb_home, "online", wait_seconds=1.0) is None
        assert time.monotonic() - started < 30
    assert [record.name for record in caplog.records if record.name.startswith("aiprod_ds")] == [
        "aiprod_ds.metrics.wandb"
    ]
    assert "mirror=wandb mode=online not started" in caplog.text
