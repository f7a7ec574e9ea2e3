"""Weights & Biases as a mirror of metrics.jsonl and of what evaluations show; the only importer of wandb.

Every wait is bounded and every failure costs one warning: training neither stops nor stands for a logging
service. wandb is imported when a run asks for it, gets no terminal output of the run, and never asks for a
key.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiprod_ds.config.run import WandbConfig
from aiprod_ds.files import write_atomically
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.shown import TABLE, caption_of, evaluations_so_far, measures_table, named_media
from aiprod_ds.metrics.sinks import MirrorSink, OwnThreadSink, Sink

_log = logging.getLogger(__name__)


def open_wandb(
    config: WandbConfig, *, folder: Path, run_config: Mapping[str, Any], wait_seconds: float = 15.0
) -> Sink | None:
    """Returns the sink for this run, or None if it is off or could not be started (one warning).

    Args:
        config: Without a name, the run has that of its folder.
        folder: The run folder; wandb keeps its files in `folder/wandb`, and the run's id, so that a resumed
            run goes on in the same wandb run.
        run_config: The resolved configuration, shown beside the run.
        wait_seconds: Longest wait for the service at the start, and again at the end.
    """
    if config.mode == "off":
        return None
    try:
        sink = MirrorSink(_WandbSink(config, folder, run_config, wait_seconds), name="wandb")
        return OwnThreadSink(sink, name="wandb", close_seconds=wait_seconds + 5, on_abandoned=_abandon)
    except Exception as error:  # noqa: BLE001 whatever a logging service raises, training goes on
        _log.warning(
            "mirror=wandb mode=%s not started error=%r; metrics.jsonl holds everything", config.mode, error
        )
        return None


class _WandbSink:
    """One wandb run; raises what wandb raises."""

    def __init__(
        self, config: WandbConfig, folder: Path, run_config: Mapping[str, Any], wait_seconds: float
    ) -> None:
        import wandb

        if config.mode == "online" and not wandb.login(prompt=False, verify=False):
            # wandb.init would ask at the terminal; a job that nobody watches would stand still.
            raise RuntimeError(
                "wandb: online needs an API key, found none. Run `wandb login` or set mode to offline."
            )
        self._originals: set[str] = set()
        run_folder = folder / "wandb"
        run_folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            entity=config.entity,
            project=config.project,
            group=config.group,
            name=config.name or folder.name,
            notes=config.notes,
            tags=list(config.tags),
            config=dict(run_config),
            dir=folder,
            id=_run_id(run_folder / "run_id"),
            resume="allow",
            mode="online" if config.mode == "online" else "offline",
            settings=wandb.Settings(
                init_timeout=wait_seconds,
                finish_timeout=wait_seconds,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=update)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        import wandb

        kinds = {"picture": wandb.Image, "film": wandb.Video, "sound": wandb.Audio}
        shown: dict[str, Any] = {}
        for name, medium in named_media(record, folder).items():
            if medium.role == "original":  # the same at every evaluation
                if medium.path in self._originals:
                    continue
                self._originals.add(medium.path)
            shown[name] = kinds[medium.kind](str(folder / medium.path), caption=caption_of(medium))
        columns, rows = measures_table(evaluations_so_far(record, folder))
        shown[TABLE] = wandb.Table(columns=[*columns], data=rows)
        self._run.log(shown, step=record.update)

    def close(self) -> None:
        self._run.finish()


def _abandon() -> None:
    """Lets the process end without the service that no longer answers.

    wandb waits for its service at the process's exit, without a limit; its own teardown takes that hook away
    first and waits then, which here nobody waits for.
    """
    import wandb

    threading.Thread(target=wandb.teardown, name="wandb-teardown", daemon=True).start()


def _run_id(path: Path) -> str:
    """Returns the id of this folder's wandb run, made at the first call."""
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="ascii").strip()
