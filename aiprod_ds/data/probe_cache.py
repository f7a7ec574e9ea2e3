"""What files hold, remembered while their size and modification time stay as they were.

Owns the cache; looking into files is `decode/probe.py`'s, in many processes `decode/probe_pool.py`'s. Called
by `manifest.py` and by the survey of a folder. The memory that it takes does not depend on what probes hold:
the file is read where a probe is asked for, 16 bytes a probe say where that is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from aiprod_ds.decode.probe import look_into
from aiprod_ds.decode.probe_pool import ProbePool, default_num_workers, from_json, to_json
from aiprod_ds.decode.record import MediaRecord, Medium, Probed
from aiprod_ds.errors import DataError
from aiprod_ds.files import write_lines_atomically

MISSING = "is missing"
"""How the reason begins why a file that does not exist cannot be used."""
_CACHE_VARIABLE = "AIPROD_DS_CACHE_DIR"
# What probed the files: a cache of another format, or of another FFmpeg, is not believed.
_PROBED_BY = f"4, PyAV {av.__version__}"
_MAX_HEADER_BYTES = 1000
_KEY_DIGITS = 16
# What is unknown is looked into one by one at first: processes take longer to start than a few files do.
_ALONE = 32
_AHEAD = 8  # files a process, so that none waits for the slowest
_SAVE_SECONDS, _SAVE_PROBES = 60.0, 5_000
_log = logging.getLogger(__name__)

Pending = Callable[[], Probed]
"""Waits for what a file holds; raises `DataError` as `ProbeCache.probed`."""


class ProbeCache:
    """Probes files that it does not know yet; a context manager, which saves what was found.

    Args:
        file: In which probes are kept between runs; None keeps none. If it cannot be read or written, the
            log says so and the files are probed. One file is for one medium: probes of the other are not
            believed.
        medium: What counts of the files; see `look_into`.
        num_workers: Processes for what is not known, once that is many files; None for as many as there are
            cores.
        forgets: Whether probes of files that nobody asked for are left out at the end.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        medium: Medium = "video",
        num_workers: int | None = None,
        forgets: bool = True,
    ) -> None:
        self._file = file
        self._medium: Medium = medium
        self._header = json.dumps({"probed_by": f"{_PROBED_BY}, {medium}"})
        self._known = _Known() if file is None else _Known.read(file, self._header)
        self._new: dict[str, bytes] = {}
        self._num_workers = default_num_workers() if num_workers is None else num_workers
        self._forgets = forgets
        self._num_unknown = 0
        self._pool: ProbePool | None = None
        self._saved_at = time.monotonic()

    @property
    def window(self) -> int:
        """How many files should be begun before the first of them is waited for."""
        return _AHEAD * self._num_workers

    def __enter__(self) -> ProbeCache:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        self.save(forget=kind is None and self._forgets)
        self._known.close()

    def record(self, file: Path) -> MediaRecord:
        """Returns what clips of `file` depend on, with its whole name as `path`.

        Raises:
            DataError: If it cannot be opened or decoded; the message leaves out its name.
        """
        return self.begin(file)().record

    def sound(self, file: Path) -> MediaRecord:
        """Returns what the sound file beside a video holds; decodes it to its end once.

        Raises:
            DataError: As `record`.
        """
        return self.begin(file, is_sound=True)().record

    def begin(self, file: Path, *, is_sound: bool = False) -> Pending:
        """Begins to look into `file`, unless it is known, and returns what waits for the result.

        Args:
            file: Of the medium, or a sound.
            is_sound: Whether it is a sound beside pictures.
        """
        medium: Medium = "sound" if is_sound else self._medium
        key = f"{'sound:' * is_sound}{os.path.abspath(file)}"  # noqa: PTH100  quicker, and there are many
        try:
            stamp = _stamp(file)
        except DataError as error:
            return _failing(error)
        known = self._known.get(key, stamp)
        if known is not None:
            return lambda: known
        future = self._submit(file, medium)

        def wait() -> Probed:
            probed = future.result()
            self._keep(key, stamp, probed)
            return probed

        return wait

    def save(self, *, forget: bool = True) -> None:
        """Keeps what was found.

        Args:
            forget: Whether probes of files that nobody asked for are left out.
        """
        if self._file is None or not (self._new or (forget and self._known.has_unseen)):
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_lines_atomically(self._file, self._lines(forget=forget))
        except OSError as error:
            _log.warning(
                "probe cache is not written, the next run probes again: file=%s error=%s", self._file, error
            )
            self._file = None
            return
        seen = {*self._known.seen(), *(_hash(key) for key in self._new)}
        self._new.clear()
        self._known.close()
        self._known = _Known.read(self._file, self._header)
        self._known.see(seen)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Ends the processes; what was found stays to be saved. Idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _submit(self, file: Path, medium: Medium) -> Future[Probed]:
        self._num_unknown += 1
        if self._num_unknown > _ALONE and self._num_workers > 1:
            self._pool = self._pool or ProbePool(self._num_workers)
            return self._pool.submit(file, medium)
        future: Future[Probed] = Future()
        try:
            future.set_result(look_into(file, medium=medium))
        except DataError as error:
            future.set_exception(error)
        return future

    def _keep(self, key: str, stamp: tuple[int, int], probed: Probed) -> None:
        if self._file is None:
            return
        line = json.dumps([key, *stamp, *to_json(probed)], separators=(",", ":"))
        self._new[key] = f"{_hash(key):0{_KEY_DIGITS}x} {line}\n".encode()
        # A long scan that is killed begins again near where it was.
        if len(self._new) >= _SAVE_PROBES or time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save(forget=False)

    def _lines(self, *, forget: bool) -> Iterator[bytes]:
        yield f"{self._header}\n".encode()
        replaced = {_hash(key) for key in self._new}
        for number, is_seen, line in self._known.lines():
            if number not in replaced and (is_seen or not forget):
                yield line
        yield from self._new.values()


