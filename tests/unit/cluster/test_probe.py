"""What a host tells about itself: this machine's own answers, and that looking leaves nothing behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.cluster.all_reduce import run_host
from aiprod_ds.cluster.examine import Examined, Examiner
from aiprod_ds.cluster.findings import judge
from aiprod_ds.cluster.hostfile import Host
from aiprod_ds.cluster.probe import nearest_folder, package_sha256, probe


def test_a_probe_is_json_and_tells_versions_and_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    told = json.loads(
        json.dumps(probe(folder=str(tmp_path / "not" / "yet"), token=".doctor_x", measures=False))
    )
    assert told["versions"]["torch"] == torch.__version__
    assert {"python", "deepspeed"} <= told["versions"].keys()
    assert (told["is_cpu_run"], told["gpus"], told["reached_at"]) == (True, [], "10.0.0.1")
    assert told["cores"] >= 1
    assert told["code_sha256"] == package_sha256()
    assert told["folder"]["place"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".doctor_x"], "for the other hosts to find"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    told = probe(folder=str(tmp_path), token="no/such/folder", measures=False)
    assert "No such file" in told["folder"]["problem"]


def test_the_nearest_folder_is_the_one_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert nearest_folder(tmp_path / "a") == tmp_path / "a"
    assert nearest_folder(tmp_path / "a" / "b" / "c") == tmp_path / "a"


@pytest.mark.slow
def test_files_of_other_hosts_that_are_not_seen_and_ranks_that_fail_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiprod_ds.cluster.all_reduce._SEEN_WITHIN_SECONDS", 0.0)
    (tmp_path / "own").touch()
    with socket.create_server(("", 0)) as taken:
        place: dict[str, Any] = {"world_size": 2, "address": "127.0.0.1", "port": taken.getsockname()[1]}
        told = run_host(first_rank=0, slots=[0], **place, folder=str(tmp_path), tokens=["own", "other"])
    assert told["missing_tokens"] == ["other"]
    assert told["ranks"] == []
    assert "address already in use" in told["problem"]


@pytest.mark.slow
def test_this_machine_is_examined_without_ssh(tmp_path: Path) -> None:
    host = Host(name="localhost", slots=(0, 1))
    (found,) = Examiner(
        hosts=[host], ssh=None, environment={"DS_ACCELERATOR": "cpu"}, run_folder=tmp_path
    ).examine(measures=True)
    assert isinstance(found, Examined)
    assert found.probe is not None
    assert found.probe["matmul"][0]["flops_per_second"] > 0
    assert found.probe["folder"]["bytes_per_second"] > 0
    assert found.all_reduce is not None
    assert len(found.all_reduce["ranks"]) == 2
    assert [finding for finding in judge([found]) if finding.level.value == "error"] == []
    assert list(tmp_path.iterdir()) == []
