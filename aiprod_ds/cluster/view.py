"""The doctor's page in a terminal: what is wrong, errors first, then the facts host by host. Prints nothing
by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from aiprod_ds.cluster.examine import Examined
from aiprod_ds.cluster.findings import Finding, Level

_STYLES = {Level.ERROR: "red", Level.WARNING: "yellow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorView:
    """A rich renderable.

    Attributes:
        found: Host by host, in the order of the hostfile.
        findings: From `judge`, errors first.
    """

    found: Sequence[Examined]
    findings: Sequence[Finding]

    @property
    def has_errors(self) -> bool:
        """Whether a run would end or go wrong."""
        return any(finding.level is Level.ERROR for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Returns the page JSON-ready: `healthy`, `findings` (level, host, problem, fix) and `hosts`, with
        all that each told."""
        return {
            "healthy": not self.has_errors,
            "findings": [{**asdict(finding), "level": finding.level.value} for finding in self.findings],
            "hosts": [asdict(one) for one in self.found],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the parts from top to bottom; rich calls it."""
        for finding in self.findings:
            yield Text.assemble((finding.level.value, f"bold {_STYLES[finding.level]}"), f" {finding}")
        if self.findings:
            yield Text()
        yield self._table()
        errors = sum(finding.level is Level.ERROR for finding in self.findings)
        yield Text()
        yield Text(
            f"{errors} errors, {len(self.findings) - errors} warnings",
            style="bold red" if errors else "bold green",
        )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("")
        for one in self.found:
            table.add_column(one.host.name)
        rows = [dict(_facts(one)) for one in self.found]
        for name in dict.fromkeys(name for row in rows for name in row):
            table.add_row(Text(name, style="dim"), *(row.get(name, "-") for row in rows))
        return table


def _facts(one: Examined) -> Iterator[tuple[str, str]]:
    """Yields what a reader wants to compare between hosts."""
    yield "slots", str(len(one.host.slots))
    probe = one.probe
    if probe is None:
        yield "reached", "no" if one.unreachable is not None else "yes, but no probe"
        return
    yield "hostname", probe["hostname"]
    gpus = probe["gpus"]
    yield "GPUs", f"{len(gpus)} x {gpus[0]['name']}" if gpus else "none used"
    if gpus:
        yield "GPU memory", _size(gpus[0]["memory_bytes"])
        yield "compute capability", ".".join(str(number) for number in gpus[0]["capability"])
        yield "bf16, fp16", f"{_yes(gpus[0]['has_bf16'])}, {_yes(gpus[0]['has_fp16'])}"
    yield "cores, memory", f"{probe['cores']}, {_size(probe['memory_bytes'])}"
    for name in ("python", "torch", "deepspeed", "cuda", "nccl"):
        yield name, probe["versions"].get(name, "-")
    yield "code", f"{probe['code_sha256'][:12]}{' ' + probe['commit'][:7] if probe['commit'] else ''}"
    yield "tools", ", ".join(name for name, path in probe["tools"].items() if path) or "none"
    yield from _measures(one, probe)


def _measures(one: Examined, probe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    folder = probe["folder"]
    if folder is not None and "problem" not in folder:
        yield (
            "run folder",
            f"{_size(folder['free_bytes'])} free, {folder.get('bytes_per_second', 0) / 1e6:.0f} MB/s",
        )
    if one.skew_seconds is not None:
        yield "clock", f"{one.skew_seconds:+.2f} s (to {one.skew_error_seconds:.2f})"
    if probe["matmul"]:
        slowest = min(probe["matmul"], key=lambda entry: float(entry["flops_per_second"]))
        yield "matmul", f"{slowest['flops_per_second'] / 1e12:.2f} TFLOP/s in {slowest['type']}"
    if one.all_reduce is not None and one.all_reduce["ranks"]:
        rank = one.all_reduce["ranks"][0]
        yield "all-reduce", f"{rank['seconds'] * 1e6:.0f} us, {rank['bytes_per_second'] / 1e9:.2f} GB/s"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
