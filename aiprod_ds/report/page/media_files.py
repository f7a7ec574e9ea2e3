"""Files of a run folder as the page shows them: inside the page up to a bound, beyond it by their names.

Owns the bound, and that nothing outside of the run folder is read whatever a record names.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

MAX_EMBEDDED_BYTES = 40 << 20
_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".m4a": "audio/mp4",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the page finds a file.

    Attributes:
        url: A data URI, or the path relative to the page; empty if there is no such file.
        note: Why it is not inside the page; empty if it is.
    """

    url: str
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Embedder:
    """Takes files into the page in the order in which they are asked for, until the bound is reached.

    Attributes:
        folder: Of the run.
        base: The page's path to it, empty if the page stands in it; may hold only what a URL may.
        max_bytes: Of all that is embedded, as it stands in the page.
        num_linked: How many files were left beside the page.
    """

    folder: Path
    base: str = ""
    max_bytes: int = MAX_EMBEDDED_BYTES
    num_linked: int = 0
    _known: dict[str, Source] = field(default_factory=dict)

    def source(self, path: str) -> Source:
        """Returns where the page finds the file at `path`, which is relative to the run folder."""
        if path not in self._known:
            self._known[path] = self._source(path)
        return self._known[path]

    def file(self, path: str) -> Path | None:
        """Returns the file, None if there is none in the folder by this name."""
        try:
            found = (self.folder / path).resolve()
            is_inside = found.is_relative_to(self.folder.resolve()) and found.is_file()
        except (OSError, ValueError):
            return None
        return found if is_inside else None

    def data(self, data: bytes, kind: str) -> str:
        """Returns bytes as a data URI, empty if they go over the bound."""
        size = len(data) * 4 // 3 + 64
        if size > self.max_bytes:
            return ""
        self.max_bytes -= size
        return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"

    def _source(self, path: str) -> Source:
        found = self.file(path)
        if found is None:
            return Source(url="", note="the file is gone")
        kind = _TYPES.get(found.suffix.lower())
        try:
            if kind is not None and found.stat().st_size * 4 // 3 + 64 <= self.max_bytes:
                return Source(url=self.data(found.read_bytes(), kind))
        except OSError as error:
            return Source(url="", note=f"cannot be read: {error.strerror}")
        self.num_linked += 1
        return Source(url=self.base + quote(path), note="beside the page, not in it")


def way_to(folder: Path, page_folder: Path) -> str:
    """Returns the way from a page's folder to another folder, as a URL that ends with a slash; empty if they
    are one."""
    way = os.path.relpath(folder.resolve(), page_folder.resolve())
    return "" if way == "." else quote(Path(way).as_posix()) + "/"
