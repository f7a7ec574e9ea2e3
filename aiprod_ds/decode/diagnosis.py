"""Why a file cannot be decoded, as far as its first bytes show: empty, cut off, or no media at all.

Owns the distinction; FFmpeg says the same of all three. Called by `probe.py`, mostly for files that failed.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEAD = 512
_SHOWN = 20
_POINTER = b"version https://git-lfs"
_NEEDED_BOXES = frozenset({b"mdat", b"moof", b"moov"})
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
        return cut_off(file)
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"is no media: it is text that begins with {head[:_SHOWN].decode(errors='replace')!r}"
    return None


def cut_off(file: Path) -> str | None:
    """Returns how an MP4 or MOV is incomplete; None if it has its index and ends where a box ends."""
    size, names, position = file.stat().st_size, set(), 0
    with file.open("rb") as opened:
        while position + 8 <= size:
            opened.seek(position)
            header = opened.read(16)
            length, name = struct.unpack(">I4s", header[:8])
            if length == 1 and len(header) == 16:
                (length,) = struct.unpack(">Q", header[8:])
            if position + length > size and name in _NEEDED_BOXES:
                return f"is incomplete: {size} bytes are there of at least {position + length}"
            names.add(name)
            if length < 8:  # 0: to the end of the file; else something that is no box
                break
            position += length
    return None if b"moov" in names else "is incomplete: it has no index (moov), which recorders write last"
