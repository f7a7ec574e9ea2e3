"""Where training goes wrong: from the values of one update after the other to the first spike.

Owns the rules over them and their state, which stands in every checkpoint: a resumed run finds the same spike
at the same update. The loop notes every update when it is made and hands in what the recorder reads late, so
nobody waits for a value. Only the main rank judges; the others learn of a spike with the next vote.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from aiprod_ds.config.optim import SpikesConfig
from aiprod_ds.errors import CheckpointError
from aiprod_ds.train.spikes.baseline import Series

LOSS, NORM = "loss/total", "gradient/norm"
# A gradient norm moves more than a loss does in a healthy run.
_FLOORS = {LOSS: 0.15, NORM: 0.35}
_KEPT_VALUES = 64

Kind = Literal["non_finite", "extreme", "sustained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An update as the loop made it; its values come later.

    Attributes:
        position: In the data of the phase.
        update: Applied updates of the run after it.
        learning_rate: It was made with.
        is_applied: Whether its gradient was finite.
        loss: Reduced over ranks; of a skipped update alone, the others' is read late.
        is_explained: Of a skipped update, whether its loss scale was too high for a loss that is finite.
    """

    position: int
    update: int
    learning_rate: float
    is_applied: bool = True
    loss: float = math.nan
    is_explained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What one update gave, for people; a float that is not finite stands as text."""

    update: int
    position: int
    loss: float | str
    gradient_norm: float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A stretch of updates that went wrong.

    Attributes:
        kind: By which rule.
        metric: What stood too high, or was not finite.
        phase: Index of the phase.
        first: Position in the data of the phase where it begins.
        last: Where it was found, included.
        first_update: Applied updates before it.
        update: Applied updates when it was found.
        learning_rate: When it was found.
        value: That was found, a float that is not finite as text.
        typical: Median of the baseline; None without one.
        deviations: By which the value stands above it; None without one.
        values: Of its updates, the last ones of many.
    """

    kind: Kind
    metric: str
    phase: int
    first: int
    last: int
    first_update: int
    update: int
    learning_rate: float
    value: float | str
    typical: float | None
    deviations: float | None
    values: tuple[Values, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return asdict(self)


_SPIKE = TypeAdapter(Spike)


@dataclass(slots=True, kw_only=True)
class SpikeWatch:
    """Looks for the first spike; from then on it waits for the run to go back.

    - `skipped_in_a_row` updates without a finite gradient, or with a loss that is not finite, in a row. Those
      with which a dynamic loss scale looks for its height are no sign of anything and do not count.
    - One loss or gradient norm that is extreme (`Baseline.is_extreme`).
    - `sustained_updates` losses, or gradient norms, that stand high (`Series.height`).

    The spike begins with the first update of all that stood high, or was not finite, when it was found, so
    that a loss which had risen before it became NaN is taken back with it. A phase, and a new term of its
    loss, begin with new baselines.

    Attributes:
        config: The rules.
        is_on: Whether this process judges at all.
        found: The first spike; None so far.
    """

    config: SpikesConfig
    is_on: bool = True
    found: Spike | None = None
    _phase: int = -1
    _terms: frozenset[str] = frozenset()
    _series: dict[str, Series] = field(init=False)
    _began: dict[str, tuple[int, int]] = field(default_factory=dict)
    _not_finite: int = 0
    _unread: deque[Made] = field(default_factory=deque)
    _recent: deque[Values] = field(default_factory=lambda: deque(maxlen=_KEPT_VALUES))

    def __post_init__(self) -> None:
        """Begins without any values."""
        self._series = {name: Series(floor=floor, config=self.config) for name, floor in _FLOORS.items()}

    @property
    def is_doubtful(self) -> bool:
        """Whether a spike was found, or may be beginning: a checkpoint of now may have to be given up."""
        return self.found is not None or bool(self._began)

    def begin_phase(self, phase: int) -> None:
        """Is told of the phase before its first update, and again where a run resumes in it."""
        if phase != self._phase:
            self._phase, self._terms = phase, frozenset()
            self._forget()

    def forget(self) -> None:
        """Begins with new baselines, because what comes cannot be compared with what was."""
        if self.found is None:
            self._forget()

    def note(self, made: Made) -> None:
        """Takes an update that was made, before its values are read."""
        if self.is_on and self.found is None:
            self._unread.append(made)

    def read(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Takes the values of the updates noted since the last call, of all of them.

        Args:
            rows: Applied updates with their metrics, reduced over ranks.
        """
        values = dict(rows)
        while self._unread and self.found is None:
            made = self._unread.popleft()
            if made.is_applied:
                self._judge(made, values[made.update])
            else:
                self._judge_skipped(made)
        self._unread.clear()

    def _judge(self, made: Made, metrics: Mapping[str, float]) -> None:
        own = {name: metrics[name] for name in _FLOORS}
        terms = frozenset(name for name, value in metrics.items() if name.startswith("loss/") and value != 0)
        if not terms <= self._terms:
            if self._terms:
                self._forget()
            self._terms |= terms
        self._keep(made, own[LOSS], own[NORM])
        if not all(map(math.isfinite, own.values())):
            metric = next(name for name, value in own.items() if not math.isfinite(value))
            self._count_not_finite(made, metric, own[metric])
            return
        self._not_finite = 0
        self._began.pop("not_finite", None)
        for name, value in own.items():
            self._judge_value(made, name, value)

    def _judge_value(self, made: Made, name: str, value: float) -> None:
        series = self._series[name]
        baseline = series.baseline
        deviation = series.observe(value)
        if not series.height:
            self._began.pop(name, None)
            return
        self._began.setdefault(name, (made.position, made.update - 1))
        assert baseline is not None, "only then a value can stand high"
        is_extreme = baseline.is_extreme(value, self.config)
        if self.found is None and (is_extreme or series.height >= self.config.sustained_updates):
            self.found = self._spike(
                made,
                kind="extreme" if is_extreme else "sustained",
                metric=name,
                value=value,
                typical=baseline.typical,
                deviations=deviation,
            )

    def _judge_skipped(self, made: Made) -> None:
        self._keep(made, made.loss, math.nan)
        if not made.is_explained:
            metric = NORM if math.isfinite(made.loss) else LOSS
            self._count_not_finite(made, metric, made.loss if metric == LOSS else math.nan)

    def _count_not_finite(self, made: Made, metric: str, value: float) -> None:
        self._not_finite += 1
        self._began.setdefault("not_finite", (made.position, made.update - made.is_applied))
        if self._not_finite >= self.config.skipped_in_a_row:
            self.found = self._spike(made, kind="non_finite", metric=metric, value=value)

    def _spike(
        self,
        made: Made,
        *,
        kind: Kind,
        metric: str,
        value: float,
        typical: float | None = None,
        deviations: float | None = None,
    ) -> Spike:
        first, first_update = min(self._began.values())
        return Spike(
            kind=kind,
            metric=metric,
            phase=self._phase,
            first=first,
            last=made.position,
            first_update=first_update,
            update=made.update,
            learning_rate=made.learning_rate,
            value=_told(value),
            typical=typical,
            deviations=deviations,
            values=tuple(values for values in self._recent if values.position >= first),
        )

    def _keep(self, made: Made, loss: float, norm: float) -> None:
        values = Values(
            update=made.update, position=made.position, loss=_told(loss), gradient_norm=_told(norm)
        )
        self._recent.append(values)

    def _forget(self) -> None:
        for series in self._series.values():
            series.forget()
        self._began, self._not_finite = {}, 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a JSON-ready mapping; of all that was noted the values must have been read."""
        assert not self._unread, "what was noted is read before a checkpoint"
        return {
            "phase": self._phase,
            "terms": sorted(self._terms),
            "series": {name: series.to_dict() for name, series in self._series.items()},
            "began": {name: list(moment) for name, moment in self._began.items()},
            "not_finite": self._not_finite,
            "found": None if self.found is None else self.found.to_dict(),
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes over what `to_dict` returned; nothing of an older checkpoint, which has none.

        Raises:
            CheckpointError: If it is damaged.
        """
        if not values or not self.is_on:
            return
        try:
            self._phase, self._not_finite = int(values["phase"]), int(values["not_finite"])
            self._terms = frozenset(map(str, values["terms"]))
            self._began = {str(name): (int(at), int(made)) for name, (at, made) in values["began"].items()}
            for name, series in self._series.items():
                series.restore(values["series"][name])
            found = values["found"]
            self.found = None if found is None else _SPIKE.validate_python(found)
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise CheckpointError(
                f"spikes: must be what a run saves, got {str(error)[:200]}. The checkpoint is damaged."
            ) from error


def _told(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
