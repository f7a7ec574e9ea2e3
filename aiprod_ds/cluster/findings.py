"""What is wrong with the hosts of a run: rules over what their examination told, each with a way out. Pure:
no I/O, no torch.

Errors would end or spoil a run; warnings may slow it down, or are for the user to decide. Called by the
doctor and the launcher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from aiprod_ds.cluster.examine import Examined

_MAX_SKEW_SECONDS = 2.0
_MIN_FREE_BYTES, _GOOD_FREE_BYTES = 1 << 30, 50 << 30
_GOOD_WRITE_BYTES_PER_SECOND = 100e6
_GOOD_SHARED_MEMORY_BYTES = 1 << 30
_FREE_GPU_SHARE = 0.9
_SLOW_SHARE = 0.8
_MUST_BE_EQUAL = ("torch", "deepspeed", "cuda", "nccl")
_SHOULD_BE_EQUAL = ("diffusers", "transformers", "peft", "safetensors", "av", "numpy")


class Level(str, Enum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        host: Its name; empty for all together.
        problem: The rule and what was found, without a full stop.
        fix: What to do, a sentence.
    """

    level: Level
    host: str
    problem: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return f"{where}{self.problem}. {self.fix}"


def judge(found: Sequence[Examined]) -> list[Finding]:
    """Returns everything that is wrong, errors first."""
    told = [one for one in found if one.probe is not None]
    findings = [*_silent(found)]
    for rule in _RULES_OF_ONE:
        findings += [finding for one in told for finding in rule(one, one.probe or {})]
    for comparison in _RULES_OF_ALL:
        findings += comparison(told)
    return sorted(findings, key=lambda finding: finding.level is not Level.ERROR)


def _silent(found: Sequence[Examined]) -> Iterator[Finding]:
    for one in found:
        if one.unreachable is not None:
            yield _error(
                one, f"must be reachable by ssh without a question, got: {one.unreachable}", _fix_for_ssh(one)
            )
        elif one.failed is not None:
            fix = (
                "The same Python and the same working folder must exist on every host: install there, or "
                "share the folder."
            )
            yield _error(one, f"must run this project's Python, got: {one.failed}", fix)


def _fix_for_ssh(one: Examined) -> str:
    return (
        f"`ssh -o BatchMode=yes {one.host.name} true` must work: name, network, sshd, key, known_hosts. Or "
        "--exclude it."
    )


def _gpus(one: Examined, probe: dict[str, Any]) -> Iterator[Finding]:
    slots = len(one.host.slots)
    if probe["is_cpu_run"]:
        if slots > probe["cores"]:
            yield _warning(
                one,
                f"should have a core for every rank, got {slots} ranks on {probe['cores']} cores",
                "Lower slots.",
            )
        return
    count = len(probe["gpus"])
    if max(one.host.slots) >= count:
        yield _error(
            one,
            f"must have a GPU for every slot, got slots={max(one.host.slots) + 1} and {count} GPUs",
            "Lower slots.",
        )
    for index, gpu in enumerate(probe["gpus"]):
        if not gpu["has_kernels"]:
            capability = ".".join(str(number) for number in gpu["capability"])
            problem = (
                f"torch must be built for GPU {index} ({gpu['name']}, {capability}), got "
                f"{probe['versions']['torch']} without it"
            )
            yield _error(one, problem, "Install a torch build for this card; the newest drop old cards.")
        if gpu["free_bytes"] < _FREE_GPU_SHARE * gpu["memory_bytes"]:
            used = _gib(gpu["memory_bytes"] - gpu["free_bytes"])
            yield _warning(
                one,
                f"GPU {index} should be free, got {used} in use",
                "See `nvidia-smi` there for whose it is.",
            )
    without = [str(index) for index, gpu in enumerate(probe["gpus"]) if not gpu["has_bf16"]]
    if without:
        problem = (
            f"GPU {', '.join(without)} ({probe['gpus'][int(without[0])]['name']}) should have bf16, got "
            "none in hardware"
        )
        yield _warning(one, problem, "Train in fp16: ds_configs/*_fp16_v100.json.")


def _tools(one: Examined, probe: dict[str, Any]) -> Iterator[Finding]:
    tools = probe["tools"]
    needed = [name for name in ("g++", "ninja") if tools[name] is None]
    if needed:
        fix = (
            "Only offload to the CPU needs them: DeepSpeed then compiles its Adam. Install them if a phase "
            "offloads."
        )
        yield _warning(one, f"should have g++ and ninja, got no {' and no '.join(needed)}", fix)
    if not probe["is_cpu_run"] and tools["nvcc"] is None:
        fix = (
            "Only offload to the CPU needs it, to compile as well. Install the CUDA toolkit of torch's "
            "version for it."
        )
        yield _warning(one, "should have nvcc, got none", fix)
    if probe["shared_memory_bytes"] is not None and probe["shared_memory_bytes"] < _GOOD_SHARED_MEMORY_BYTES:
        problem = f"/dev/shm should have 1 GiB or more free, got {_gib(probe['shared_memory_bytes'])}"
        yield _warning(
            one,
            problem,
            "Data loaders and NCCL pass data through it. In a container: --shm-size or --ipc=host.",
        )


