"""What files hold, remembered while their size and modification time stay as they were.

Owns the cache; looking into files is `decode/probe.py`'s. Called by `manifest.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av

from aiprod_ds.decode.probe import probe
from aiprod_ds.decode.record import MediaRecord, Medium
from aiprod_ds.errors import DataError
from aiprod_ds.files import write_atomically

MISSING = "is missing"
"""How the reason begins why a file that does not exist cannot be used."""
_CACHE_VARIABLE = "AIPROD_DS_CACHE_DIR"
# What probed the files: a cache of another format, or of another FFmpeg, is not believed.
_PROBED_BY = f"3, PyAV {av.__version__}"
_log = logging.getLogger(__name__)


class ProbeCache:
    """Probes files that it does not know yet.

    Args:
        file: JSON in which probes are kept between runs; None keeps none. If it cannot be read or written,
            the log says so and the files are probed. One file is for one medium: probes of the other are not
            believed.
        medium: What counts of the files; see `probe`.
    """

    def __init__(self, file: Path | None, *, medium: Medium = "video") -> None:
        self._file = file
        self._medium: Medium = medium
        self._probed_by = f"{_PROBED_BY}, {medium}"
        self._known = {} if file is None else _read_probes(file, self._probed_by)
        self._seen: dict[str, _Probe] = {}

    def record(self, file: Path) -> MediaRecord:
        """Returns what `file` holds, with its whole name as `path`.

        Raises:
            DataError: If it cannot be opened or decoded; the message leaves out its name.
        """
        return self._record(file, self._medium, str(file.absolute()))

    def sound(self, file: Path) -> MediaRecord:
        """Returns what the sound file beside a video holds; decodes it to its end once.

        Raises:
            DataError: As `record`.
        """
        return self._record(file, "sound", f"sound:{file.absolute()}")

    def _record(self, file: Path, medium: Medium, key: str) -> MediaRecord:
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise DataError(f"{MISSING}: there is no such file") from error
        except OSError as error:
            raise DataError(f"cannot be opened: {error.strerror}") from error
        except ValueError as error:  # a null byte or a lone surrogate in the name
            raise DataError(f"cannot be opened: {error}") from error
        stamp = (status.st_size, status.st_mtime_ns)
        known = self._known.get(key)
        record = known.record if known is not None and known.stamp == stamp else probe(file, medium=medium)
        self._seen[key] = _Probe(stamp=stamp, record=record)
        return record

    def save(self) -> None:
        """Keeps the probes of this scan; those of files that it did not ask for are forgotten."""
        if self._file is None or self._seen == self._known:
            return
        content = {
            "probed_by": self._probed_by,
            "probes": {key: asdict(probe) for key, probe in self._seen.items()},
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(content))
        except OSError as error:
            _log.warning(
                "probe cache is not written, the next run probes again: file=%s error=%s", self._file, error
            )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """What a file held when it had this size and modification time (ns)."""

    stamp: tuple[int, int]
    record: MediaRecord


def _read_probes(file: Path, probed_by: str) -> dict[str, _Probe]:
    """Returns the cached probes; none if there is no file, or another version wrote it, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["probed_by"] != probed_by:
            return {}
        return {
            key: _Probe(stamp=tuple(probe["stamp"]), record=_record(probe["record"]))
            for key, probe in content["probes"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("probe cache is unreadable and is made anew: file=%s error=%s", file, error)
        return {}


def _record(fields: dict[str, Any]) -> MediaRecord:
    tuples = {name: tuple(fields.get(name, ())) for name in ("crop", "more_captions")}  # JSON has lists only
    return MediaRecord(**{**fields, **tuples})
