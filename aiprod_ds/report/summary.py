"""The record of a finished run: what report.json holds and report.md tells. The trainer fills it, on the main
rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class RunStatus(str, Enum):
    """How the run ended."""

    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSummary:
    """One phase as it ran.

    Attributes:
        resolution: `height x width` in pixels, `64x64`; empty for audio.
        frames: Frames per clip after snapping (samples per clip for audio).
        batch: Clips of all ranks in one update.
        shapes: The shape and batch of every bucket in words; `resolution`, `frames` and `batch` are those of
            the first.
        ended_by: updates, epochs or plateau; None while the phase goes on.
        lr_max: Highest learning rate reached.
        seconds: Training time; evaluation, saving and phase changes excluded.
        metrics: Held-out measures at the end of the phase, by name.
    """

    name: str
    updates: int
    resolution: str
    frames: int
    batch: int
    lr_max: float
    seconds: float
    shapes: tuple[str, ...] = ()
    ended_by: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What the run trained on and what it could not use, file by file.

    Attributes:
        clips: To train on; None where they come from an iterable.
        unreadable: Found before training.
        too_short: For some phase.
        replaced: Found in training, and replaced by other clips from then on.
    """

    clips: int | None
    held_out_clips: int
    unreadable: tuple[tuple[str, str], ...] = ()
    too_short: tuple[tuple[str, str], ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A file that the page shows, relative to the run folder; sounds and videos are linked."""

    path: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Everything the report says.

    Attributes:
        metrics: Held-out measures as `<measure>_before` and `<measure>_after`, e.g. psnr_db_before,
            ssim_after.
        measured_clips: Held-out clips that the last evaluation measured; 0 where nobody knows.
        judged_clips: Of how many of them each measure is the mean: those that it could judge.
        final_state_sha256: Over parameters and optimizer state; None if the run did not get to its end.
        time_seconds: Wall time per activity (`Stopwatch.breakdown`).
        environment: What `environment.describe_environment` returns: versions, hardware, commit, command.
        worker_restarts: How often workers of the loader that had died were started again.
        performance: What was chosen of what changes speed alone, and why, one line each.
        replacements: Everything done in place of what was asked, in words, one entry each.
        retrained: Changes of the trained parameters between phases: phase, what was trained before and after,
            the relative difference of the model's answer, seconds.
        resumed_from: Checkpoints that this run continued from, oldest first.
        resharded: Those of them that other ranks or another ZeRO stage had saved, and what changed, in words.
        accepted_data: Those of them that it went on from with other data, and what changed, in words.
        not_saved: Saves that the disk did not take, with `checkpoint.on_full_disk: go_on`: update and reason.
        not_written: Other files that the disk did not take, since the last start, in words.
        rollbacks: What went wrong and was left out, oldest first: phase, first and last position in its data,
            update at which it was found, the reason in words, the checkpoint that the run went back to, the
            learning rate, clips.
        rate_factors: Changes of a phase's `learning_rate_factor`: phase, update of the run and of the phase
            after which it counts, factor.
        error: What ended the run, if it failed.
    """

    name: str
    trainer: str
    model: str
    parameters: int
    status: RunStatus
    updates: int
    planned_updates: int
    skipped_updates: int
    phases: tuple[PhaseSummary, ...]
    metrics: Mapping[str, float]
    final_state_sha256: str | None
    world_size: int
    engine: str
    zero_stage: int
    precision: str
    time_seconds: Mapping[str, float]
    peak_rss_bytes: int
    environment: Mapping[str, Any]
    data: DataSummary
    measured_clips: int = 0
    judged_clips: Mapping[str, int] = field(default_factory=dict)
    worker_restarts: int = 0
    performance: tuple[str, ...] = ()
    replacements: tuple[str, ...] = ()
    retrained: tuple[Mapping[str, Any], ...] = ()
    resumed_from: tuple[str, ...] = ()
    resharded: tuple[str, ...] = ()
    accepted_data: tuple[str, ...] = ()
    not_saved: tuple[Mapping[str, Any], ...] = ()
    not_written: tuple[str, ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    rate_factors: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    plots: tuple[Picture, ...] = ()
    error: str | None = None

    @property
    def time_scope(self) -> str:
        """What follows a time in words: of a run that went on, `time_seconds` is that of its last start."""
        return " since the last start" if self.resumed_from else ""


def phase_history(summary: RunSummary) -> list[tuple[str, Mapping[str, float]]]:
    """Returns when and what was measured at the ends of phases, in words, for `measures.verdict_of`."""
    return [(f"after phase {phase.name}", phase.metrics) for phase in summary.phases if phase.metrics]
