"""All clips of a dataset read to their end before training, in processes of their own.

Owns the processes: one at which a decoder crashes is started again, and the clip that it had is named. What
reading a clip to its end means is the dataset's. Called through `aiprod_ds.trainers.clip_data`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol, runtime_checkable

import torch

from aiprod_ds import progress
from aiprod_ds.data.dataset import ClipRequest, ClipSource
from aiprod_ds.data.reading.replacing import UnreadClip
from aiprod_ds.decode.probe_pool import default_num_workers
from aiprod_ds.errors import DataError

_PARENT_LOOK_SECONDS = 5.0


@runtime_checkable
class WholeClips(Protocol):
    """A dataset whose clips are more than what requests ask for."""

    def read_whole(self, index: int) -> None:
        """Reads a clip to its end.

        Raises:
            DataError: If it cannot be.
        """


def unread_clips(
    dataset: ClipSource,
    indices: Sequence[int],
    *,
    name_of: Callable[[int], str],
    requests: Callable[[int], Sequence[ClipRequest]],
    title: str,
    num_workers: int | None = None,
) -> tuple[UnreadClip, ...]:
    """Returns the clips that cannot be read to their end, in the order of `indices`.

    Args:
        dataset: If it is a `WholeClips`, clips are read as that; else they are asked for.
        indices: The clips.
        name_of: How a clip is called, by its index.
        requests: What is asked for of a clip.
        title: What is done, for the progress line: `reading clip`.
        num_workers: Processes, at least 1; by default one for each core that this process may use.
    """

    def read(index: int) -> None:
        if isinstance(dataset, WholeClips):
            dataset.read_whole(index)
            return
        for request in requests(index):
            dataset[request]

    found: dict[int, str] = {}
    workers = min(default_num_workers() if num_workers is None else num_workers, len(indices))
    with progress.counting(title, len(indices)) as shown:
        for index, reason in _outcomes(read, indices, max(1, workers)):
            if reason is not None:
                found[index] = reason
            shown.advance(note=f"{len(found)} cannot be read" if found else "")
    return tuple(
        UnreadClip(sample_index=index, name=name_of(index), reason=found[index])
        for index in indices
        if index in found
    )


def _outcomes(
    read: Callable[[int], None], indices: Sequence[int], num_workers: int
) -> Iterator[tuple[int, str | None]]:
    """Yields every clip with why it cannot be read, None for those that can, as they come."""
    further = iter(indices)
    readers: list[_Reader] = []
    try:
        for _, index in zip(range(num_workers), further, strict=False):
            readers.append(_Reader(read))
            readers[-1].ask(index)
        while busy := {reader.connection: reader for reader in readers if reader.index is not None}:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection), "only connections are waited for"
                reader = busy[ready]
                yield reader.answer()
                following = next(further, None)
                if following is not None:
                    reader.ask(following)
    finally:
        for reader in readers:
            reader.end()


class _Reader:
    """One process, which reads a clip at a time."""

    def __init__(self, read: Callable[[int], None]) -> None:
        self._read = read
        self.index: int | None = None
        self.connection, self._process = self._start()

    def ask(self, index: int) -> None:
        self.index = index
        with suppress(OSError):  # it has died: told where its answer is asked for
            self.connection.send(index)

    def answer(self) -> tuple[int, str | None]:
        """Returns the clip that was asked for and why it cannot be read; waits for that."""
        assert self.index is not None, "a clip was asked for"
        index, self.index = self.index, None
        try:
            return index, self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.end()
            self.connection, self._process = self._start()
            return index, f"ended the process that read it ({how})"

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _start(self) -> tuple[Connection, BaseProcess]:
        # Forked: what a dataset holds need not be picklable. A pipe of its own for each, because a lock
        # that they shared would stay taken by one that dies.
        context = multiprocessing.get_context("fork")
        own, others = context.Pipe()
        process = context.Process(target=_serve, args=(others, self._read, os.getpid()), daemon=True)
        process.start()
        others.close()
        return own, process


def _serve(connection: Connection, read: Callable[[int], None], parent: int) -> None:
    gc.freeze()  # garbage of the parent may hold threads that a fork has not; see `workers.py`
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    while os.getppid() == parent:
        if not connection.poll(_PARENT_LOOK_SECONDS):
            continue
        try:
            index = connection.recv()
        except EOFError:
            return
        reason: str | None = None
        try:
            read(index)
        except DataError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  whatever a decoder or a user's dataset raises
            reason = f"{type(error).__name__}: {error}"
        connection.send(reason)
