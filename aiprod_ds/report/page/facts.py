"""Tables and lists of the page: measures, phases, changes of the configuration, warnings, environment, and
the commands to do it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.metric_names import is_listed
from aiprod_ds.report.curves import Span
from aiprod_ds.report.measures import (
    Change,
    Verdict,
    changes_of,
    difference_text,
    label_of,
    pairs_of,
    value_text,
    verdict_of,
)
from aiprod_ds.report.page.gallery import moment_words
from aiprod_ds.report.page.record import RunRecord
from aiprod_ds.report.page.status import phases_of
from aiprod_ds.report.words import bytes_text, count_text, duration, plural

_MAX_LISTED, _MAX_PHASES, _MAX_CARDS = 50, 100, 8
_NOTHING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One measure before training and now, as text; `state` is better, worse or same."""

    label: str
    before: str
    now: str
    difference: str
    state: str
    clips: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something to know of the run; `is_serious` if it changes what the results mean."""

    title: str
    text: str
    rows: tuple[tuple[str, str], ...] = ()
    is_serious: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows and columns; `note` says what was left out of it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def told(run: RunRecord) -> Mapping[str, Any]:
    """Returns what the run wrote of itself at its start and at its end, the end's words first."""
    return {**run.started, **(run.report or {})}


def before_and_now(run: RunRecord) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    """Returns the evaluation before training and the newest one after it; None for what there is not."""
    before = next((record for record in run.evaluations if record.update == 0), None)
    after = [record for record in run.evaluations if record.update > 0 and record.metrics]
    return before, after[-1] if after else None


def changes_and_verdict(run: RunRecord) -> tuple[tuple[Change, ...], Verdict | None]:
    """Returns the measures before training and now, and what they say."""
    before, now = before_and_now(run)
    if before is None or now is None:
        return (), None
    history = [
        (
            f"after phase {record.phase}" if record.reason == "phase_end" else f"at update {record.update:,}",
            record.metrics,
        )
        for record in run.evaluations
        if record.update > 0 and record is not now
    ]
    metrics = pairs_of(before.metrics, now.metrics)
    return changes_of(metrics), verdict_of(metrics, history)


def cards(run: RunRecord) -> tuple[Card, ...]:
    """Returns all measures that stand before training and now, or the newest values if only those are
    there."""
    changes, _ = changes_and_verdict(run)
    _, now = before_and_now(run)
    return tuple(
        Card(
            label=label_of(change.name),
            before=value_text(change.name, change.before),
            now=value_text(change.name, change.after),
            difference=difference_text(change.name, change.before, change.after)
            if math.isfinite(change.after - change.before)
            else "",
            state={True: "better", False: "worse", None: "same"}[change.is_better],
            clips="" if now is None else judged_words(now, change.name),
        )
        for change in changes
    )


def num_cards(run: RunRecord) -> int:
    """Returns how many cards stand in the open: those of the table's measures, at most eight."""
    changes, _ = changes_and_verdict(run)
    listed = sum(is_listed(change.name) for change in changes)
    return min(listed or len(changes), _MAX_CARDS)


def judged_words(record: EvaluationRecord, measure: str) -> str:
    """Returns on how many clips a measure stands: `4 of 5 clips`; empty if the record does not say."""
    if not record.clips:
        return ""
    total = len(record.clips)
    left_out = len({entry.clip for entry in record.not_judged if entry.measure == measure})
    if not left_out:
        return f"{total} {plural('clip', total)}"
    return f"{total - left_out} of {total} {plural('clip', total)}"


def evaluation_table(run: RunRecord) -> Table:
    """Returns all evaluations with all measures, the newest last; of very many the first and the last."""
    names = [change.name for change in changes_and_verdict(run)[0]]
    names += sorted({name for record in run.evaluations for name in record.metrics} - set(names))
    names = names[:12]
    rows = [
        (
            moment_words(record),
            *(
                value_text(name, record.metrics[name]) if name in record.metrics else _NOTHING
                for name in names
            ),
            duration(record.seconds) if record.seconds else _NOTHING,
        )
        for record in run.evaluations
    ]
    header = ("evaluation", *map(label_of, names), "took")
    return _cut(Table(header=header, rows=tuple(rows)), _MAX_PHASES)


def phase_table(run: RunRecord, spans: Sequence[Span]) -> Table:
    """Returns the phases as planned and as they ran."""
    ran = {span.index: span for span in spans}
    reported = {
        str(phase.get("name")): phase
        for phase in (run.report or {}).get("phases") or ()
        if isinstance(phase, dict)
    }
    rows = []
    for index, buckets in phases_of(run.plan).items():
        first, name = buckets[0], str(buckets[0].get("name", index))
        own = reported.get(name, {})
        done = own.get("updates")
        if not isinstance(done, int):
            span = ran.get(index)
            done = 0 if span is None else int(span.last - max(span.first - 1, 0))
        planned = first.get("updates") or first.get("max_updates")
        rows.append(
            (
                name,
                f"{done:,}" if done == planned or planned is None else f"{done:,} of {planned:,}",
                shape_text(first) + (f" and {len(buckets) - 1} more" if len(buckets) > 1 else ""),
                _number(first.get("frames")),
                _number(first.get("global_batch_size")),
                _rate(first.get("learning_rate_max")),
                str(own.get("ended_by") or ("" if done else "not begun") or _NOTHING),
                duration(own["seconds"]) if isinstance(own.get("seconds"), (int, float)) else _NOTHING,
            )
        )
    sound = all(row[2] == "" for row in rows)
    header = ("phase", "updates", "resolution", "samples" if sound else "frames", "batch", "highest lr")
    return _cut(Table(header=(*header, "ended by", "time"), rows=tuple(rows)), _MAX_PHASES)


