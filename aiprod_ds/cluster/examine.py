"""The examination of all hosts before a run: reach, probe, all-reduce, in this order, each on all hosts at
the same time.

Owns the order and the remote command lines; measuring is done by `probe` and `all_reduce` on the hosts,
judging by `findings`. Without a hostfile this machine is the only host and no ssh is used. Called by the
command line and, shortened, by the launcher.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiprod_ds.cluster.hostfile import Host, num_ranks
from aiprod_ds.cluster.ssh import Answer, Ssh, ask_all, ask_here

_REACH_SECONDS, _PROBE_SECONDS, _ALL_REDUCE_SECONDS, _REMOVE_SECONDS = 30.0, 180.0, 150.0, 30.0


@dataclass(slots=True, kw_only=True)
class Examined:
    """What was found on one host.

    Attributes:
        probe: What `probe.probe` returned there; None if it was not reached or the probe failed.
        unreachable: Why ssh failed, in words; None if it did not.
        failed: Why the probe failed, in words; None if it did not.
        skew_seconds: Its clock minus this machine's.
        skew_error_seconds: How far off that may be.
        all_reduce: What `all_reduce.run_host` returned; None if it did not run or failed.
        all_reduce_failed: Why, in words; None if it did not.
    """

    host: Host
    probe: dict[str, Any] | None = None
    unreachable: str | None = None
    failed: str | None = None
    skew_seconds: float | None = None
    skew_error_seconds: float = 0.0
    all_reduce: dict[str, Any] | None = None
    all_reduce_failed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner:
    """Runs the steps.

    Attributes:
        hosts: Of the run; one with the name `localhost` and no ssh is this machine.
        ssh: How to reach them; None: this machine only.
        environment: Variables that the ranks will have beyond those of a login.
        run_folder: Where the run will write; None leaves the disk out.
        master_address: Of the first host; None: found out.
    """

    hosts: Sequence[Host]
    ssh: Ssh | None
    environment: Mapping[str, str] = field(default_factory=dict)
    run_folder: Path | None = None
    master_address: str | None = None

    def examine(self, *, measures: bool) -> list[Examined]:
        """Returns what was found on every host; with `measures`, also the speed of disk, devices and
        network."""
        found = [Examined(host=host) for host in self.hosts]
        token = f".doctor_{uuid4().hex}"
        tokens = [f"{token}_{index}" for index in range(len(found))]
        try:
            self._reach(found)
            self._probe(found, tokens, measures=measures)
            if measures and all(one.probe is not None for one in found):
                self._all_reduce(found, tokens)
        finally:
            self._remove(found, tokens)
        return found

    def _reach(self, found: list[Examined]) -> None:
        if self.ssh is None:
            return
        names = [one.host.name for one in found]
        for one, answer in zip(
            found,
            ask_all(names, self.ssh, lambda _: ["date", "+%s.%N"], timeout_seconds=_REACH_SECONDS),
            strict=True,
        ):
            if answer.code != 0:
                one.unreachable = answer.reason
                continue
            try:
                told = float(answer.output)
            except ValueError:
                continue  # a `date` without nanoseconds: no figure
            one.skew_seconds = told - (answer.began_at + answer.ended_at) / 2
            one.skew_error_seconds = (answer.ended_at - answer.began_at) / 2

    def _probe(self, found: list[Examined], tokens: list[str], *, measures: bool) -> None:
        reached = [(one, token) for one, token in zip(found, tokens, strict=True) if one.unreachable is None]
        folder = None if self.run_folder is None or not measures else str(self.run_folder)
        calls = [{"folder": folder, "token": token, "measures": measures} for _, token in reached]
        answers = self._run([one for one, _ in reached], "probe", calls, _PROBE_SECONDS)
        for (one, _), answer in zip(reached, answers, strict=True):
            one.probe = _parsed(answer)
            one.failed = None if one.probe is not None else answer.reason

    def _all_reduce(self, found: list[Examined], tokens: list[str]) -> None:
        first = found[0].probe
        assert first is not None
        places = {
            one.probe["folder"]["place"]
            for one in found
            if one.probe is not None and one.probe["folder"] is not None
        }
        common: dict[str, Any] = {
            "world_size": num_ranks(self.hosts),
            "address": self.master_address or address_of(first, is_local=self.ssh is None),
            "port": first["free_port"],
            "tokens": tokens,
        }
        calls, rank = [], 0
        for one in found:
            assert one.probe is not None
            folder = None if one.probe["folder"] is None else one.probe["folder"]["place"]
            calls.append(
                {
                    **common,
                    "first_rank": rank,
                    "slots": list(one.host.slots),
                    "folder": folder if places else None,
                }
            )
            rank += len(one.host.slots)
        for one, answer in zip(
            found, self._run(found, "all_reduce", calls, _ALL_REDUCE_SECONDS), strict=True
        ):
            one.all_reduce = _parsed(answer)
            one.all_reduce_failed = answer.reason if one.all_reduce is None else one.all_reduce["problem"]

    def _remove(self, found: list[Examined], tokens: list[str]) -> None:
        written = [
            (one, str(Path(one.probe["folder"]["place"]) / token))
            for one, token in zip(found, tokens, strict=True)
            if one.probe is not None and one.probe["folder"] is not None
        ]
        if self.ssh is None:
            for _, path in written:
                Path(path).unlink(missing_ok=True)
        elif written:
            names = [one.host.name for one, _ in written]
            ask_all(
                names,
                self.ssh,
                lambda index: ["rm", "-f", "--", written[index][1]],
                timeout_seconds=_REMOVE_SECONDS,
            )

    def _run(
        self, found: list[Examined], part: str, calls: list[dict[str, Any]], timeout_seconds: float
    ) -> list[Answer]:
        """Runs a part of the examination on the hosts, with the environment and working folder that the ranks
        will have."""
        commands = [[sys.executable, "-m", f"aiprod_ds.cluster.{part}", json.dumps(call)] for call in calls]
        if self.ssh is None:
            environment = {**os.environ, **self.environment}
            return [
                ask_here(command, timeout_seconds=timeout_seconds, environment=environment)
                for command in commands
            ]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return ask_all(
            [one.host.name for one in found],
            self.ssh,
            # `cd` inside the command, so that no login shell's syntax matters
            lambda index: ["env", "-C", str(Path.cwd()), *variables, *commands[index]],
            timeout_seconds=timeout_seconds,
        )


def address_of(probe: Mapping[str, Any], *, is_local: bool) -> str:
    """Returns an address at which other hosts reach the probed one: where ssh did, unless that was a
    loopback."""
    if is_local:
        return "127.0.0.1"
    candidates = [str(probe["reached_at"]), *probe["addresses"]]
    outside = [
        address for address in candidates if address and not address.startswith(("127.", "::1", "fe80:"))
    ]
    return outside[0] if outside else str(probe["hostname"])


def _parsed(answer: Answer) -> dict[str, Any] | None:
    """Returns the JSON of the last line; a login shell may have greeted before it."""
    lines = answer.output.strip().splitlines()
    if answer.code != 0 or not lines:
        return None
    try:
        parsed = json.loads(lines[-1])
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
