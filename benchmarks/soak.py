"""Does a run that is disturbed again and again end by itself, and like one that nobody disturbed?

A tiny video VAE trains on two CPU ranks, saves every five updates and keeps three checkpoints. By a seed its
ranks, its launcher, its supervisor (`aiprod-ds launch --max-restarts`) and its loader workers get SIGKILL, a
rank SIGSTOP, the supervisor SIGTERM, the disk is filled up, and gradients are NaN for some updates: in
training, inside a save, while it starts, inside and just after the first save. A run takes as many
disturbances as come before its end; then the next begins.

    python benchmarks/soak.py --output benchmarks/results/NAME.json

The stated part of the disturbances hits `aiprod-ds launch` with DeepSpeed's launcher as a user starts it. In
the other part ranks are forked from a process that has imported everything (`forked_launch.py`): the
restart rule, the supervisor and `aiprod-ds train` are the same, DeepSpeed's launcher has a stand-in, and no
page is written. A service starts the same command again where the supervisor was killed or said 75 (saved),
as a batch system does; whatever else would be needed is a manual action.

Effective training time is the time of the updates that stayed over the wall clock. Disturbances come every
few seconds here, so the share says little by itself; the pause per disturbance says what it is at a rate of
one an hour. Runs with spikes promise to end, not to end like the undisturbed one, which had no spikes.

It does not show: GPUs, NCCL, several hosts, large models (of which a start takes longer), a network file
system. Full disks need root, for a small tmpfs in a namespace of its own, and are left out otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from forked_launch import fork_launch
from result_file import figure, write_result
from soak_job import (
    AFTER_FIRST_SAVE,
    FIRST_SAVE,
    FULL_DISK,
    HANG,
    LAUNCHER,
    MOMENTS,
    RANK,
    SPIKE,
    SUPERVISOR,
    TERM,
    TRAINING,
    WORKER,
    Disturbance,
    DisturbedRun,
    Service,
)

from aiprod_ds.cluster.ssh import Ssh
from aiprod_ds.cluster.start import Request
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.testing.forked import import_for_ranks

RANKS = 2
RUN_UPDATES, TINY_UPDATES = 200, 60
MOST_RESTARTS = 1000
_EVERY = 5
HANG_SECONDS = 6.0  # on a machine so busy that an update takes as long, healthy runs count as hung
_DISK = "48m"
_INSIDE = "--in-namespace"
_KILLS = {RANK: 3, LAUNCHER: 2, SUPERVISOR: 1}
_DECKS = {
    "all": {RANK: 6, LAUNCHER: 3, SUPERVISOR: 2, WORKER: 2, HANG: 2, TERM: 2, FULL_DISK: 3},
    "kills": _KILLS,
}
_SPIKED_EVERY, _SPIKE_SHARE = 3, 0.3
_TINY = (
    (RANK, FIRST_SAVE),
    (WORKER, TRAINING),
    (FULL_DISK, TRAINING),
    (HANG, TRAINING),
    (SUPERVISOR, TRAINING),
)


def main() -> None:
    """Disturbs runs until the wanted number is reached and writes one result file."""
    parser = argparse.ArgumentParser(description="Disturbs training again and again.")
    parser.add_argument("--disturbances", type=int, default=200)
    parser.add_argument("--launched", type=float, default=0.15, help="share under DeepSpeed's launcher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no disturbance after this time")
    parser.add_argument("--kinds", choices=sorted(_DECKS), default="all")
    parser.add_argument("--tiny", action="store_true", help="one of five kinds, of forked ranks")
    parser.add_argument("--folder", type=Path, help="a temporary one by default")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.in_namespace and _can_mount():
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv, _INSIDE])
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="soak_") as name:
        folder = Path(name)
        if arguments.in_namespace:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "soak", name], check=True)
        soak = _Soak(arguments, folder)
        try:
            soak.run()
        finally:
            write_result(arguments.output, "soak", soak.rows())  # what was found stays if a run gets stuck
            if arguments.in_namespace:
                subprocess.run(["umount", "--lazy", name], check=False)
    sys.exit(soak.exit_code())


def _can_mount() -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class _Soak:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._chance = random.Random(arguments.seed)
        self._kinds = _DECKS[arguments.kinds]
        self._has_spikes = arguments.kinds == "all" and not arguments.tiny
        self._has_disk = arguments.in_namespace
        tiny = [one for one in _TINY if self._has_disk or FULL_DISK not in one]
        self._planned = tiny[::-1] if arguments.tiny else []
        self._wanted = len(tiny) if arguments.tiny else arguments.disturbances
        self._launched = 0 if arguments.tiny else round(arguments.launched * self._wanted)
        self._updates = TINY_UPDATES if arguments.tiny else RUN_UPDATES
        self._deadline = time.monotonic() + 60 * arguments.minutes
        self._folder, self._logs = folder, arguments.output.with_suffix("")
        self._flag = folder / "spike"
        self._deck: list[str] = []
        self._found: dict[str, list[DisturbedRun]] = {"forked": [], "launched": []}
        self._wall = {"forked": 0.0, "launched": 0.0}
        self._trained = {"forked": 0.0, "launched": 0.0}
        self._alike, self._spiked = 0, 0

    def run(self) -> None:
        """Trains the undisturbed run and then disturbed ones, forked first."""
        self._logs.mkdir(parents=True, exist_ok=True)
        write_synthetic_clips(
            self._folder / "clips", num_clips=8, frames=6, height=24, width=24, with_sound=False
        )
        self._config = self._folder / "soak.yaml"
        self._config.write_text(json.dumps(_config(self._folder, self._flag, self._updates)))
        (self._folder / "hosts").write_text(f"localhost slots={RANKS}\n")
        import_for_ranks()
        whole = self._new_run("forked", "whole", [])
        whole.finish()
        self._sha256 = _sha256(self._folder / "whole")
        shutil.rmtree(self._folder / "whole")
        wanted = {"forked": self._wanted - self._launched, "launched": self._launched}
        missing = dict(wanted)
        while any(missing.values()) and time.monotonic() < self._deadline:
            form = max(missing, key=lambda form: missing[form] / max(1, wanted[form]))
            self._disturb_a_run(form, missing[form])
            missing[form] = max(0, wanted[form] - self._count(form))

    def _disturb_a_run(self, form: str, most: int) -> None:
        number = len(self._found[form])
        name = f"{form}_{number:02d}"
        is_spiked = self._has_spikes and number % _SPIKED_EVERY == 1
        overrides = [
            f"checkpoint.asynchronous={str(_is_asynchronous(number)).lower()}",
            f"checkpoint.on_full_disk={self._chance.choice(('stop', 'go_on'))}",
        ]
        began = time.monotonic()
        run = self._new_run(form, name, overrides)
        self._found[form].append(run)
        try:
            while len(run.disturbances) < most and time.monotonic() < self._deadline:
                if not run.disturb(*self._next(is_first=not run.disturbances, is_spiked=is_spiked)):
                    break
                print(f"{name} {run.disturbances[-1]}", flush=True)
            run.finish()
        finally:
            run.service.kill()
        self._wall[form] += time.monotonic() - began
        self._trained[form] += _training_seconds(self._folder / name / "metrics.jsonl")
        if any(one.kind == SPIKE for one in run.disturbances):
            self._spiked += 1
        elif _sha256(self._folder / name) == self._sha256:
            self._alike += 1
            print(f"{name} ended like the undisturbed run", flush=True)
        shutil.rmtree(self._folder / name)

    def _new_run(self, form: str, name: str, overrides: Sequence[str]) -> DisturbedRun:
        log = self._logs / f"{name}.log"
        log.unlink(missing_ok=True)
        request = Request(
            config=self._config,
            run_folder=self._folder / name,
            hostfile=self._folder / "hosts",
            overrides=tuple(overrides),
            ssh=Ssh(),
            max_restarts=MOST_RESTARTS,
        )
        begin = partial(_fork if form == "forked" else _launch, request, log)
        return DisturbedRun(
            request.run_folder,
            log=log,
            service=Service(begin=begin),
            flag=self._flag,
            chance=random.Random(self._chance.random()),
        )

    def _next(self, *, is_first: bool, is_spiked: bool) -> tuple[str, str]:
        """Returns the next kind and moment."""
        if self._planned:
            return self._planned.pop()
        if is_first:
            return self._chance.choice(list(_KILLS)), self._chance.choice((FIRST_SAVE, AFTER_FIRST_SAVE))
        if is_spiked and self._chance.random() < _SPIKE_SHARE:
            return SPIKE, TRAINING
        if not self._deck:
            kinds = {
                kind: count for kind, count in self._kinds.items() if self._has_disk or kind != FULL_DISK
            }
            self._deck = [kind for kind, count in kinds.items() for _ in range(count)]
            self._chance.shuffle(self._deck)
        kind = self._deck.pop()
        return kind, self._chance.choice(MOMENTS[kind])

    def _count(self, form: str) -> int:
        return sum(len(run.disturbances) for run in self._found[form])

    def exit_code(self) -> int:
        """Returns 0 if nobody had to do anything and all that was promised held."""
        rows = {row["metric"]: row["value"] for row in self.rows() if row["case"] == "all"}
        is_alike = rows["runs equal"] == rows["runs that promise it"]
        is_cheap = self._most_lost(is_asynchronous=False) <= _EVERY
        is_cheap = is_cheap and self._most_lost(is_asynchronous=True) < 2 * _EVERY
        return 0 if rows["manual actions"] == 0 and is_alike and is_cheap else 1

    def _most_lost(self, *, is_asynchronous: bool) -> int:
        """Returns the most updates that a kill has cost."""
        return max(
            (
                one.lost
                for runs in self._found.values()
                for number, run in enumerate(runs)
                for one in run.disturbances
                if one.kind in _KILLS and _is_asynchronous(number) is is_asynchronous
            ),
            default=0,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of the result."""
        runs = [run for form in self._found.values() for run in form]
        found = [one for run in runs for one in run.disturbances]
        row = partial(figure, "all")
        rows = [
            row("disturbances", "", [len(found)], goal=200),
            row("manual actions", "", [sum(len(run.service.unasked) for run in runs)], goal=0),
            row("runs that ended", "", [len(runs)]),
            row("runs that promise it", "", [len(runs) - self._spiked]),
            row("runs equal", "", [self._alike]),
            row("restarts", "", [sum(run.starts() for run in runs) - len(runs)]),
            row("starts by the service", "", [sum(run.service.starts for run in runs) - len(runs)]),
            row("lost updates", "updates", [sum(one.lost for one in found)]),
            row(
                "most lost updates of a kill",
                "updates",
                [self._most_lost(is_asynchronous=False)],
                goal=_EVERY,
            ),
            row(
                "most lost updates of a kill, saved while it trained",
                "updates",
                [self._most_lost(is_asynchronous=True)],
                goal=2 * _EVERY - 1,  # a save that is not finished when the next is due is the one before
            ),
        ]
        for form, of_form in self._found.items():
            if self._wall[form]:
                rows += self._rows_of_form(form, [one for run in of_form for one in run.disturbances])
        for kind in MOMENTS:
            rows += _rows_of_kind(kind, [one for one in found if one.kind == kind])
        rows.append(row("saves cut in two", "", [sum(one.has_cut_a_save for one in found)]))
        for moment, count in sorted(Counter(one.moment for one in found).items()):
            rows.append(figure(moment, "disturbances", "", [count]))
        return rows

    def _rows_of_form(self, form: str, found: Sequence[Disturbance]) -> list[dict[str, Any]]:
        pauses = [one.pause_seconds for one in found] or [0.0]
        return [
            figure(form, "disturbances", "", [len(found)]),
            figure(form, "wall clock", "s", [self._wall[form]]),
            figure(form, "effective training time", "share", [self._trained[form] / self._wall[form]]),
            figure(form, "mean pause", "s", [statistics.mean(pauses)]),
            figure(
                form, "effective training time at one an hour", "share", [1 - statistics.mean(pauses) / 3600]
            ),
        ]


