"""How fast are many files looked into, and does the memory for it grow with their number?

Draws 20 films of 3 frames of 48x32 and links them under many names in folders of a thousand, so that reading
them costs next to nothing. Of each number of files, each in a process of its own:

    first scan       `scan` with an empty cache: every file is probed, in as many processes as there are cores
    scan             the same from the cache, what a run and `check` do
    data             `aiprod-ds data` from the cache, with page, table and JSON

The first scan runs once and fills the cache; of the others the best of several runs counts, since what else a
machine does only adds to their time. Peaks are of resident memory. `scan` gives all records, which training
needs; `data` keeps none.

    python benchmarks/scanning.py --files 10000 100000 --runs 3 --output benchmarks/results/NAME.json

Of several runs the rate is the best one, not the median. Those of 29 November 2026 were taken while other
work put a load of 10 to 17 on two cores. It does not show: network file systems, where asking for a file's
size and time takes longer than all of this, or long films, of which the first scan reads every byte once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from result_file import figure, write_result

from aiprod_ds.testing.awkward import Coding, corners, write_film

_NUM_FILMS, _IN_A_FOLDER = 20, 1_000
_SCAN = """
from aiprod_ds.data.manifest import scan
from aiprod_ds.data.probe_cache import default_probe_cache
source = Path(sys.argv[1])
began = time.perf_counter()
count = len(scan(source, cache=default_probe_cache(source)).records)
"""
_DATA = """
from aiprod_ds.cli import main
began = time.perf_counter()
main(["data", sys.argv[1], "--output", sys.argv[2], "--json", sys.argv[2] + ".json"])
count = int(sys.argv[3])
"""
_HEAD = "import json, re, sys, time\nfrom pathlib import Path\n"
_TAIL = """
seconds = time.perf_counter() - began
# Not `ru_maxrss`, which begins with that of the process that started this one.
status = Path("/proc/self/status").read_text()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
print(json.dumps([count, seconds, peak]))
"""


def main() -> None:
    """Measures every number of files and writes one result file."""
    parser = argparse.ArgumentParser(description="Rate and memory of looking into many files.")
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AIPROD_DS_CACHE_DIR"] = str(Path(folder, "cache"))
        films = _films(Path(folder, "films"))
        for number in arguments.files:
            source = _linked(films, Path(folder, f"clips{number}"), number)
            for name, script, runs, goal in (
                ("first scan", _SCAN, 1, None),
                ("scan", _SCAN, arguments.runs, 1_000.0),
                ("data", _DATA, arguments.runs, 1_000.0),
            ):
                measured = [_run(script, source, number) for _ in range(runs)]
                rates = [count / seconds for count, seconds, _ in measured]
                case = f"{name}, {number:,} files"
                rows.append(figure(case, "rate", "files/s", rates, goal=goal) | {"value": max(rates)})
                rows.append(figure(case, "peak memory", "MB", [peak / 1e6 for _, _, peak in measured]))
    write_result(arguments.output, "scanning", rows)


def _films(folder: Path) -> list[Path]:
    return [
        write_film(
            folder / f"{number}.mp4",
            [corners(32, 48)] * 3,
            Coding(codec="libx264", pixel_format="yuv420p", options={"crf": str(10 + number)}),
        )
        for number in range(_NUM_FILMS)
    ]


def _linked(films: list[Path], source: Path, number: int) -> Path:
    for index in range(number):
        link = source / f"{index // _IN_A_FOLDER:04d}" / f"clip_{index:07d}.mp4"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(films[index % _NUM_FILMS])
    return source


def _run(script: str, source: Path, number: int) -> tuple[int, float, int]:
    command = [sys.executable, "-c", f"{_HEAD}{script}{_TAIL}", str(source), f"{source}_out", str(number)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    count, seconds, peak = json.loads(said.stdout.splitlines()[-1])
    assert count == number, f"{count} of {number} files"
    return count, seconds, peak


if __name__ == "__main__":
    main()
