"""Why a file cannot be decoded, as far as its first bytes show: empty, cut off, or no media at all.

Owns the distinction; FFmpeg says the same of all three. Called by `probe.py` for files that failed.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEAD = 512
_SHOWN = 20
_POINTER = b"version https://git-lfs"
# The boxes that may come first in MP4 and MOV.
_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})


def diagnose(file: Path) -> str | None:
    """Returns what is wrong with `file`, in words that go on after its name; None if that does not show.

    Raises:
        OSError: If it cannot be read.
    """
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if not head:
        return "is empty (0 bytes)"
    if not head.strip(b"\0"):
        return "is incomplete: it begins with zeros, as a download does that has reserved its room"
    if head.startswith(_POINTER):
        return "is no media: it is a Git LFS pointer in place of the file"
    if head[4:8] in _FIRST_BOXES:
        return _cut_off(file)
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"is no media: it is text that begins with {head[:_SHOWN].decode(errors='replace')!r}"
    return None


def _cut_off(file: Path) -> str | None:
    """Returns whether an MP4 lacks its index or ends inside of a box."""
    size, names, position = file.stat().st_size, set(), 0
    with file.open("rb") as opened:
        while position + 8 <= size:
            opened.seek(position)
            header = opened.read(16)
            length, name = struct.unpack(">I4s", header[:8])
            if length == 1 and len(header) == 16:
                (length,) = struct.unpack(">Q", header[8:])
            names.add(name)
            if length == 0:
                break  # to the end of the file
            if length < 8:
                return None
            position += length
    if position > size:
        return f"is incomplete: {size} bytes are there of at least {position}"
    return None if b"moov" in names else "is incomplete: it has no index (moov), which recorders write last"
