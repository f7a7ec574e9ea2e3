"""Two hosts and launch/train.sh: examined, trained on through ssh and pdsh, one lost, resumed without ssh.

The hosts are namespaces of this machine with addresses, processes and sshd of their own. One story, told
once; the tests read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.testing.hosts import VirtualHosts, virtual_hosts, why_no_virtual_hosts
from aiprod_ds.testing.tiny import tiny_ltx_vae

UPDATES, EVERY = 60, 10  # as in the configuration
END_SECONDS = 60.0  # within which the surviving host must have ended
PATIENCE_SECONDS = 240.0
RANKS = "[-]m aiprod_ds train"
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
    - {name: only, resolution: 16x16, duration: {frames: 5}, global_batch_size: 2, updates: 60, learning_rate: 1.0e-3}
engine:
  deepspeed_config: {zero_optimization: {stage: 1}}
checkpoint: {every_updates: 10}
evaluation: {max_clips: 1, num_pictures: 1}
""".replace("MODEL", json.dumps(tiny_ltx_vae()))  # noqa: E501

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two_hosts")
    (place / "clips").mkdir()
    write_synthetic_clips(place / "clips", num_clips=3, frames=6, height=16, width=16, with_sound=False)
    (place / "config.yaml").write_text(CONFIG.replace("CLIPS", str(place / "clips")))
    (place / "hosts").write_text("# two hosts\nnode-a slots=1\n\nnode-b slots=1\n")
    (place / "env").write_text(f"GLOO_SOCKET_IFNAME=eth0\n\nA_VALUE=two words; touch {place}/made_by_env\n")
    return place


@pytest.fixture(scope="module")
def hosts() -> Iterator[VirtualHosts]:
    reason = why_no_virtual_hosts()
    if reason is not None:
        pytest.skip(reason)
    with virtual_hosts() as running:
        yield running


@pytest.fixture(scope="module")
def story(hosts: VirtualHosts, folder: Path, repository_root: Path) -> dict[str, Any]:
    """Runs everything in order and returns what was seen."""
    ssh = [
        "--ssh-config",
        str(hosts.ssh_config),
        "--env-file",
        str(folder / "env"),
        "--hostfile",
        str(folder / "hosts"),
    ]
    doctor = [sys.executable, "-m", "aiprod_ds", "doctor", "--run-folder", str(folder / "run"), "--json"]
    train = [
        str(repository_root / "launch" / "train.sh"),
        str(folder / "config.yaml"),
        str(folder / "run"),
        *ssh,
    ]
    train += ["--set", f"report.wandb.project={_hostile(folder)}"]
    seen: dict[str, Any] = {
        "doctor": _finished(_start(hosts, folder, [*doctor, *ssh], "doctor"), folder, "doctor")
    }

    first = _start(hosts, folder, train, "first")
    _await(
        lambda: (folder / "run" / "checkpoints" / f"update_{EVERY:06d}").exists() or first.poll() is not None
    )
    assert hosts.run("node-b", ["pkill", "-KILL", "-f", RANKS]).returncode == 0, (
        folder / "first"
    ).read_text()
    killed_at = time.monotonic()
    _await(lambda: hosts.run("node-a", ["pgrep", "-f", RANKS]).returncode != 0)
    seen["seconds_until_the_end"] = time.monotonic() - killed_at
    seen["first"] = _finished(first, folder, "first")
    seen["left_over"] = [hosts.run(name, ["pgrep", "-af", "aiprod_ds"]).stdout for name in hosts.names]
    seen["failed_report"] = json.loads((folder / "run" / "report.json").read_text())

    seen["configuration"] = yaml.safe_load((folder / "run" / "config.yaml").read_text())

    second = [_start(hosts, folder, [*train, "--no-ssh"], f"second_{name}", name) for name in hosts.names]
    seen["second"] = [
        _finished(one, folder, f"second_{name}") for one, name in zip(second, hosts.names, strict=True)
    ]
    seen["report"] = json.loads((folder / "run" / "report.json").read_text())
    return seen


def test_the_doctor_finds_two_healthy_hosts(story: dict[str, Any]) -> None:
    code, output = story["doctor"]
    assert code == 0, output
    page = json.loads(output[output.index("{") :])
    assert page["healthy"]
    first, second = page["hosts"]
    assert [first["probe"]["hostname"], second["probe"]["hostname"]] == ["node-a", "node-b"]
    assert first["probe"]["code_sha256"] == second["probe"]["code_sha256"]
    for host in page["hosts"]:
        assert host["probe"]["folder"]["bytes_per_second"] > 0
        assert host["probe"]["matmul"][0]["flops_per_second"] > 0
        assert host["all_reduce"]["ranks"][0]["bytes_per_second"] > 0
        assert host["all_reduce"]["missing_tokens"] == [], "the run folder is shared"
        assert abs(host["skew_seconds"]) <= host["skew_error_seconds"] + 1


def test_the_doctor_leaves_nothing_in_the_run_folder(story: dict[str, Any], folder: Path) -> None:
    assert list(folder.rglob(".doctor_*")) == []


def test_the_hosts_are_named_and_the_command_is_left_to_verbose(story: dict[str, Any]) -> None:
    _, output = story["first"]
    assert "2 ranks on node-a (1), node-b (1)" in output
    assert "-m deepspeed.launcher.runner" not in output


def test_the_other_host_ends_in_time_with_a_clear_message(story: dict[str, Any]) -> None:
    code, output = story["first"]
    assert code not in (0, 2), output
    assert story["seconds_until_the_end"] < END_SECONDS
    assert "error: the run cannot go on without all ranks: rank 1 on node-b is gone" in output
    assert story["failed_report"]["status"] == "failed"
    assert "rank 1 on node-b is gone" in story["failed_report"]["error"]


def test_no_process_is_left_on_a_host(story: dict[str, Any]) -> None:
    assert story["left_over"] == ["", ""]


def test_the_run_goes_on_and_completes_with_a_launcher_on_each_host(story: dict[str, Any]) -> None:
    for code, output in story["second"]:
        assert code == 0, output
    report = story["report"]
    assert (report["status"], report["updates"], report["world_size"]) == ("completed", UPDATES, 2)
    assert len(report["resumed_from"]) == 1
    assert int(report["resumed_from"][0].removeprefix("update_")) >= EVERY


def test_arguments_and_values_arrive_as_they_are_and_nothing_is_executed(
    story: dict[str, Any], folder: Path
) -> None:
    assert story["configuration"]["report"]["wandb"]["project"] == _hostile(folder)
    assert list(folder.glob("made_by_*")) == []


def _hostile(folder: Path) -> str:
    return (
        f"a $(touch {folder}/made_by_dollar) `touch {folder}/made_by_tick` x;touch "
        f"{folder}/made_by_semicolon & %n %h 'b' \\"
    )


def _start(
    hosts: VirtualHosts, folder: Path, command: list[str], name: str, host: str = "node-a"
) -> subprocess.Popen[bytes]:
    variables = {
        "VENV": str(Path(sys.executable).parents[1]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "500",
    }
    return hosts.start(host, command, environment={**os.environ, **variables}, output=folder / name)


def _finished(process: subprocess.Popen[bytes], folder: Path, name: str) -> tuple[int, str]:
    return process.wait(timeout=PATIENCE_SECONDS), (folder / name).read_text(errors="replace")


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "in time"
        time.sleep(0.1)
