"""A clip that cannot be read: tried again with growing waits, then replaced by another one of its bucket.

Owns patience and the walk to the clip that takes the place; which clips are candidates is the sampler's, and
which are known to be bad the loader's. Everything but the waits is a function of the request and of which
clips can be read, so that workers, ranks and resumed runs replace alike. Runs in the loader's workers, and in
the training process for held-out clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from aiprod_ds.data.dataset import ClipRequest, ClipSample, ClipSource
from aiprod_ds.errors import DataError, StorageError

WAITS_SECONDS = (0.5, 2.0)
"""Between the tries of one clip: a hiccup of a network is over by then, what is damaged stays it."""
# Further clips of one request are tried once: where all fail, the disk is gone, and an error must come soon.
_MAX_PATIENT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadClip:
    """A clip that could not be read, by its index in the dataset, and why."""

    sample_index: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadClip:
    """What answers a request.

    Attributes:
        sample_index: The clip that was read: the one asked for, or what takes its place.
        item: Its tensors.
        unread: Clips that were tried before it, or had failed in this process before, in that order.
    """

    sample_index: int
    item: ClipSample
    unread: tuple[UnreadClip, ...] = ()


def read_patiently(
    source: ClipSource, request: ClipRequest, *, waits: tuple[float, ...] | None = None
) -> ClipSample | str:
    """Returns a clip, or why it cannot be read after `len(waits) + 1` tries.

    Args:
        source: Any exception of it counts as a clip that cannot be read.
        request: The clip.
        waits: Seconds between the tries; `WAITS_SECONDS` by default.

    Raises:
        StorageError: If the fault is not the clip's: all data is out of reach.
    """
    pauses = iter(WAITS_SECONDS if waits is None else waits)
    while True:
        try:
            return source[request]
        except StorageError:
            raise  # no other clip could be read either, and it was waited for
        except DataError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  whatever a decoder, a disk or a user's dataset raises
            reason = f"{type(error).__name__}: {error}"
        pause = next(pauses, None)
        if pause is None:
            return reason
        time.sleep(pause)


class ReplacingReader:
    """Reads the clips of requests, or others in their place; remembers which it could not read.

    Args:
        source: Reads one clip.
        name_of: How a clip is called, by its index.
    """

    def __init__(self, source: ClipSource, name_of: Callable[[int], str]) -> None:
        self._source = source
        self._name_of = name_of
        self._failed: dict[int, str] = {}

    def read(
        self, request: ClipRequest, candidates: Callable[[], Iterator[int]], left_out: Collection[int]
    ) -> ReadClip:
        """Returns the requested clip, or the first of the candidates that can be read.

        Args:
            request: Index, epoch and shape; a candidate is read with the same epoch and shape.
            candidates: Indices of clips of the same bucket; called only if it must be.
            left_out: Indices that are not to be read.

        Raises:
            DataError: If no candidate can be read either.
            StorageError: If all data is out of reach.
        """
        wanted = request.sample_index
        unread: list[UnreadClip] = []
        seen: set[int] = {wanted}
        if wanted not in left_out:
            found = self._read(request, is_patient=True)
            if not isinstance(found, str):
                return ReadClip(sample_index=wanted, item=found)
            unread.append(UnreadClip(sample_index=wanted, name=self._name_of(wanted), reason=found))
        for index in candidates():
            if index in seen or index in left_out:
                continue
            seen.add(index)
            found = self._read(replace(request, sample_index=index), is_patient=len(unread) < _MAX_PATIENT)
            if not isinstance(found, str):
                return ReadClip(sample_index=index, item=found, unread=tuple(unread))
            unread.append(UnreadClip(sample_index=index, name=self._name_of(index), reason=found))
        raise DataError(self._nothing_read(wanted, unread))

    def _read(self, request: ClipRequest, *, is_patient: bool) -> ClipSample | str:
        known = self._failed.get(request.sample_index)
        if known is not None:
            return known
        found = read_patiently(self._source, request, waits=None if is_patient else ())
        if isinstance(found, str):
            self._failed[request.sample_index] = found
        return found

    def _nothing_read(self, wanted: int, unread: list[UnreadClip]) -> str:
        reasons = f", at last: {unread[-1].reason}" if unread else ", all are listed as unreadable"
        return (
            f"data loader: {self._name_of(wanted)} or another clip of its bucket must be readable, got "
            f"{len(unread)} that could not be read{reasons} Repair the disk, the network or the files."
        )
