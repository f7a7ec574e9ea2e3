"""report.md: the page that a person reads after a run. Pure text from a `RunSummary`; no files are touched
here.

Order: what came out, what it looks like, how it went, what to know (replacements, data problems), how to do
it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiprod_ds.metrics.metric_names import is_listed, measure_order
from aiprod_ds.report.measures import (
    Outcome,
    change_text,
    changes_of,
    label_of,
    measure_rows,
    value_text,
    verdict_of,
)
from aiprod_ds.report.summary import DataSummary, PhaseSummary, Picture, RunStatus, RunSummary, phase_history
from aiprod_ds.report.words import bytes_text, count_text, duration, plural

_PICTURE_SUFFIXES = (".png", ".jpg", ".gif")
_MAX_FILES_LISTED = 50


def render_report(summary: RunSummary) -> str:
    """Returns the Markdown of report.md; links are relative to the run folder."""
    sections = [
        _headline(summary),
        _measures_table(summary.metrics),
        _pictures("What it looks like", summary.pictures),
        _phases(summary),
        _retrained(summary.retrained),
        _pictures("Curves", summary.plots),
        _time(summary.time_seconds, summary.performance),
        _replacements(summary.replacements),
        _data(summary.data, summary.worker_restarts),
        _reproduce(summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(summary: RunSummary) -> str:
    lines = [f"# {summary.name}"]
    sentence = _STATUS_SENTENCE[summary.status].format(
        updates=summary.updates, planned=summary.planned_updates
    )
    first = next(iter(changes_of(summary.metrics)), None)
    if first is not None:
        change = change_text(first.name, first.before, first.after)
        lines.append(f"**{label_of(first.name)} on {_clips_of(summary, first.name)}: {change}**")
    verdict = verdict_of(summary.metrics, phase_history(summary))
    if verdict is not None and verdict.outcome is not Outcome.BETTER:
        lines.append(f"**{verdict.sentence}**")
    lines.append(
        f"{sentence} `{summary.model}` ({count_text(summary.parameters)} parameters) through "
        f"{len(summary.phases)} "
        f"{plural('phase', len(summary.phases))} in {duration(sum(summary.time_seconds.values()))}"
        f"{summary.time_scope}, on "
        f"{summary.world_size} "
        f"{plural('rank', summary.world_size)} with {summary.engine}, ZeRO stage {summary.zero_stage}, "
        f"{summary.precision}."
    )
    if summary.error is not None:
        lines.append(f"> **Error:** {summary.error}")
    return "\n\n".join(lines)


def _clips_of(summary: RunSummary, measure: str) -> str:
    """Returns on how many clips a measure stands, `4 of 5 held-out clips` where it could not judge all."""
    measured = summary.measured_clips or summary.data.held_out_clips
    judged = summary.judged_clips.get(measure, measured)
    share = "" if judged == measured else f"{judged} of "
    return f"{share}{measured} held-out {plural('clip', measured)}"


_GOES_ON = "after {updates:,} of {planned:,} updates; `--resume auto` goes on from the newest checkpoint."
_STATUS_SENTENCE = {
    RunStatus.COMPLETED: "Completed: all {updates:,} updates.",
    RunStatus.INTERRUPTED: "Interrupted " + _GOES_ON,
    RunStatus.FAILED: "Failed " + _GOES_ON,
}


def _measures_table(metrics: Mapping[str, float]) -> str:
    rows = measure_rows(metrics)
    return _table(("held-out clips", "before", "after", "change"), rows) if rows else ""


def _phases(summary: RunSummary) -> str:
    measured = {name for phase in summary.phases for name in phase.metrics}
    extra = sorted(
        set(filter(is_listed, measured)) or measured, key=measure_order
    )  # the table above has all of them
    unit = "frames" if any(phase.resolution for phase in summary.phases) else "samples"
    header = (
        "phase",
        "updates",
        "ended by",
        "resolution",
        unit,
        "batch",
        "highest lr",
        "time",
        *map(label_of, extra),
    )
    rows = [
        (
            phase.name,
            f"{phase.updates:,}",
            phase.ended_by or "-",
            *_shape_cells(phase),
            f"{phase.lr_max:.2e}",
            duration(phase.seconds),
            *(value_text(name, phase.metrics[name]) if name in phase.metrics else "-" for name in extra),
        )
        for phase in summary.phases
    ]
    skipped = (
        f"\n\n{summary.skipped_updates:,} updates were skipped: for a gradient that was not finite, or left "
        "out with a spike."
        if summary.skipped_updates
        else ""
    )
    return (
        "## Phases\n\n"
        + _table(header, rows)
        + skipped
        + _rollbacks(summary.rollbacks)
        + _rate_factors(summary.rate_factors)
        + _not_saved(summary.not_saved)
        + _not_written(summary.not_written)
    )


def _rollbacks(rollbacks: Sequence[Mapping[str, Any]]) -> str:
    if not rollbacks:
        return ""
    rows = [
        (
            entry["phase"],
            f"{entry['first_position']:,} to {entry['last_position']:,}",
            _cell(entry["reason"]),
            f"`{entry['checkpoint']}`" if entry["checkpoint"] else "the beginning",
        )
        for entry in rollbacks
    ]
    header = ("phase", "left out of its data", "what went wrong", "went back to")
    return "\n\n### Rollbacks\n\n" + _table(header, rows) + "\n\nValues and clips: `rollbacks.json`."


def _rate_factors(changes: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"\n\nThe learning rate of phase {change['phase']} was multiplied by {change['factor']:g} from "
        f"update {change['update']:,} on."
        for change in changes
    )


def _not_written(files: Sequence[str]) -> str:
    return "".join(f"\n\nThe disk did not take everything of {words}." for words in files)


def _not_saved(saves: Sequence[Mapping[str, Any]]) -> str:
    if not saves:
        return ""
    updates = ", ".join(f"{save['update']:,}" for save in saves)
    return f"\n\nNo room for a checkpoint at update {updates}; the last time: {saves[-1]['reason']}"


def _retrained(changes: Sequence[Mapping[str, Any]]) -> str:
    if not changes:
        return ""
    header = (
        "at the start of phase",
        "trained before",
        "trained after",
        "relative difference of the answer",
        "time",
    )
    rows = [
        (
            change["phase"],
            *change["trained"],
            f"{change['relative_difference']:.1e}",
            duration(change["seconds"]),
        )
        for change in changes
    ]
    return "## What was trained\n\n" + _table(header, rows)


def _shape_cells(phase: PhaseSummary) -> tuple[str, str, str]:
    if len(phase.shapes) > 1:
        return "<br>".join(phase.shapes), "", ""
    return phase.resolution or "-", f"{phase.frames:,}", f"{phase.batch:,}"


def _pictures(title: str, pictures: Sequence[Picture]) -> str:
    blocks = [
        f"![{picture.caption}]({picture.path})\n\n*{picture.caption}*"
        for picture in pictures
        if picture.path.endswith(_PICTURE_SUFFIXES)
    ]
    links = [
        f"- [{picture.caption}]({picture.path})"
        for picture in pictures
        if not picture.path.endswith(_PICTURE_SUFFIXES)
    ]
    if links:
        blocks.append("\n".join(links))
    return f"## {title}\n\n" + "\n\n".join(blocks) if blocks else ""


def _time(seconds: Mapping[str, float], performance: Sequence[str]) -> str:
    total = sum(seconds.values())
    if total <= 0:
        return ""
    rows = [
        (name.replace("_", " "), duration(value), f"{value / total:.1%}")
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value > 0
    ]
    table = _table(("activity", "time", "share"), [*rows, ("total", duration(total), "100.0%")])
    chosen = (
        "\n\nHow it computed:\n\n" + "\n".join(f"- {line}" for line in performance) if performance else ""
    )
    return f"## Where the time went\n\n{table}{chosen}"


def _replacements(replacements: Sequence[str]) -> str:
    lines = [f"- {entry}" for entry in replacements] or [
        "Nothing: every setting took effect as it was written."
    ]
    return "## What was replaced\n\n" + "\n".join(lines)


def _data(data: DataSummary, worker_restarts: int) -> str:
    clips = "Clips of an iterable" if data.clips is None else f"{data.clips:,} clips"
    lines = [f"{clips} for training, {data.held_out_clips:,} held out."]
    listed = (
        ("Unreadable", data.unreadable, "left out"),
        ("Too short", data.too_short, "left out"),
        ("Unreadable in training", data.replaced, "replaced by other clips"),
    )
    for title, files, what in listed:
        if files:
            lines.append(f"{title}: {len(files):,} {plural('file', len(files))}, {what}.")
            lines.append(
                _table(
                    ("file", "reason"),
                    [(f"`{path}`", _cell(reason)) for path, reason in files[:_MAX_FILES_LISTED]],
                )
            )
        if len(files) > _MAX_FILES_LISTED:
            lines.append(f"{len(files) - _MAX_FILES_LISTED:,} more are in `report.json`.")
    if not any(files for _, files, _ in listed):
        lines.append("Every file could be used.")
    if worker_restarts:
        times = f"{worker_restarts:,} {plural('time', worker_restarts)}"
        lines.append(f"Workers of the loader died and were started again: {times}.")
    return "## Data\n\n" + "\n\n".join(lines)


def _reproduce(summary: RunSummary) -> str:
    lines = ["## How to do it again"]
    command = summary.environment.get("command")
    if command:
        lines.append(f"```\n{command}\n```")
    facts = [("configuration", "`config.yaml` (resolved), `plan.json`"), ("metrics", "`metrics.jsonl`")]
    if summary.final_state_sha256:
        facts.append(("final state, sha256", f"`{summary.final_state_sha256}`"))
    facts += [("continued from", f"`{name}`") for name in summary.resumed_from]
    facts += [("resharded", change) for change in summary.resharded]
    facts += [("went on with other data", change) for change in summary.accepted_data]
    facts += list(_environment_facts(summary.environment))
    facts.append(("peak host memory", bytes_text(summary.peak_rss_bytes)))
    lines.append(_table(("what", "value"), facts))
    return "\n\n".join(lines)


def _environment_facts(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    git = environment.get("git")
    if git:
        yield "commit", f"`{git['commit']}`" + (" with local changes" if git["has_changes"] else "")
    hardware = environment.get("hardware", {})
    if hardware:
        yield "processor", f"{hardware['cpu']}, {hardware['cores']} cores"
        yield "accelerators", ", ".join(hardware["gpus"]) or "none"
    versions = environment.get("versions", {})
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