def _disk(one: Examined, probe: dict[str, Any]) -> Iterator[Finding]:
    folder = probe["folder"]
    if folder is None:
        return
    if "problem" in folder:
        yield _error(
            one,
            f"{folder['place']} must be writable, got: {folder['problem']}",
            "Name another run folder, or mount it there.",
        )
        return
    free = folder["free_bytes"]
    if free < _GOOD_FREE_BYTES:
        problem = f"{folder['place']} should have {_gib(_GOOD_FREE_BYTES)} or more free, got {_gib(free)}"
        fix = "A checkpoint takes 14 to 18 bytes a trained parameter; free room or set checkpoint.keep_last."
        yield _finding(Level.ERROR if free < _MIN_FREE_BYTES else Level.WARNING, one, problem, fix)
    rate = folder.get("bytes_per_second")
    if rate is not None and rate < _GOOD_WRITE_BYTES_PER_SECOND:
        problem = (
            f"{folder['place']} should take {_GOOD_WRITE_BYTES_PER_SECOND / 1e6:.0f} MB/s, got "
            f"{rate / 1e6:.0f} MB/s"
        )
        yield _warning(
            one, problem, "Training waits while it saves: save less often, or use a faster file system."
        )


def _clock(one: Examined, _: dict[str, Any]) -> Iterator[Finding]:
    if one.skew_seconds is not None and abs(one.skew_seconds) - one.skew_error_seconds > _MAX_SKEW_SECONDS:
        problem = (
            f"its clock should be within {_MAX_SKEW_SECONDS:.0f} s of this machine's, got "
            f"{one.skew_seconds:+.1f} s"
        )
        yield _warning(
            one,
            problem,
            "Start a time service (chrony, systemd-timesyncd) there: logs and file times do not fit.",
        )


def _network(one: Examined, _: dict[str, Any]) -> Iterator[Finding]:
    if one.all_reduce_failed is not None:
        fix = (
            "Open the ports between the hosts, or name the network: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME "
            "in the env file."
        )
        yield _error(
            one, f"its ranks must finish an all-reduce with the others, got: {one.all_reduce_failed}", fix
        )
    if one.all_reduce is not None and one.all_reduce["missing_tokens"]:
        hosts = len(one.all_reduce["missing_tokens"])
        fix = "The run folder must be on a file system that all hosts share."
        yield _error(
            one,
            f"must see what the others write into the run folder, got {hosts} hosts whose file is not there",
            fix,
        )


def _versions(told: Sequence[Examined]) -> Iterator[Finding]:
    for name in ("python", *_MUST_BE_EQUAL, *_SHOULD_BE_EQUAL):
        level = Level.WARNING if name in _SHOULD_BE_EQUAL else Level.ERROR
        yield from _unequal(told, name, partial(_version, name), level, "Install the same version.")
    fix = "Bring all hosts to one commit, or share the folder."
    yield from _unequal(
        told, "the code of aiprod_ds", lambda probe: str(probe["code_sha256"])[:12], Level.ERROR, fix
    )
    fix = "Every update waits for the slowest: a run on unlike cards is as fast as the weakest."
    yield from _unequal(told, "GPUs", _gpu_names, Level.WARNING, fix)


def _version(name: str, probe: dict[str, Any]) -> str:
    return str(probe["versions"].get(name, "none"))


def _gpu_names(probe: dict[str, Any]) -> str:
    return ", ".join(sorted({gpu["name"] for gpu in probe["gpus"]})) or "none"


def _unequal(
    told: Sequence[Examined], what: str, value: Callable[[dict[str, Any]], str], level: Level, fix: str
) -> Iterator[Finding]:
    if not told:
        return
    expected = value(told[0].probe or {})
    for one in told[1:]:
        got = value(one.probe or {})
        if got != expected:
            yield _finding(
                level, one, f"{what} must equal {told[0].host.name}'s ({expected}), got {got}", fix
            )


def _same_machine(told: Sequence[Examined]) -> Iterator[Finding]:
    seen: dict[tuple[str, str], str] = {}
    for one in told:
        probe = one.probe or {}
        key = (str(probe["boot_id"]), str(probe["hostname"]))
        if probe["boot_id"] and key in seen:
            problem = (
                f"must be a machine of its own, got the one that {seen[key]} names too ({probe['hostname']})"
            )
            yield _error(one, problem, "Remove one of the two lines: their ranks would share GPUs.")
        seen.setdefault(key, one.host.name)


def _slow_devices(told: Sequence[Examined]) -> Iterator[Finding]:
    rates: dict[tuple[str, str], list[float]] = {}
    for one, entry in _matmuls(told):
        rates.setdefault(_kind(one, entry), []).append(entry["flops_per_second"])
    for one, entry in _matmuls(told):
        usual = statistics.median(rates[_kind(one, entry)])
        if entry["flops_per_second"] < _SLOW_SHARE * usual:
            got, rest = entry["flops_per_second"] / 1e12, usual / 1e12
            problem = (
                f"{entry['device']} should be as fast as the others of its kind ({rest:.2f} TFLOP/s), got "
                f"{got:.2f}"
            )
            yield _warning(one, problem, "Look for other work on it, heat, power limits or a slow slot.")


def _matmuls(told: Sequence[Examined]) -> Iterator[tuple[Examined, dict[str, Any]]]:
    for one in told:
        for entry in (one.probe or {})["matmul"]:
            if entry["device"] != "cpu":  # which other work slows down as it comes and goes
                yield one, entry


def _kind(one: Examined, entry: dict[str, Any]) -> tuple[str, str]:
    index = int(str(entry["device"]).removeprefix("cuda:"))
    return str((one.probe or {})["gpus"][index]["name"]), str(entry["type"])


def _error(one: Examined, problem: str, fix: str) -> Finding:
    return _finding(Level.ERROR, one, problem, fix)


def _warning(one: Examined, problem: str, fix: str) -> Finding:
    return _finding(Level.WARNING, one, problem, fix)


def _finding(level: Level, one: Examined, problem: str, fix: str) -> Finding:
    return Finding(level=level, host=one.host.name, problem=problem, fix=fix)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


_RULES_OF_ONE = (_gpus, _disk, _network, _clock, _tools)
_RULES_OF_ALL = (_same_machine, _versions, _slow_devices)