def _rows_of_kind(kind: str, found: Sequence[Disturbance]) -> list[dict[str, Any]]:
    if not found:
        return [figure(kind, "disturbances", "", [0])]
    ends = [one.end_seconds for one in found if one.end_seconds is not None]
    rows = [
        figure(kind, "disturbances", "", [len(found)]),
        figure(kind, "lost updates", "updates", [sum(one.lost for one in found)]),
        figure(kind, "median pause", "s", [statistics.median(one.pause_seconds for one in found)]),
    ]
    return rows + ([figure(kind, "longest until the ranks were gone", "s", [max(ends)])] if ends else [])


def _config(folder: Path, flag: Path, updates: int) -> dict[str, Any]:
    phases = [
        {
            "name": f"phase_{index}",
            "resolution": resolution,
            "duration": {"frames": 5},
            "global_batch_size": 2 * RANKS,
            "updates": updates // 2,
            "learning_rate": 1e-3,
        }
        for index, resolution in enumerate(("16x16", "24x24"))
    ]
    return {
        "trainer": "video_vae",
        "output_dir": "named_by_the_command",
        "model": {
            "source": "soak_model:SpikingVAE",
            "config": {"flag": str(flag)},
            "spatial_stride": 4,
            "temporal_stride": 2,
        },
        "data": {"train": str(folder / "clips"), "validation": str(folder / "clips"), "num_workers": 1},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": phases},
        "engine": {
            "deepspeed_config": {"zero_optimization": {"stage": 1}},
            "hang_seconds": HANG_SECONDS,
        },
        "checkpoint": {"every_updates": _EVERY, "keep_last": 3},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        "spikes": {"max_rollbacks": 20},
        "report": {"flush_updates": 1},
    }


