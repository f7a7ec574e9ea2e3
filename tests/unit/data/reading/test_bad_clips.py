"""A clip that cannot be read is replaced by the same other one for any number of workers and after a resume;
workers that are killed are started again where they were."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.loader import ClipLoader, MicroBatch
from aiprod_ds.data.reading import replacing, workers
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler
from aiprod_ds.errors import DataError, StorageError

# torch 2.14.1 (utils/data/dataloader.py:1324) opens temporary files to see whether there is room for more;
# the signal of a worker's death may interrupt it there, before it has closed them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CLIPS, UPDATES = 12, 9
BUCKET = BucketPlan(
    frames=1,
    requested_frames=1,
    height=2,
    width=2,
    frame_rate_hz=None,
    global_batch_size=4,
    micro_batch_size=2,
    accumulation=2,
)
BAD = frozenset({3, 8})


class Clips:
    """Filled with sample and epoch; those of `bad` cannot be read. Every try is a line in `log`."""

    def __init__(self, bad: frozenset[int] = frozenset(), log: Path | None = None) -> None:
        self._bad = bad
        self._log = log

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(f"{request.sample_index}\n")
        if request.sample_index in self._bad:
            raise DataError(f"{request.sample_index}.mp4: damaged")
        return {"video": torch.full((3, 1, 2, 2), 100.0 * request.epoch + request.sample_index)}


class Flaky:
    """One clip fails as often as `failures` says, in whatever process, and is read after that."""

    def __init__(self, sample: int, failures: int, log: Path) -> None:
        self._sample, self._failures, self._log = sample, failures, log

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        if request.sample_index == self._sample:
            with self._log.open("a") as log:
                log.write(".\n")
            if len(self._log.read_text().split()) <= self._failures:
                raise ConnectionResetError("by the far end")
        return Clips()[request]


class Deadly:
    """Reading one clip kills the process, as often as `deaths` says."""

    def __init__(self, sample: int, deaths: int, log: Path) -> None:
        self._sample, self._deaths, self._log = sample, deaths, log

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        if request.sample_index == self._sample:
            with self._log.open("a") as log:
                log.write(".\n")
            if len(self._log.read_text().split()) <= self._deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        return Clips()[request]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "WAITS_SECONDS", (0.001, 0.002))


def _sampler(clips: int = CLIPS) -> PhaseSampler:
    samples = BucketSamples(indices=tuple(range(clips)), global_batch_size=4)
    return PhaseSampler(seed=3, phase=0, buckets=[samples])


def _loader(dataset: Any, *, start: int = 0, num_workers: int = 0, clips: int = CLIPS) -> ClipLoader:
    return ClipLoader(
        dataset,
        _sampler(clips),
        [BUCKET],
        rank=0,
        world_size=1,
        start_position=start,
        num_workers=num_workers,
        augment=True,
        flip=False,
        name_of="clip_{}.mp4".format,
    )


def _taken(loader: ClipLoader, count: int = 2 * UPDATES) -> list[MicroBatch]:
    with closing(loader):
        return list(islice(loader, count))


def _values(batches: Sequence[MicroBatch]) -> list[list[float]]:
    return [batch.tensors["video"][:, 0, 0, 0, 0].tolist() for batch in batches]


@pytest.fixture(scope="module")
def healthy() -> list[MicroBatch]:
    return _taken(_loader(Clips()))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_only_requests_of_bad_clips_are_answered_by_others(
    num_workers: int, healthy: list[MicroBatch]
) -> None:
    batches = _taken(_loader(Clips(BAD), num_workers=num_workers))

    wanted = [sample for batch in healthy for sample in batch.samples]
    got = [sample for batch in batches for sample in batch.samples]
    assert [(sample.epoch, sample.ordinal) for sample in got] == [
        (sample.epoch, sample.ordinal) for sample in wanted
    ]
    for asked, answer in zip(wanted, got, strict=True):
        assert (answer.sample_index == asked.sample_index) is (asked.sample_index not in BAD)
        assert answer.sample_index not in BAD
    assert _values(batches) == [
        [100.0 * sample.epoch + sample.sample_index for sample in batch.samples] for batch in batches
    ]
    found = {clip.name: clip.reason for batch in batches for clip in batch.unread}
    assert found == {"clip_3.mp4": "3.mp4: damaged", "clip_8.mp4": "8.mp4: damaged"}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("listed", [frozenset(), {3}, BAD])
def test_a_resumed_run_replaces_by_the_same_clips_whatever_it_knows(
    num_workers: int, listed: frozenset[int]
) -> None:
    whole = _taken(_loader(Clips(BAD)))
    resumed = _loader(Clips(BAD), start=4, num_workers=num_workers)
    resumed.leave_out(listed)
    batches = _taken(resumed, 2 * (UPDATES - 4))

    assert batches[0].position == 4
    assert _values(batches) == _values(whole[8:])
    assert {clip.sample_index for batch in batches for clip in batch.unread} == BAD - listed


def test_replacements_are_spread_over_the_bucket_and_the_seed() -> None:
    sampler = _sampler(64)
    firsts = [next(sampler.substitutes(position, 0, 0)) for position in range(200)]
    assert len(set(firsts)) > 50
    assert max(Counter(firsts).values()) < 15
    assert firsts == [next(_sampler(64).substitutes(position, 0, 0)) for position in range(200)]
    assert sorted(sampler.substitutes(5, 0, 1)) == list(range(64))


def test_a_clip_that_was_left_out_is_never_read(tmp_path: Path) -> None:
    loader = _loader(Clips(BAD, tmp_path / "log"))
    loader.leave_out(BAD)
    batches = _taken(loader)
    assert not [clip for batch in batches for clip in batch.unread]
    assert not {int(line) for line in (tmp_path / "log").read_text().split()} & BAD


def test_a_clip_that_failed_for_good_is_tried_three_times_in_all(tmp_path: Path) -> None:
    _taken(_loader(Clips(BAD, tmp_path / "log"), num_workers=0))
    tries = Counter((tmp_path / "log").read_text().split())
    assert {sample: tries[str(sample)] for sample in BAD} == {3: 3, 8: 3}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_hiccup_leaves_no_trace(num_workers: int, tmp_path: Path, healthy: list[MicroBatch]) -> None:
    batches = _taken(_loader(Flaky(3, 2, tmp_path / "log"), num_workers=num_workers))
    assert _values(batches) == _values(healthy)
    assert not [clip for batch in batches for clip in batch.unread]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_longer_than_the_tries_counts_from_the_first_batch_that_met_it(
    num_workers: int, tmp_path: Path
) -> None:
    """The clip can be read again soon, but this rank replaces it as if it could not."""
    batches = _taken(_loader(Flaky(3, 3, tmp_path / "log"), num_workers=num_workers))
    assert _values(batches) == _values(_taken(_loader(Clips(frozenset({3})))))
    [found] = {clip.reason for batch in batches for clip in batch.unread}
    assert found == "ConnectionResetError: by the far end"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_read_ahead_are_read_again_without_clips_that_are_left_out_meanwhile(
    num_workers: int,
) -> None:
    """Another rank found the clip unreadable; this one could read it, and has done so ahead."""
    loader = _loader(Clips(), num_workers=num_workers)
    with closing(loader):
        first = list(islice(loader, 2))
        time.sleep(0.3 if num_workers else 0.0)  # for the workers to read ahead all that they may
        ahead = _taken(_loader(Clips()), 6)[2:]
        victims = {batch.samples[0].sample_index for batch in ahead}
        assert victims
        loader.leave_out(victims)
        batches = list(islice(loader, 8))
    again = _loader(Clips(), start=1)
    again.leave_out(victims)
    assert _values(batches) == _values(_taken(again, 8))
    assert _values(first) == _values(_taken(_loader(Clips()), 2))
    assert not {sample.sample_index for batch in batches for sample in batch.samples} & victims


def test_a_bucket_without_any_other_clip_is_one_clear_error() -> None:
    with pytest.raises(
        DataError, match=r"^data loader: clip_0.mp4 or another clip of its bucket must be rea"
    ):
        next(_loader(Clips(frozenset({0})), clips=1))


def test_where_every_clip_is_left_out_there_is_an_error() -> None:
    loader = _loader(Clips())
    loader.leave_out(range(CLIPS))
    with pytest.raises(DataError, match=r"got 0 that could not be read, all are listed as unreadable"):
        next(loader)


@pytest.mark.parametrize("deaths", [1, 3])
def test_dead_workers_are_started_again_where_they_were(
    deaths: int, tmp_path: Path, healthy: list[MicroBatch], caplog: pytest.LogCaptureFixture
) -> None:
    batches = _taken(_loader(Deadly(3, deaths, tmp_path / "log"), num_workers=1))

    assert _values(batches) == _values(healthy)
    assert [batch.position for batch in batches] == [batch.position for batch in healthy]
    assert sum(batch.restarts for batch in batches) == deaths
    assert caplog.text.count("loader_restarted") == deaths
    assert not multiprocessing.active_children()


def test_a_circle_that_holds_the_iterator_keeps_no_worker() -> None:
    """As an error leaves one that is raised inside torch when a worker dies."""
    loader = _loader(Clips(), num_workers=1)
    next(loader)
    assert multiprocessing.active_children()
    circle: list[Any] = [loader._batches]
    circle.append(circle)
    del circle
    loader.close()
    assert not multiprocessing.active_children()


def test_more_deaths_in_a_row_end_the_run(tmp_path: Path) -> None:
    deaths = workers.RESTARTS_IN_A_ROW + 1
    with pytest.raises(DataError, match=r"worker processes must stay alive, got .* again and again"):
        _taken(_loader(Deadly(3, deaths, tmp_path / "log"), num_workers=1))


def test_too_many_deaths_of_one_loader_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RESTARTS_IN_ALL", 2)
    restarts = workers.Restarts()
    assert restarts.may_begin()
    restarts.in_a_row = 0
    assert restarts.may_begin()
    restarts.in_a_row = 0
    assert not restarts.may_begin()


def test_a_death_between_two_batches_interrupts_nothing(healthy: list[MicroBatch]) -> None:
    """torch would raise it in the main thread at once, in the middle of an update."""
    loader = _loader(Clips(), num_workers=2)
    with closing(loader):
        batches = list(islice(loader, 3))
        victim = multiprocessing.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while victim.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        batches += islice(loader, 2 * UPDATES - 3)
    assert _values(batches) == _values(healthy)
    assert sum(batch.restarts for batch in batches) == 1


def test_signals_of_children_get_their_meaning_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _frame: heard.append(number))
    try:
        loader = _loader(Clips(), num_workers=1)
        next(loader)
        _end_a_child()
        assert not heard
        loader.close()
        heard.clear()
        _end_a_child()
        assert heard
    finally:
        signal.signal(signal.SIGCHLD, before)


def _end_a_child() -> None:
    child = multiprocessing.get_context("fork").Process(target=_nothing)
    child.start()
    child.join()


def _nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("found", "expected"), [([], None), ([OSError], {"video": 1}), ([OSError] * 3, "OS")]
)
def test_patience(found: list[type[Exception]], expected: Any) -> None:
    errors: Iterator[type[Exception]] = iter(found)
    source = _Source(lambda: next(errors, None))
    request = ClipRequest(sample_index=0, epoch=0, frames=1, height=2, width=2)
    answer = replacing.read_patiently(source, request)
    if expected == "OS":
        assert answer == "OSError: gone"
    else:
        assert answer == {"video": 1}


class _Source:
    def __init__(self, error: Callable[[], type[Exception] | None]) -> None:
        self._error = error

    def __getitem__(self, request: ClipRequest) -> Any:
        error = self._error()
        if error is not None:
            raise error("gone")
        return {"video": 1}


class Unreachable:
    """No clip can be had at all; every try is counted."""

    def __init__(self) -> None:
        self.tries = 0

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        self.tries += 1
        raise StorageError("s3://bucket/clips: must be delivered by its storage")


def test_a_storage_that_is_gone_ends_the_run_and_blames_no_clip() -> None:
    clips = Unreachable()
    sampler = PhaseSampler(
        seed=0, phase=0, buckets=[BucketSamples(indices=tuple(range(CLIPS)), global_batch_size=4)]
    )
    loader = ClipLoader(
        clips,
        sampler,
        (BUCKET,),
        rank=0,
        world_size=1,
        start_position=0,
        num_workers=0,
        augment=True,
        flip=False,
    )
    with closing(loader), pytest.raises(DataError, match="must be delivered by its storage"):
        next(loader)
    assert clips.tries == 1