def shape_text(row: Mapping[str, Any]) -> str:
    """Returns `64x96` of a row of plan.json; empty for sounds."""
    height, width = row.get("height"), row.get("width")
    is_picture = isinstance(height, int) and isinstance(width, int) and height * width > 1
    return f"{height}x{width}" if is_picture else ""


def configuration_changes(run: RunRecord) -> tuple[tuple[str, Table], ...]:
    """Returns what changed at which update, as a table of key, before and after."""
    found = []
    configs = [*run.earlier_configs, (0, run.config)]
    for place, (update, earlier) in enumerate(run.earlier_configs):
        rows = differences([earlier, configs[place + 1][1]])
        if rows:
            table = Table(header=("key", "before", "from then on"), rows=tuple(rows))
            found.append((f"Going on from update {update:,}", _cut(table, _MAX_LISTED)))
    return tuple(found)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns (key, value of each configuration as text) of all keys that are not alike in all of them."""
    flat = [dict(_flat(config)) for config in configs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, *(values.get(key, _NOTHING) for values in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def notes(run: RunRecord) -> tuple[Note, ...]:
    """Returns everything that one should know of the run beside its numbers."""
    return tuple(_notes(run))


def environment_facts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Returns what the run ran on, as (name, text)."""
    return tuple(_environment(run))