def default_probe_cache(source: Path, *, medium: Medium = "video") -> Path | None:
    """Returns where the probes of `source` are kept between runs: one file a source and medium in the user's
    cache folder.

    That is `$AIPROD_DS_CACHE_DIR`, else `$XDG_CACHE_HOME/aiprod_ds`, else `~/.cache/aiprod_ds`, never beside
    the data, which may be shared or read-only. None when there is no home either.
    """
    own, shared = os.environ.get(_CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "aiprod_ds"
    except RuntimeError:
        return None
    name = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    return folder / (f"probes-{name}.json" if medium == "video" else f"sounds-{name}.json")


class _Known:
    """A file of probes, each a line that begins with a hash of its key: the places of the lines, by hash."""

    def __init__(self, hashes: array[int] | None = None, places: array[int] | None = None) -> None:
        found = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, dtype=np.uint64)
        order = np.argsort(found, kind="stable")
        self._hashes: NDArray[np.uint64] = found[order]
        self._places = (np.frombuffer(places, dtype=np.uint64) if places else found)[order]
        self._is_seen = np.zeros(len(found), dtype=np.bool_)
        self._opened: BinaryIO | None = None

    @classmethod
    def read(cls, file: Path, header: str) -> _Known:
        """Returns the probes of a file; none if there is no file, or another version wrote it, or it is
        damaged."""
        try:
            opened = file.open("rb")
        except FileNotFoundError:
            return cls()
        except OSError as error:
            return cls._unreadable(file, error)
        try:
            known = cls(*_places(opened, header))
        except (OSError, ValueError) as error:
            opened.close()
            return cls._unreadable(file, error)
        known._opened = opened
        return known

    @classmethod
    def _unreadable(cls, file: Path, error: Exception) -> _Known:
        _log.warning("probe cache is unreadable and is made anew: file=%s error=%s", file, error)
        return cls()

    @property
    def has_unseen(self) -> bool:
        """Whether there is a probe that nobody asked for."""
        return not self._is_seen.all()

    def get(self, key: str, stamp: tuple[int, int]) -> Probed | None:
        """Returns what is known of a file that has this size and modification time (ns) now."""
        if not len(self._hashes):
            return None
        number = np.uint64(_hash(key))
        at = int(self._hashes.searchsorted(number))
        while at < len(self._hashes) and self._hashes[at] == number:
            try:
                said, size, modified, *values = json.loads(self._line(int(self._places[at])))
                if said == key and (size, modified) == stamp:
                    self._is_seen[at] = True
                    return from_json(values, path=key.removeprefix("sound:"))
            except (OSError, ValueError, TypeError):
                return None  # of another format, or the disk fails: it is looked into again
            at += 1
        return None

    def lines(self) -> Iterator[tuple[int, bool, bytes]]:
        """Yields hash, whether it was asked for, and the line, in the order of the file."""
        for at in np.argsort(self._places):
            line = self._whole_line(int(self._places[at]))
            yield int(self._hashes[at]), bool(self._is_seen[at]), line

    def seen(self) -> list[int]:
        """Returns the hashes that were asked for."""
        return [int(number) for number in self._hashes[self._is_seen]]

    def see(self, hashes: set[int]) -> None:
        """Marks probes as asked for."""
        self._is_seen |= np.isin(self._hashes, np.fromiter(hashes, dtype=np.uint64, count=len(hashes)))

    def close(self) -> None:
        """Closes the file."""
        if self._opened is not None:
            self._opened.close()

    def _line(self, place: int) -> bytes:
        return self._whole_line(place)[_KEY_DIGITS + 1 :]

    def _whole_line(self, place: int) -> bytes:
        assert self._opened is not None, "there are places"
        self._opened.seek(place)
        return self._opened.readline()


def _places(opened: BinaryIO, header: str) -> tuple[array[int], array[int]]:
    """Returns hash and place of every line; none if another version wrote the file.

    Raises:
        ValueError: If it is damaged.
    """
    hashes, places = array("Q"), array("Q")
    first = opened.readline(_MAX_HEADER_BYTES)
    if first.decode().rstrip("\n") != header:
        said = json.loads(first) if first.endswith(b"\n") else None
        if not isinstance(said, dict) or not isinstance(said.get("probed_by"), str):
            raise ValueError("it does not say what made it")
        return hashes, places
    place = len(first)
    for line in opened:
        if not line.endswith(b"]\n"):
            raise ValueError(f"the line at byte {place} has no end")
        hashes.append(int(line[:_KEY_DIGITS], 16))
        places.append(place)
        place += len(line)
    return hashes, places


def _hash(key: str) -> int:
    text = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=_KEY_DIGITS // 2).digest(), "big")


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise DataError(f"{MISSING}: there is no such file") from error
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise DataError(f"cannot be opened: {error}") from error
    return status.st_size, status.st_mtime_ns


def _failing(error: DataError) -> Pending:
    def fail() -> Any:
        raise error

    return fail
