"""What of every picture a container says not to show: `clap` in MP4 and MOV, `PixelCrop` in Matroska.

Owns reading these two from the header, because PyAV 18 does not pass on the side data in which FFmpeg has
them. What a codec crops, its decoder has cropped already. Called by `probe.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT, _TRACKS, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0
_CLUSTER = 0x1F43B675
_CROPS = {0x54BB: "top", 0x54AA: "bottom", 0x54CC: "left", 0x54DD: "right"}
_MASTERS = frozenset({_SEGMENT, _TRACKS, _TRACK, _VIDEO})
_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})
_MAX_HEADER = 2**28  # of a film of days; more is damage


class Crop(NamedTuple):
    """Rows and columns of the stored picture that are not shown."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def container_crop(file: Path) -> Crop:
    """Returns what the container cuts off the first video track; nothing for other containers.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the header is damaged.
    """
    with file.open("rb") as opened:
        head = opened.read(8)
        opened.seek(0)
        try:
            if head[:4] == _EBML:
                return _of_matroska(opened)
            if head[4:8] in _FIRST_BOXES:
                return _of_mov(opened)
        except (struct.error, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
    return Crop()


def _of_mov(opened: BinaryIO) -> Crop:
    moov = _moov(opened)
    for trak in _boxes(moov, b"trak"):
        for mdia in _boxes(trak, b"mdia"):
            if any(hdlr[8:12] == b"vide" for hdlr in _boxes(mdia, b"hdlr")):
                return _of_track(mdia)
    return Crop()


def _of_track(mdia: bytes) -> Crop:
    for name in (b"minf", b"stbl", b"stsd"):
        found = next(_boxes(mdia, name), None)
        if found is None:
            return Crop()
        mdia = found
    (size,) = struct.unpack(">I", mdia[8:12])
    entry = mdia[8 : 8 + size]
    width, height = struct.unpack(">2H", entry[32:36])
    for clap in _boxes(entry[86:], b"clap"):
        values = struct.unpack(">8i", clap[:32])
        wide, high, across, down = (Fraction(*values[at : at + 2]) for at in (0, 2, 4, 6))
        # ISO/IEC 14496-12, 12.1.4: the offset is that of the centres.
        left = Fraction(width - 1, 2) + across - (wide - 1) / 2
        top = Fraction(height - 1, 2) + down - (high - 1) / 2
        crop = Crop(int(top), int(height - top - high), int(left), int(width - left - wide))
        return crop if min(crop) >= 0 else Crop()
    return Crop()


def _moov(opened: BinaryIO) -> bytes:
    while len(header := opened.read(16)) >= 8:
        size, name = struct.unpack(">I4s", header[:8])
        begin = 8
        if size == 1:
            (size,), begin = struct.unpack(">Q", header[8:]), 16
        opened.seek(begin - len(header), 1)
        if size == 0 or size < begin:
            break
        if name == b"moov":
            return opened.read(min(size - begin, _MAX_HEADER))
        opened.seek(size - begin, 1)
    return b""


def _boxes(data: bytes, name: bytes) -> Iterator[bytes]:
    position = 0
    while position + 8 <= len(data):
        size, found = struct.unpack(">I4s", data[position : position + 8])
        if size < 8:
            return
        if found == name:
            yield data[position + 8 : position + size]
        position += size


def _of_matroska(opened: BinaryIO) -> Crop:
    """Goes through the elements before the first cluster, into those that lead to the video track."""
    is_video, found = False, dict.fromkeys(_CROPS.values(), 0)
    while (element := _element(opened)) is not None:
        identity, size = element
        if identity == _CLUSTER:
            break
        if identity == _TRACK:
            if is_video:
                break
            found = dict.fromkeys(_CROPS.values(), 0)
        if identity in _MASTERS:
            continue
        if identity in _CROPS or identity == _TRACK_TYPE:
            value = int.from_bytes(opened.read(size), "big")
            if identity == _TRACK_TYPE:
                is_video = is_video or value == 1
            else:
                found[_CROPS[identity]] = value
        else:
            opened.seek(size, 1)
    return Crop(**found) if is_video else Crop()


def _element(opened: BinaryIO) -> tuple[int, int] | None:
    """Returns an element's identity and size, with the file at its content; None at the end."""
    first = opened.read(1)
    if not first or not first[0]:
        return None
    identity = first + opened.read(8 - first[0].bit_length())
    start = opened.read(1)
    if not start or not start[0]:
        return None
    length = 8 - start[0].bit_length()
    size = int.from_bytes(bytes([start[0] ^ 1 << 7 - length]) + opened.read(length), "big")
    return int.from_bytes(identity, "big"), size