def starts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Returns (when, command) of the first start and of every resume."""
    found = []
    for update, environment in run.starts:
        command = environment.get("command")
        if isinstance(command, str) and command:
            found.append(("Started" if update == 0 else f"Gone on from update {update:,}", command))
    return tuple(found)


def is_none_judged(run: RunRecord) -> bool:
    """Whether evaluations measured clips and could say nothing of any of them."""
    return any(record.clips for record in run.evaluations) and not any(
        record.metrics for record in run.evaluations
    )


def time_title(run: RunRecord) -> str:
    """Returns what stands over `time_table`: the clock of a run that went on began anew."""
    update = max((update for update, _ in run.starts), default=0)
    return f"Where the time went since update {update:,}" if update else "Where the time went"


def time_table(run: RunRecord) -> Table:
    """Returns where the time went, as the run's end tells it of its last start."""
    times = (run.report or {}).get("time_seconds")
    seconds = {
        str(name): float(value)
        for name, value in (times if isinstance(times, dict) else {}).items()
        if isinstance(value, (int, float)) and value > 0
    }
    total = sum(seconds.values())
    rows = [
        (name.replace("_", " "), duration(value), f"{value / total:.1%}")
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return Table(header=("activity", "time", "share"), rows=tuple(rows))


def summary_words(run: RunRecord) -> str:
    """Returns what was trained and on what, in one sentence; empty if the folder does not say."""
    known = told(run)
    words = []
    section = run.config.get("model")
    model = known.get("model") or (section.get("source") if isinstance(section, dict) else None)
    if model:
        words.append(str(model))
    if isinstance(known.get("parameters"), int):
        words.append(f"{count_text(known['parameters'])} parameters")
    ranks = known.get("world_size")
    if isinstance(ranks, int):
        words.append(f"{ranks} {plural('rank', ranks)}")
    if known.get("engine"):
        words.append(f"{known['engine']}, ZeRO stage {known.get('zero_stage')}")
    if known.get("precision"):
        words.append(str(known["precision"]))
    return " · ".join(words)


def _notes(run: RunRecord) -> Iterator[Note]:
    known = told(run)
    now = next((record for record in reversed(run.evaluations) if record.metrics or record.not_judged), None)
    if now is not None and now.not_judged:
        rows = tuple(
            (f"{entry.clip} ({label_of(entry.measure)})", entry.reason)
            for entry in now.not_judged[:_MAX_LISTED]
        )
        number = len({entry.clip for entry in now.not_judged})
        text = f"{number} held-out {plural('clip', number)} cannot be judged by a measure and are not in it."
        yield Note(title="Not judged", text=text, rows=rows, is_serious=True)
    data = known.get("data")
    if isinstance(data, dict):
        yield from _of_data(data)
    replaced = [str(entry) for entry in known.get("replacements") or ()]
    if replaced:
        rows = tuple(_parted(entry) for entry in replaced[:_MAX_LISTED])
        yield Note(title="Replaced", text="Done in place of what was asked:", rows=rows)
    saves = [save for save in known.get("not_saved") or () if isinstance(save, dict)]
    if saves:
        rows = tuple((f"update {save.get('update')}", str(save.get("reason"))) for save in saves[-5:])
        text = f"No room for {len(saves)} {plural('checkpoint', len(saves))}."
        yield Note(title="Not saved", text=text, rows=rows, is_serious=True)
    unwritten = [str(entry) for entry in known.get("not_written") or ()]
    if unwritten:
        rows = tuple(_parted(entry) for entry in unwritten[:_MAX_LISTED])
        yield Note(title="Not written", text="The disk did not take:", rows=rows, is_serious=True)
    skipped = known.get("skipped_updates")
    if isinstance(skipped, int) and skipped > 0:
        text = (
            f"{skipped:,} updates were not applied, because a gradient was not finite or because they were "
            "left out with a spike."
        )
        yield Note(title="Skipped", text=text)
    yield from _of_spikes(known)
    restarts = known.get("worker_restarts")
    if isinstance(restarts, int) and restarts > 0:
        text = f"Workers of the loader died and were started again, {restarts:,} {plural('time', restarts)}."
        yield Note(title="Workers", text=text)
    if run.problems:
        rows = tuple(("", problem) for problem in run.problems)
        yield Note(title="This page", text="Not everything in the run folder could be read:", rows=rows)


def _of_spikes(known: Mapping[str, Any]) -> Iterator[Note]:
    rollbacks = [entry for entry in known.get("rollbacks") or () if isinstance(entry, dict)]
    if rollbacks:
        rows = tuple(
            (f"to {entry.get('checkpoint') or 'the beginning'}", str(entry.get("reason")))
            for entry in rollbacks[-_MAX_LISTED:]
        )
        text = "Training went wrong and was taken back; the data of these updates is left out:"
        yield Note(title="Rollbacks", text=text, rows=rows, is_serious=True)
    changes = [entry for entry in known.get("rate_factors") or () if isinstance(entry, dict)]
    if changes:
        rows = tuple(
            (f"{entry.get('phase')}, from update {entry.get('update')}", f"times {entry.get('factor')}")
            for entry in changes[-_MAX_LISTED:]
        )
        yield Note(title="Learning rate", text="Multiplied, by the configuration of a start:", rows=rows)


def _of_data(data: Mapping[str, Any]) -> Iterator[Note]:
    titles = {
        "unreadable": "Unreadable",
        "too_short": "Too short",
        "ignored": "Ignored",
        "replaced": "Unreadable in training",
    }
    for key, title in titles.items():
        files = [entry for entry in data.get(key) or () if isinstance(entry, dict)]
        if files:
            rows = tuple((str(entry.get("path")), str(entry.get("reason"))) for entry in files[:_MAX_LISTED])
            more = f" The first {_MAX_LISTED} are listed." if len(files) > _MAX_LISTED else ""
            what = "replaced by other clips" if key == "replaced" else "left out"
            text = f"{len(files):,} {plural('file', len(files))} {what}.{more}"
            yield Note(title=title, text=text, rows=rows, is_serious=key in ("unreadable", "replaced"))


def _parted(entry: str) -> tuple[str, str]:
    subject, _, words = entry.partition(": ")
    return (subject, words) if words else ("", entry)


_LINES = {
    "performance": "how it computed",
    "resharded": "resharded",
    "accepted_data": "went on with other data",
}


def _environment(run: RunRecord) -> Iterator[tuple[str, str]]:
    environment, known = run.environment, told(run)
    git = environment.get("git")
    if isinstance(git, dict):
        yield "commit", f"{git.get('commit')}" + (" with local changes" if git.get("has_changes") else "")
    hardware = environment.get("hardware")
    if isinstance(hardware, dict):
        yield "processor", f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
        gpus = hardware.get("gpus")
        yield "accelerators", _grouped(gpus if isinstance(gpus, list) else ())
        if isinstance(hardware.get("memory_bytes"), int):
            yield "memory", bytes_text(hardware["memory_bytes"])
    if isinstance(known.get("peak_rss_bytes"), int):
        yield "peak memory of rank 0", bytes_text(known["peak_rss_bytes"])
    if environment.get("platform"):
        yield "system", str(environment["platform"])
    versions = environment.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    for key, words in _LINES.items():
        for line in known.get(key) or ():
            yield words, str(line)
    if known.get("final_state_sha256"):
        yield "final state, sha256", str(known["final_state_sha256"])


def _grouped(names: Sequence[Any]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[str(name)] = counts.get(str(name), 0) + 1
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items()) or "none"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _flat(item, f"{key}[{place}]")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _cut(table: Table, most: int) -> Table:
    if len(table.rows) <= most:
        return table
    half = most // 2
    gap = ("…", *[""] * (len(table.header) - 1))
    rows = (*table.rows[:half], gap, *table.rows[-half:])
    return Table(
        header=table.header, rows=rows, note=f"{len(table.rows) - 2 * half:,} rows between are left out."
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _NOTHING


def _rate(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, (int, float)) else _NOTHING
