"""The doctor's rules: healthy hosts give no finding, and every rule finds what it is for and says what to
do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from aiprod_ds.cluster.examine import Examined, address_of
from aiprod_ds.cluster.findings import Level, judge
from aiprod_ds.cluster.hostfile import Host
from aiprod_ds.cluster.probe import has_kernels
from aiprod_ds.cluster.view import DoctorView

GIB = 1 << 30
GPU = {
    "name": "NVIDIA H100",
    "capability": [9, 0],
    "memory_bytes": 80 * GIB,
    "free_bytes": 79 * GIB,
    "has_bf16": True,
    "has_fp16": True,
    "has_kernels": True,
}
PROBE: dict[str, Any] = {
    "hostname": "a",
    "boot_id": "1",
    "addresses": ["10.0.0.1"],
    "reached_at": "10.0.0.1",
    "free_port": 29500,
    "python": "python",
    "versions": {
        "python": "3.12.1",
        "torch": "2.11.0",
        "deepspeed": "0.19.8",
        "cuda": "13.0",
        "nccl": "2.29.3",
        "numpy": "2.1",
    },
    "code_sha256": "c" * 64,
    "commit": "1" * 40,
    "cores": 16,
    "memory_bytes": 128 * GIB,
    "shared_memory_bytes": 64 * GIB,
    "is_cpu_run": False,
    "gpus": [GPU, GPU],
    "tools": {
        "g++": "/usr/bin/g++",
        "ninja": "/usr/bin/ninja",
        "nvcc": "/usr/bin/nvcc",
        "numactl": None,
        "pdsh": None,
    },
    "folder": {"place": "/runs", "free_bytes": 900 * GIB, "bytes_per_second": 1e9},
    "matmul": [
        {"device": f"cuda:{index}", "type": "bfloat16", "flops_per_second": 700e12} for index in range(2)
    ],
}
ALL_REDUCE: dict[str, Any] = {
    "missing_tokens": [],
    "problem": None,
    "ranks": [{"seconds": 2e-5, "bytes_per_second": 2e11}],
}


def healthy() -> list[Examined]:
    found = []
    for index, name in enumerate(("node-a", "node-b")):
        probe = {**deepcopy(PROBE), "hostname": name, "boot_id": str(index)}
        host = Host(name=name, slots=(0, 1))
        found.append(
            Examined(
                host=host,
                probe=probe,
                skew_seconds=0.1,
                skew_error_seconds=0.2,
                all_reduce=deepcopy(ALL_REDUCE),
            )
        )
    return found


def _probe_with(**values: Any) -> Callable[[list[Examined]], None]:
    def change(found: list[Examined]) -> None:
        assert found[1].probe is not None
        found[1].probe |= values

    return change


def _on_cpus(**values: Any) -> Callable[[list[Examined]], None]:
    def change(found: list[Examined]) -> None:
        for one in found:
            assert one.probe is not None
            one.probe |= {"is_cpu_run": True, "gpus": [], "matmul": []}
        _probe_with(**values)(found)

    return change


def _gpu_with(**values: Any) -> Callable[[list[Examined]], None]:
    return _probe_with(gpus=[GPU, {**GPU, **values}])


def _versions_with(**values: str) -> Callable[[list[Examined]], None]:
    return _probe_with(versions={**PROBE["versions"], **values})


def _host_with(**values: Any) -> Callable[[list[Examined]], None]:
    def change(found: list[Examined]) -> None:
        for name, value in values.items():
            setattr(found[1], name, value)

    return change


ERRORS = {
    "all-reduce",
    "code",
    "nccl",
    "no kernels",
    "no python",
    "no room",
    "not shared",
    "not writable",
    "same machine",
}
ERRORS |= {"too few GPUs", "torch", "unreachable"}  # the others are warnings
CASES = {
    "unreachable": (
        _host_with(probe=None, unreachable="timed out"),
        "must be reachable by ssh without a question, got: timed",
    ),
    "no python": (
        _host_with(probe=None, failed="No module named torch"),
        "must run this project's Python, got: No module",
    ),
    "too few GPUs": (
        _probe_with(gpus=[GPU], matmul=[]),
        "must have a GPU for every slot, got slots=2 and 1 GPUs",
    ),
    "too few cores": (_on_cpus(cores=1), "got 2 ranks on 1 cores"),
    "no kernels": (
        _gpu_with(has_kernels=False),
        "torch must be built for GPU 1 (NVIDIA H100, 9.0), got 2.11.0 without it",
    ),
    "GPU in use": (_gpu_with(free_bytes=10 * GIB), "GPU 1 should be free, got 70.0 GiB in use"),
    "no bf16": (_gpu_with(has_bf16=False), "GPU 1 (NVIDIA H100) should have bf16, got none in hardware"),
    "unlike GPUs": (
        _gpu_with(name="Tesla V100"),
        "GPUs must equal node-a's (NVIDIA H100), got NVIDIA H100, Tesla V100",
    ),
    "torch": (_versions_with(torch="2.10.0"), "torch must equal node-a's (2.11.0), got 2.10.0"),
    "nccl": (_versions_with(nccl="2.27.5"), "nccl must equal node-a's (2.29.3), got 2.27.5"),
    "numpy": (_versions_with(numpy="1.26"), "numpy must equal node-a's (2.1), got 1.26"),
    "code": (
        _probe_with(code_sha256="d" * 64),
        "the code of aiprod_ds must equal node-a's (cccccccccccc), got dddddddddddd",
    ),
    "same machine": (
        _probe_with(hostname="node-a", boot_id="0"),
        "must be a machine of its own, got the one that node-a",
    ),
    "no compiler": (
        _probe_with(tools={**PROBE["tools"], "g++": None}),
        "should have g++ and ninja, got no g++. Only offload to the CPU",
    ),
    "no nvcc": (_probe_with(tools={**PROBE["tools"], "nvcc": None}), "should have nvcc, got none"),
    "small /dev/shm": (
        _probe_with(shared_memory_bytes=GIB // 16),
        "/dev/shm should have 1 GiB or more free, got 0.1 GiB",
    ),
    "not writable": (
        _probe_with(folder={**PROBE["folder"], "problem": "read-only"}),
        "/runs must be writable, got: read-only",
    ),
    "little room": (
        _probe_with(folder={**PROBE["folder"], "free_bytes": 9 * GIB}),
        "50.0 GiB or more free, got 9.0 GiB",
    ),
    "no room": (_probe_with(folder={**PROBE["folder"], "free_bytes": GIB // 2}), "got 0.5 GiB"),
    "slow disk": (
        _probe_with(folder={**PROBE["folder"], "bytes_per_second": 2e7}),
        "should take 100 MB/s, got 20 MB/s",
    ),
    "clock": (_host_with(skew_seconds=-9.5), "its clock should be within 2 s of this machine's, got -9.5 s"),
    "not shared": (
        _host_with(all_reduce={**ALL_REDUCE, "missing_tokens": ["x"]}),
        "got 1 hosts whose file is not there",
    ),
    "all-reduce": (
        _host_with(all_reduce=None, all_reduce_failed="refused"),
        "must finish an all-reduce with the others, got: ref",
    ),
    "slow GPU": (
        _probe_with(matmul=[{**PROBE["matmul"][0], "flops_per_second": 300e12}, PROBE["matmul"][1]]),
        "cuda:0 should be as fast as the others of its kind (700.00 TFLOP/s), got 300.00",
    ),
}


def test_healthy_hosts_give_no_finding() -> None:
    page = DoctorView(found=healthy(), findings=judge(healthy()))
    assert page.findings == []
    assert page.document()["healthy"]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_what_it_is_for(name: str) -> None:
    change, problem = CASES[name]
    found = healthy()
    change(found)
    findings = judge(found)
    assert [finding.host for finding in findings] == ["node-b"]
    assert (findings[0].level is Level.ERROR) == (name in ERRORS)
    assert problem in str(findings[0])
    assert findings[0].fix.endswith(".")
    assert DoctorView(found=found, findings=findings).has_errors == (name in ERRORS)


def test_errors_come_first() -> None:
    found = healthy()
    for case in ("no bf16", "unlike GPUs", "clock", "all-reduce"):
        CASES[case][0](found)
    levels = [finding.level for finding in judge(found)]
    assert levels == sorted(levels, key=lambda level: level is not Level.ERROR)
    assert {Level.ERROR, Level.WARNING} == set(levels)


KERNELS = {
    "machine code of the same": ((7, 0), ["sm_70", "sm_80"], True),
    "machine code of a lower minor": ((8, 6), ["sm_80"], True),
    "only of a higher minor": ((8, 0), ["sm_86"], False),
    "only of newer": ((7, 0), ["sm_75", "sm_80", "sm_90a"], False),
    "only of older": ((12, 0), ["sm_90"], False),
    "code to compile": ((12, 0), ["sm_90", "compute_90"], True),
    "unknown names": ((7, 0), ["gfx90a"], False),
}


@pytest.mark.parametrize(("capability", "architectures", "expected"), KERNELS.values(), ids=list(KERNELS))
def test_whether_torch_is_built_for_a_card(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert has_kernels(capability, architectures) is expected


def test_the_first_hosts_address_is_one_that_others_can_use() -> None:
    assert address_of(PROBE, is_local=False) == "10.0.0.1"
    by_name = {**PROBE, "reached_at": "127.0.1.1", "addresses": ["127.0.1.1", "10.0.0.9"]}
    assert address_of(by_name, is_local=False) == "10.0.0.9"
    assert address_of({**by_name, "addresses": ["127.0.1.1"]}, is_local=False) == "a"


def test_the_page_shows_problems_first_and_then_the_facts_of_every_host() -> None:
    found = healthy()
    CASES["no bf16"][0](found)
    found.append(Examined(host=Host(name="node-c", slots=(0,)), unreachable="timed out"))
    console = Console(width=200, file=StringIO())
    console.print(DoctorView(found=found, findings=judge(found)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("error node-c: must be reachable by ssh without a question, got: timed out.")
    assert lines[1].startswith("warning node-b: GPU 1 (NVIDIA H100) should have bf16")
    rows = {line[:20].strip(): line[20:].split("  ") for line in lines[3:-1]}
    assert [cell.strip() for cell in rows["torch"] if cell.strip()] == ["2.11.0", "2.11.0", "-"]
    assert [cell.strip() for cell in rows["compute capability"] if cell.strip()] == ["9.0", "9.0", "-"]
    assert lines[-1] == "1 errors, 1 warnings"
