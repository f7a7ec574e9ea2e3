"""Held-out measures as people read them, and whether a run got better or worse by them.

Owns the judgement; label, unit, digits and which way is good stand in `aiprod_ds.metrics.metric_names`.
`report.md`, `report.html` and the console say the same sentence, because all of them ask here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from aiprod_ds.metrics.metric_names import Better, find_measure, measure_order

_BEFORE, _AFTER = "_before", "_after"
_MAX_NAMED = 3


class Outcome(str, Enum):
    """What the measures together say of a run."""

    BETTER = "better"
    MIXED = "mixed"
    SAME = "same"
    WORSE = "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a headline says of a run's measures; `sentence` ends with a full stop."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One measure before training and now.

    Attributes:
        is_better: None where nothing changed as far as it is printed, or where it is not known which way is
            good.
    """

    name: str
    before: float
    after: float
    is_better: bool | None


def label_of(name: str) -> str:
    """Returns the measure's short name."""
    return find_measure(name).label


def value_text(name: str, value: float) -> str:
    """Returns the value with its unit."""
    return f"{value:.{find_measure(name).digits}f} {_unit(name)}".rstrip()


def difference_text(name: str, before: float, after: float) -> str:
    """Returns the signed change with its unit."""
    return f"{after - before:+.{find_measure(name).digits}f} {_unit(name)}".rstrip()


def change_text(name: str, before: float, after: float) -> str:
    """Returns both values and the change: `11.31 → 23.71 dB (+12.40 dB)`."""
    digits = find_measure(name).digits
    values = f"{before:.{digits}f} → {after:.{digits}f} {_unit(name)}".rstrip()
    return f"{values} ({difference_text(name, before, after)})"


def pairs_of(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Returns measures as a summary has them, `<measure>_before` and `<measure>_after`."""
    return {f"{name}{_BEFORE}": value for name, value in before.items()} | {
        f"{name}{_AFTER}": value for name, value in after.items()
    }


def changes_of(metrics: Mapping[str, float]) -> tuple[Change, ...]:
    """Returns every measure of which `<measure>_before` and `<measure>_after` stand in `metrics`, the listed
    ones first."""
    names = [name.removesuffix(_AFTER) for name in metrics if name.endswith(_AFTER)]
    both = sorted((name for name in names if name + _BEFORE in metrics), key=measure_order)
    return tuple(_change(name, metrics[name + _BEFORE], metrics[name + _AFTER]) for name in both)


def measure_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Returns (measure, before, after, change) as text for every change in `metrics`."""
    return [
        (
            label_of(change.name),
            value_text(change.name, change.before),
            value_text(change.name, change.after),
            difference_text(change.name, change.before, change.after),
        )
        for change in changes_of(metrics)
    ]


def is_better(name: str, before: float, after: float) -> bool | None:
    """Returns whether `after` is the better value, None if both are printed the same or nothing is known of
    the measure.

    A value that is not a number is worse than any number.
    """
    if math.isnan(before) or math.isnan(after):
        return None if math.isnan(before) and math.isnan(after) else math.isnan(before)
    measure = find_measure(name)
    if measure.better is Better.UNKNOWN or f"{before:.{measure.digits}f}" == f"{after:.{measure.digits}f}":
        return None
    if measure.better is Better.NEAR_ONE:
        distances = abs(before - 1), abs(after - 1)
        return None if distances[0] == distances[1] else distances[1] < distances[0]
    return (after > before) is (measure.better is Better.HIGHER)


def verdict_of(
    metrics: Mapping[str, float], history: Sequence[tuple[str, Mapping[str, float]]] = ()
) -> Verdict | None:
    """Returns whether a run got better or worse, in one or two sentences; None without a measure.

    The first measure decides: if it got worse, the run did. Others that got worse are named. A run whose
    first measure is better than before training, but was better still in between, has that said too.

    Args:
        metrics: With `<measure>_before` and `<measure>_after`, as in `RunSummary.metrics`.
        history: When and what was measured in between, e.g. `("after phase low", {"psnr_db": 21.3})`.
    """
    changes = changes_of(metrics)
    if not changes:
        return None
    worse = [change for change in changes if change.is_better is False]
    better = [change for change in changes if change.is_better]
    first = changes[0]
    if first.is_better is False or (worse and not better):
        told = first if first.is_better is False else worse[0]
        others = [change for change in worse if change is not told]
        also = f"; worse too: {_names(others)}" if others else ""
        return Verdict(
            outcome=Outcome.WORSE, sentence=f"Worse than before training: {_told(told)}{also}.{_kept(better)}"
        )
    fallen = _fallen(first, history)
    if worse:
        sentence = f"Better in {_names(better)}; worse in {_names(worse)}."
        return Verdict(outcome=Outcome.MIXED, sentence=sentence + fallen)
    if fallen:
        return Verdict(outcome=Outcome.MIXED, sentence=f"Better than before training.{fallen}")
    if better:
        return Verdict(outcome=Outcome.BETTER, sentence="Better than before training.")
    return Verdict(outcome=Outcome.SAME, sentence="No better and no worse than before training.")


def _unit(name: str) -> str:
    unit = find_measure(name).unit
    return "" if unit == "1" else unit


def _change(name: str, before: float, after: float) -> Change:
    return Change(name=name, before=before, after=after, is_better=is_better(name, before, after))


def _told(change: Change) -> str:
    if math.isnan(change.after):
        return f"{label_of(change.name)} is no longer a number"
    return f"{label_of(change.name)} {change_text(change.name, change.before, change.after)}"


def _kept(better: Sequence[Change]) -> str:
    return f" Better in {_names(better)}." if better else ""


def _names(changes: Sequence[Change]) -> str:
    names = list(dict.fromkeys(label_of(change.name) for change in changes))
    shown, more = names[:_MAX_NAMED], len(names) - _MAX_NAMED
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _fallen(first: Change, history: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Returns a sentence on the best moment of the first measure, if the run has since lost some of it."""
    best_when, best = "", first.after
    for when, found in history:
        value = found.get(first.name, math.nan)
        if not math.isnan(value) and is_better(first.name, best, value):
            best_when, best = when, value
    if not best_when:
        return ""
    return f" Below its best: {label_of(first.name)} was {value_text(first.name, best)} {best_when}."
