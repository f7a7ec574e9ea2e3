"""The checks of training: each trainer does some DeepSpeed updates, is killed by SIGKILL after its first
checkpoint, goes on from there, and must end with the same bits as a run that nobody killed.

Owns the process in which `runs.py` trains, and the comparison of what it wrote. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from aiprod_ds.validate.check import CheckFailedError, require_equal

KINDS = ("video_vae", "audio_vae", "diffusion")
UPDATES = 4
_SECONDS = 600.0  # of all runs, which take some thirty on a free machine
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Trainings:
    """All runs, begun at once, so that other checks can be done meanwhile.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        for name in _LAUNCHED:
            environment.pop(name, None)
        with (folder / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aiprod_ds.validate.runs", str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def check(self, kind: str) -> str:
        """Waits for the runs and compares those of a kind; returns in words what was compared.

        Raises:
            CheckFailedError: If a run fails, is not killed, or ends with other bits.
        """
        codes = self._codes
        for name, wanted in (("whole", 0), ("killed", -signal.SIGKILL), ("resumed", 0)):
            if codes[name][kind] != wanted:
                raise CheckFailedError(
                    f"exit code of the {name} run: must be {wanted}, got {codes[name][kind]}"
                    f"{self._last_words()}"
                )
        whole, resumed = (self._record(name, kind) for name in ("whole", "resumed"))
        (start,) = resumed["resumed_from"] or ("nothing",)
        require_equal("checkpoint that the killed run went on from", start.startswith("update_"), True)
        require_equal("SHA-256 of weights and optimizer after the resume", resumed["sha256"], whole["sha256"])
        require_equal("rows of metrics.jsonl after the resume", resumed["rows"], whole["rows"])
        return f"{whole['device']}, {whole['settings']}: killed, went on from {start} of {UPDATES} updates"

    def seconds(self, kind: str) -> float:
        """Returns how long the runs of a kind took; 0 where nobody knows."""
        file = self._folder / "seconds.json"
        return float(json.loads(file.read_text())[kind]) if file.is_file() else 0.0

    def close(self) -> None:
        """Ends whatever still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        try:
            code = self._process.wait(max(1.0, self._began + _SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise CheckFailedError(
                f"training: must end within {_SECONDS:.0f} s, got more{self._last_words()}"
            ) from None
        if code != 0:
            raise CheckFailedError(f"training: must run, got exit code {code}{self._last_words()}")
        found: dict[str, dict[str, int]] = json.loads((self._folder / "codes.json").read_text())
        return found

    def _record(self, name: str, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / f"{name}_{kind}.json").read_text(encoding="utf-8"))
        return found

    def _last_words(self) -> str:
        lines = (self._folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][-300:]}" if lines else ""
