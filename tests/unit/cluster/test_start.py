"""What `aiprod-ds launch` refuses before it starts anything, and what it takes for the end of a run."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from aiprod_ds.cli import BAD_CONFIGURATION, main
from aiprod_ds.cluster import start
from aiprod_ds.cluster.completion import Report
from aiprod_ds.cluster.ssh import Ssh, ask_all
from aiprod_ds.cluster.supervise import Supervisor
from aiprod_ds.files import write_atomically

CONFIG = "configs/video_vae/tiny.yaml"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, names = (
        logging.getLogger(),
        ("torch", "DeepSpeed", "deepspeed", "httpx", "huggingface_hub", "matplotlib", "PIL"),
    )
    handlers, level, levels = (
        root.handlers[:],
        root.level,
        {name: logging.getLogger(name).level for name in names},
    )
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs in front of all others, in which ssh and pdsh only note that they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ssh", "pdsh"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/called\nexit 1\n')
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def _launch(
    tmp_path: Path, *options: str, hostfile: str = "node-a slots=1\nnode-b slots=1\n", env: str = ""
) -> list[str]:
    (tmp_path / "hosts").write_text(hostfile)
    (tmp_path / "env").write_text(env)
    files = ["--hostfile", str(tmp_path / "hosts"), "--env-file", str(tmp_path / "env")]
    return ["launch", CONFIG, str(tmp_path / "run"), *files, *options]


BAD_INPUT = {
    "hostfile": ({"hostfile": "h;touch x slots=1\n"}, [], "hosts:1: must begin with a host name"),
    "env file": ({"env": "A=$(touch x)\n"}, [], "env:1: the value of A must be the text itself"),
    "include": ({}, ["--include", "node-c"], "--include: must name hosts of the hostfile, got 'node-c'."),
    "configuration": ({}, ["--set", "seeed=1"], "seeed: is not a known key"),
    "line break": ({}, ["--set", "report.wandb.project=a\nb"], "arguments: must be text on one line"),
    "bind cores": ({}, ["--bind-cores"], "--bind-cores: has no effect through pdsh"),
    "node rank": ({}, ["--node-rank", "1"], "--node-rank: has no effect without --no-ssh"),
    "node rank too high": (
        {},
        ["--no-ssh", "--node-rank", "2"],
        "--node-rank: must be of 0 to 1, one for each host, got 2.",
    ),
    "node rank unknown": ({}, ["--no-ssh"], "--node-rank: must be given, because"),
    "address": ({}, ["--master-addr", "a;b"], "--master-addr: must be an address or a host name, got 'a;b'."),
    "restarts": ({}, ["--max-restarts", "-1"], "--max-restarts: must be 0 or more, got -1."),
    "ssh configuration": ({}, ["--ssh-config", "a b"], "--ssh-config: must be a path without blanks"),
}


@pytest.mark.usefixtures("in_repository_root")
@pytest.mark.parametrize(("files", "options", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_starts_nothing(
    files: dict[str, str],
    options: list[str],
    message: str,
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(_launch(tmp_path, *options, **files)) == BAD_CONFIGURATION
    assert message in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bin", "env", "hosts"], (
        "nothing was called or written"
    )


@pytest.mark.usefixtures("in_repository_root")
def test_everything_wrong_is_told_at_once(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _launch(
        tmp_path, "--set", "seeed=1", "--bind-cores", hostfile="a\nb slots=0\n", env="A=`x`\n"
    )
    assert main(arguments) == BAD_CONFIGURATION
    assert capsys.readouterr().err.count("error: ") == 5


@pytest.mark.usefixtures("in_repository_root")
def test_a_host_that_does_not_answer_is_told_and_nothing_is_started(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_launch(tmp_path)) == 1
    told = capsys.readouterr().err
    assert "node-a: must be reachable by ssh without a question" in told
    assert "node-b: must be reachable by ssh without a question" in told
    assert "Nothing was started." in told
    assert "pdsh" not in (tmp_path / "called").read_text().replace(str(path), "")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_repository_root")
def test_a_dry_run_prints_the_command_of_this_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _launch(tmp_path, "--no-ssh", "--node-rank", "0", "--dry-run", "--accept-changed-data")
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "2 ranks on node-a (1), node-b (1)" in told
    assert "--no_ssh --node_rank 0 --master_addr node-a --master_port 29500" in " ".join(told.split())
    assert "--resume auto --accept-changed-data" in " ".join(told.split())


@pytest.mark.parametrize(
    ("outcomes", "resumes", "code"),
    [
        ([(76, False), (1, False), (0, False)], ["never", "never", "auto"], 0),
        ([(1, False)] * 5, ["never", "never", "auto", "auto"], 1),
        ([(2, False)], ["never"], 2),
        ([(75, False)], ["never"], 75),
        ([(1, False), (78, False)], ["never", "never"], 78),
        ([(143, True)], ["never"], 143),
        ([(241, True)], ["never"], 75),
        ([(1, False), (241, True)], ["never", "never"], 75),
        ([(241, False)] * 4, ["never", "never", "auto", "auto"], 241),
        ([(70, False), (75, False)], ["never", "never"], 75),
    ],
    ids=[
        "hang then loss",
        "always",
        "bad input",
        "stopped",
        "gone wrong",
        "signalled",
        "signalled while it loads",
        "signalled while it loads again",
        "ended by somebody else's signal",
        "stopped later",
    ],
)
def test_what_failed_is_started_again_from_what_it_has_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[int, bool]],
    resumes: list[str],
    code: int,
) -> None:
    asked: list[str] = []

    def start_once(request: start.Request, _console: Console) -> tuple[int, bool]:
        asked.append(request.resume)
        if len(asked) == 2:  # the second start is the first to save
            (request.run_folder / "checkpoints" / "update_000005").mkdir()
        return outcomes[len(asked) - 1]

    monkeypatch.setattr(start, "_start_once", start_once)
    (tmp_path / "checkpoints" / "update_000099").mkdir(parents=True)  # of a run before, which `never` leaves
    request = start.Request(
        config=Path(CONFIG),
        run_folder=tmp_path,
        hostfile=tmp_path / "hosts",
        resume="never",
        ssh=Ssh(),
        max_restarts=3,
    )
    assert start.start(request, Console()) == code
    assert asked == resumes


def test_a_signal_between_two_starts_is_a_stop(tmp_path: Path) -> None:
    starts: list[str] = []

    def start_once(request: start.Request, _console: Console) -> tuple[int, bool]:
        starts.append(request.resume)
        if len(starts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return 1, False

    request = start.Request(
        config=Path(CONFIG), run_folder=tmp_path, hostfile=tmp_path / "hosts", ssh=Ssh(), max_restarts=3
    )
    assert start.start(request, Console(), once=start_once) == 75
    assert len(starts) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("path")
def test_ssh_gets_quoted_commands_and_asks_no_questions(tmp_path: Path) -> None:
    answers = ask_all(
        ["a", "b"], Ssh(port=2222), lambda index: ["echo", f"$HOME {index}"], timeout_seconds=30
    )
    assert [(answer.host, answer.code) for answer in answers] == [("a", 1), ("b", 1)]
    calls = sorted((tmp_path / "called").read_text().splitlines())
    assert [call.rpartition("-p 2222 ")[2] for call in calls] == ["a echo '$HOME 0'", "b echo '$HOME 1'"]
    assert all("BatchMode=yes" in call and "ConnectTimeout=" in call for call in calls)


def test_a_host_that_hangs_is_given_up(path: Path) -> None:
    (path / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    (answer,) = ask_all(["a"], Ssh(), lambda _: ["true"], timeout_seconds=0.5)
    assert answer.code is None
    assert answer.reason.startswith("no answer within ")


def test_only_a_report_of_this_start_counts(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_atomically(report, json.dumps({"status": "completed"}))
    earlier = Report.of(tmp_path)
    assert earlier.status() == "missing", "the report is of an earlier start"
    assert not earlier.is_completed(within_seconds=0)
    write_atomically(report, json.dumps({"status": "failed"}))
    assert earlier.status() == "failed"
    write_atomically(report, json.dumps({"status": "completed"}))
    assert earlier.is_completed(within_seconds=0)
    report.write_text("{")
    assert earlier.status() == "missing"
    assert Report.of(tmp_path / "none").status() == "missing"


# A launcher that dies and leaves a rank behind, as DeepSpeed's does; the rank has the command line of one.
LAUNCHER = """\
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)", "-m", "aiprod_ds", "rank_of_test"])
print(rank.pid, flush=True)
sys.exit(3)
"""  # noqa: E501


def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    output = tmp_path / "output"
    command = ["sh", "-c", f"exec {sys.executable} {script} > {output}"]
    assert Supervisor(pattern="[-]m aiprod_ds rank_of_test").run(command, os.environ) == 3
    rank = Path("/proc") / output.read_text().strip()
    deadline = time.monotonic() + 10
    while rank.exists() and "Z" not in (rank / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline, "the rank must be gone"
        time.sleep(0.05)


STOPPING = """\
import signal, subprocess, sys, time
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
rank += "; print('ready', flush=True); time.sleep(120)"
sys.exit(subprocess.run([sys.executable, "-c", rank, "-m", "aiprod_ds", "rank_of_stop_test"]).returncode)
"""
SUPERVISING = """\
import os, sys
from aiprod_ds.cluster.supervise import Supervisor
sys.exit(Supervisor(pattern="[-]m aiprod_ds rank_of_stop_test").run([sys.executable, sys.argv[1]], os.environ))
"""  # noqa: E501


def _exit_code_after_a_signal(script: Path, text: str) -> int:
    """Returns with what a supervisor ends that is terminated once its launcher is ready."""
    script.write_text(text)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(script)], stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    with supervisor.stdout as output:
        assert output.readline() == "ready\n"
        supervisor.terminate()
        return supervisor.wait(timeout=60)


def test_a_signal_reaches_the_ranks_and_their_exit_code_comes_back(tmp_path: Path) -> None:
    assert _exit_code_after_a_signal(tmp_path / "launcher.py", STOPPING) == 75


# Starts its rank only after the signal has come.
STARTING = STOPPING.replace("rank = ", "print('ready', flush=True); time.sleep(1.0)\nrank = ", 1)


def test_ranks_that_are_started_after_the_signal_hear_of_it(tmp_path: Path) -> None:
    assert _exit_code_after_a_signal(tmp_path / "launcher.py", STARTING) in (75, 241)


def _job(tmp_path: Path, path: Path, code: int) -> subprocess.CompletedProcess[str]:
    """Runs the batch script with stand-ins for Slurm's programs, which note how they were called."""
    script = f'echo "$(basename "$0") $*" >> {tmp_path}/called\n'
    (path / "srun").write_text(f"#!/bin/sh\n{script}exit {code}\n")
    (path / "scontrol").write_text(f'#!/bin/sh\n{script}[ "$1" = requeue ] || printf "n1\\nn2\\n"\n')
    for name in ("srun", "scontrol"):
        (path / name).chmod(stat.S_IRWXU)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    batch = Path(__file__).resolve().parents[3] / "launch" / "slurm.sbatch"
    command = ["bash", str(batch), "c.yaml", "run", "--set", "a=b c"]
    return subprocess.run(command, env={**os.environ, **slurm}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("code", "is_queued_again"), [(0, False), (75, True), (1, False)])
def test_a_slurm_job_starts_one_launcher_a_node(
    code: int, is_queued_again: bool, path: Path, tmp_path: Path
) -> None:
    done = _job(tmp_path, path, code)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "slurm-123456.hostfile").read_text() == "n1 slots=4\nn2 slots=4\n"
    calls = (tmp_path / "called").read_text().splitlines()
    assert calls[0] == "scontrol show hostnames n[1-2]"
    start = (
        "srun --ntasks-per-node=1 --kill-on-bad-exit=1 launch/train.sh c.yaml run --hostfile "
        "slurm-123456.hostfile --no-ssh"
    )
    assert calls[1] == f"{start} --master-port 23456 --set a=b c"
    assert calls[2:] == (["scontrol requeue 123456"] if is_queued_again else [])
