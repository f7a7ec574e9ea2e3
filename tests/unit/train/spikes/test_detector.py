"""What is a spike and what is not: each rule, 10,000 healthy updates of many kinds, and what is injected."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from aiprod_ds.config.optim import SpikesConfig
from aiprod_ds.errors import CheckpointError
from aiprod_ds.train.spikes.detector import Made, SpikeWatch

Values = npt.NDArray[np.float64]
UPDATES = 10_000
# Of a small video VAE on one CPU: two phases of 1,250 updates, the second of fp16 not whole, with warm-up and
# batches of 2; fp16 began with a loss scale of 2^32. Five digits a value, and the updates skipped before it.
RECORDED = ("fp32", "fp16")
_CURVES = Path(__file__).parent / "recorded_curves.json.gz"


class Feed:
    """Hands updates to a watch as a loop does: ten at a time, skipped ones at once."""

    def __init__(self, config: SpikesConfig | None = None, watch: SpikeWatch | None = None) -> None:
        self.watch = watch or SpikeWatch(config=config or SpikesConfig())
        self.position = self.update = 0
        self._rows: list[tuple[int, dict[str, float]]] = []

    def phase(self, index: int) -> None:
        self.flush()
        self.watch.begin_phase(index)
        self.position = 0

    def applied(self, loss: float, norm: float, **terms: float) -> None:
        self.update += 1
        self.watch.note(Made(position=self.position, update=self.update, learning_rate=1e-3))
        self._rows.append((self.update, {"loss/total": loss, "gradient/norm": norm, **terms}))
        self.position += 1
        if self.update % 10 == 0:
            self.flush()

    def skipped(self, loss: float = math.nan, *, is_explained: bool = False) -> None:
        self.watch.note(
            Made(
                position=self.position,
                update=self.update,
                learning_rate=1e-3,
                is_applied=False,
                loss=loss,
                is_explained=is_explained,
            )
        )
        self.position += 1
        self.flush()

    def flush(self) -> None:
        rows, self._rows = self._rows, []
        self.watch.read(rows)

    def healthy(self, count: int = 150) -> Feed:
        chance = np.random.default_rng(0)
        for loss, norm in np.exp(chance.normal(0.0, [0.1, 0.3], (count, 2))):
            self.applied(float(loss), float(norm))
        return self


def _fed(losses: Iterable[float], norms: Iterable[float]) -> SpikeWatch:
    feed = Feed()
    feed.phase(0)
    for loss, norm in zip(losses, norms, strict=True):
        feed.applied(float(loss), float(norm))
    feed.flush()
    return feed.watch


def _noise(chance: np.random.Generator, sigma: float) -> Values:
    return np.exp(sigma * chance.standard_normal(UPDATES))


def _correlated(chance: np.random.Generator, sigma: float, keeps: float) -> Values:
    found, level = [], 0.0
    for step in chance.normal(0.0, sigma, UPDATES):
        level = keeps * level + float(step)
        found.append(math.exp(level))
    return np.asarray(found)


_TIME = np.arange(UPDATES)
HEALTHY: dict[str, Callable[[np.random.Generator], Values]] = {
    "constant": lambda _: np.ones(UPDATES),
    "quiet": lambda chance: _noise(chance, 0.01),
    "noisy": lambda chance: _noise(chance, 0.7),
    "exponential": lambda chance: chance.exponential(1.0, UPDATES) + 1e-9,
    "student_2": lambda chance: np.abs(chance.standard_t(2, UPDATES)) + 0.01,
    "pareto": lambda chance: chance.pareto(1.3, UPDATES) + 1.0,
    "rare_tenfold": lambda chance: _noise(chance, 0.2) * np.where(chance.random(UPDATES) < 0.002, 10.0, 1.0),
    "odd_clips": lambda chance: (
        _noise(chance, 0.2) * np.where(chance.random(UPDATES) < 0.01, 8.0 * _noise(chance, 0.3), 1.0)
    ),
    "two_buckets": lambda chance: _noise(chance, 0.15) * np.where(chance.random(UPDATES) < 0.1, 8.0, 1.0),
    "decaying": lambda chance: (0.02 + 1.0 / (1.0 + _TIME / 50.0)) * _noise(chance, 0.1),
    "warming_up": lambda chance: np.minimum(1.0, (_TIME + 1) / 1000.0) * _noise(chance, 0.2),
    "wandering": lambda chance: np.exp(np.cumsum(chance.normal(0.0, 0.02, UPDATES))),
    "correlated": lambda chance: _correlated(chance, 0.1, 0.95),
    "annealed": lambda chance: (1.0 + np.minimum(_TIME / 2000.0, 4.0)) * _noise(chance, 0.1),
    "restarts": lambda chance: (0.3 + 0.7 * np.abs(np.cos(_TIME / 700.0))) * _noise(chance, 0.1),
    "negative": lambda chance: chance.normal(-0.2, 0.5, UPDATES),
}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 10))]
)
@pytest.mark.parametrize("kind", HEALTHY)
def test_ten_thousand_healthy_updates_are_no_spike(kind: str, seed: int) -> None:
    losses = HEALTHY[kind](np.random.default_rng(seed))
    norms = HEALTHY[kind](np.random.default_rng(seed + 1000))
    assert _fed(losses, norms).found is None


def test_phases_of_another_level_and_new_terms_of_the_loss_are_no_spike() -> None:
    feed, chance = Feed(), np.random.default_rng(3)
    for phase, level in enumerate((1.0, 30.0, 0.2, 90.0)):
        feed.phase(phase)
        terms: dict[str, float] = {"loss/kl": 1.0, "loss/adversarial": 0.0}
        for number, noise in enumerate(np.exp(chance.normal(0.0, 0.1, 2500))):
            terms["loss/adversarial"] = 0.0 if number < 1000 else 0.5
            value = float(noise) * level * (1.0 if number < 1000 else 8.0)
            feed.applied(value, value, **terms)
    feed.flush()
    assert feed.update == UPDATES
    assert feed.watch.found is None


def test_a_loss_scale_that_looks_for_its_height_is_no_spike() -> None:
    feed = Feed()
    feed.phase(0)
    for _ in range(33):  # 2^16 down to 1, each after two
        feed.skipped(1.0, is_explained=True)
    for _ in range(99):
        feed.healthy(100)
        feed.skipped(1.0, is_explained=True)
        feed.skipped(1.0, is_explained=True)
    assert feed.update == 9900
    assert feed.watch.found is None


def _recorded() -> dict[str, dict[str, list[Any]]]:
    curves: dict[str, dict[str, list[Any]]] = json.loads(gzip.decompress(_CURVES.read_bytes()))
    return curves


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_are_no_spike(name: str) -> None:
    curve, feed = _recorded()[name], Feed()
    assert len(curve["loss"]) > 2000
    for phase, skipped, loss, norm in zip(
        curve["phase"], curve["skipped"], curve["loss"], curve["norm"], strict=True
    ):
        if phase != feed.watch._phase:
            feed.phase(phase)
        for _ in range(skipped):
            feed.skipped(loss, is_explained=True)
        feed.applied(loss, norm)
    feed.flush()
    assert feed.watch.found is None


@pytest.mark.parametrize("metric", ["loss/total", "gradient/norm"])
@pytest.mark.parametrize("name", RECORDED)
def test_a_hundred_times_is_found_in_recorded_runs(name: str, metric: str) -> None:
    curve, found = _recorded()[name], 0
    for bad in range(300, 1200, 100):
        feed = Feed()
        feed.phase(0)
        for number in range(bad + 1):
            values = [curve["loss"][number], curve["norm"][number]]
            if number == bad:
                values[metric == "gradient/norm"] *= 100.0
            feed.applied(*values)
        feed.flush()
        spike = feed.watch.found
        found += spike is not None and (spike.kind, spike.metric, spike.first) == ("extreme", metric, bad)
    assert found == 9


@pytest.mark.parametrize("in_a_row", [1, 3, 7])
def test_so_many_in_a_row_without_a_finite_gradient_are_a_spike(in_a_row: int) -> None:
    feed = Feed(SpikesConfig(skipped_in_a_row=in_a_row))
    feed.phase(0)
    feed.healthy(5)
    for _ in range(in_a_row - 1):
        feed.skipped()
    assert feed.watch.found is None
    feed.applied(1.0, 1.0)
    for _ in range(in_a_row):
        feed.skipped()
    spike = feed.watch.found
    assert spike is not None
    begins = 5 + in_a_row
    assert (spike.kind, spike.metric, spike.value) == ("non_finite", "loss/total", "nan")
    assert (spike.first, spike.last) == (begins, begins + in_a_row - 1)
    assert (spike.first_update, spike.update) == (6, 6)
    assert [value.position for value in spike.values] == list(range(begins, begins + in_a_row))


def test_a_gradient_alone_counts_where_no_loss_scale_explains_it() -> None:
    feed = Feed()
    feed.phase(0)
    for _ in range(3):
        feed.skipped(0.5)
    spike = feed.watch.found
    assert spike is not None
    assert (spike.metric, spike.value) == ("gradient/norm", "nan")


def test_a_hundredfold_gradient_is_found_at_its_update() -> None:
    feed = Feed()
    feed.phase(0)
    feed.healthy()
    feed.applied(1.0, 100.0)
    feed.healthy(30)
    spike = feed.watch.found
    assert spike is not None
    assert (spike.kind, spike.metric) == ("extreme", "gradient/norm")
    assert (spike.first, spike.last, spike.first_update, spike.update) == (150, 150, 150, 151)
    assert spike.deviations is not None
    assert spike.typical == pytest.approx(1.0, rel=0.1)
    assert spike.deviations > 8.0
    assert [(value.update, value.gradient_norm) for value in spike.values] == [(151, 100.0)]


def test_a_loss_that_stays_high_is_found_though_it_falls_back_now_and_then() -> None:
    feed = Feed()
    feed.phase(0)
    feed.healthy()
    for _ in range(19):
        feed.applied(3.0, 1.0)
    feed.applied(1.0, 1.0)
    for _ in range(3):
        feed.applied(3.0, 1.0)
    feed.flush()
    assert feed.watch.found is None
    feed.applied(3.0, 1.0)
    feed.flush()
    spike = feed.watch.found
    assert spike is not None
    assert (spike.kind, spike.metric) == ("sustained", "loss/total")
    assert (spike.first, spike.last) == (150, 173), "from the first of them"


def test_a_loss_that_comes_back_is_no_spike() -> None:
    feed = Feed()
    feed.phase(0)
    feed.healthy()
    for _ in range(100):
        for loss in (3.0, 3.0, 3.0, 1.0):
            feed.applied(loss, 1.0)
    feed.flush()
    assert feed.watch.found is None


def test_what_rose_before_it_became_nan_is_part_of_it() -> None:
    feed = Feed()
    feed.phase(0)
    feed.healthy()
    for loss in (4.0, 5.0, 6.0):
        feed.applied(loss, 1.0)
    for _ in range(3):
        feed.skipped()
    spike = feed.watch.found
    assert spike is not None
    assert (spike.kind, spike.first, spike.last, spike.first_update) == ("non_finite", 150, 155, 150)


def test_it_is_doubtful_while_a_value_stands_high() -> None:
    feed = Feed()
    feed.phase(0)
    feed.healthy()
    assert not feed.watch.is_doubtful
    feed.applied(4.0, 1.0)
    feed.flush()
    assert feed.watch.is_doubtful
    feed.applied(1.0, 1.0)
    feed.flush()
    assert not feed.watch.is_doubtful, "over"
    feed.skipped()
    assert feed.watch.is_doubtful


def _whole(values: Sequence[tuple[float, float] | None], *, stop: int | None) -> Any:
    feed = Feed()
    feed.phase(0)
    for number, pair in enumerate(values):
        if number == stop:
            feed.flush()
            again = SpikeWatch(config=SpikesConfig())
            again.restore(json.loads(json.dumps(feed.watch.to_dict())))
            again.begin_phase(0)
            feed.watch = again
        if pair is None:
            feed.skipped()
        else:
            feed.applied(*pair)
    feed.flush()
    return feed.watch


@pytest.mark.parametrize("end", ["nan", "rise", "extreme"])
def test_a_resumed_watch_finds_the_same_wherever_it_was_stopped(end: str) -> None:
    chance = np.random.default_rng(5)
    values: list[tuple[float, float] | None] = [
        (float(loss), float(norm)) for loss, norm in np.exp(chance.normal(0.0, [0.2, 0.5], (300, 2)))
    ]
    values[40] = values[41] = None
    values += {"nan": [(5.0, 1.0)] * 4 + [None] * 3, "rise": [(4.0, 2.0)] * 20, "extreme": [(1.0, 1000.0)]}[
        end
    ]
    values += [(1.0, 1.0)] * 3
    whole = _whole(values, stop=None).found
    assert whole is not None
    for stop in (1, 41, 42, 120, 299, *range(300, len(values))):
        found = _whole(values, stop=stop).found
        assert found is not None
        known = {**found.to_dict(), "values": ()}
        assert known == {**whole.to_dict(), "values": ()}, f"stopped before {stop}"


def test_another_rank_judges_nothing() -> None:
    feed = Feed(watch=SpikeWatch(config=SpikesConfig(), is_on=False))
    feed.phase(0)
    for _ in range(5):
        feed.skipped()
    assert feed.watch.found is None
    assert not feed.watch.is_doubtful


@pytest.mark.parametrize(
    ("key", "value"), [("phase", "x"), ("series", {}), ("began", [1]), ("found", {"kind": 3})]
)
def test_a_damaged_state_is_refused(key: str, value: object) -> None:
    state = {**SpikeWatch(config=SpikesConfig()).to_dict(), key: value}
    with pytest.raises(CheckpointError, match="spikes: must be what a run saves"):
        SpikeWatch(config=SpikesConfig()).restore(state)