def _is_asynchronous(run: int) -> bool:
    """Returns whether run number `run` of its form saves while it trains: every second one."""
    return run % 2 == 1


def _train_arguments(request: Request) -> list[str]:
    overrides = [part for override in request.overrides for part in ("--set", override)]
    run = ["--output-dir", str(request.run_folder), "--resume", request.resume, "--trust-code"]
    return [str(request.config), *run, *overrides]


def _fork(request: Request, log: Path) -> int:
    return fork_launch(request, _be_rank, ranks=RANKS, output=log)


def _be_rank(request: Request) -> int:
    from aiprod_ds.cli import main as aiprod_ds
    from aiprod_ds.testing.runs import without_plots

    with without_plots():
        return aiprod_ds(["train", *_train_arguments(request)])


def _launch(request: Request, log: Path) -> int:
    process = os.fork()
    if process == 0:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        overrides = [part for override in request.overrides for part in ("--set", override)]
        places = [str(request.config), str(request.run_folder), "--hostfile", str(request.hostfile)]
        how = ["--no-ssh", "--node-rank", "0", "--max-restarts", str(request.max_restarts), "--trust-code"]
        command = [sys.executable, "-m", "aiprod_ds", "launch", *places, *how, *overrides]
        os.execv(sys.executable, command)
    return process


def _sha256(folder: Path) -> str:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return str(report["final_state_sha256"])


def _training_seconds(metrics: Path) -> float:
    rows = map(json.loads, metrics.read_text().splitlines())
    return float(sum(row.get("time/update_seconds", 0.0) for row in rows))


if __name__ == "__main__":
    main()
