"""Cropping written into the headers of finished films, which FFmpeg's muxers do not do: `clap` of MP4 and
Matroska's pixel crop."""

from __future__ import annotations

import struct

from aiprod_ds.decode.container_crop import Crop

_MOV_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")


def with_clap(film: bytes, size: tuple[int, int], crop: Crop) -> bytes:
    """Puts a `clap` at the end of an MP4's first sample entry; `moov` must be the last box, so that no offset
    changes.

    Args:
        film: In H.264, as FFmpeg writes it.
        size: Height and width as stored.
        crop: What is not to be shown.
    """
    wide, high = size[1] - crop.left - crop.right, size[0] - crop.top - crop.bottom
    across, down = crop.left - crop.right, crop.top - crop.bottom
    clap = struct.pack(">I4s8i", 40, b"clap", wide, 1, high, 1, across, 2, down, 2)
    data, at, begins = bytearray(film), 0, []
    for name in _MOV_PARENTS:
        at = data.index(name, at) - 4
        begins.append(at)
        at += 8
    (length,) = struct.unpack_from(">I", data, begins[-1])
    data[begins[-1] + length : begins[-1] + length] = clap
    for begin in begins:
        (length,) = struct.unpack_from(">I", data, begin)
        struct.pack_into(">I", data, begin, length + len(clap))
    return bytes(data)


def with_pixel_crop(film: bytes, size: tuple[int, int], crop: Crop) -> bytes:
    """Puts the four elements at the end of a Matroska file's Video. What follows moves; only seeks by the
    index notice, so the list of where things are is made unknown.

    Args:
        film: As FFmpeg writes it.
        size: Height and width as stored, below 128 each.
        crop: What is not to be shown, below 128 on each side.
    """
    tags = {b"\x54\xbb": crop.top, b"\x54\xaa": crop.bottom, b"\x54\xcc": crop.left, b"\x54\xdd": crop.right}
    added = b"".join(tag + bytes([0x81, value]) for tag, value in tags.items())
    data = bytearray(film.replace(b"\x11\x4d\x9b\x74", b"\x11\x4d\x9b\x75"))
    # Its first mention is in that list; Video begins with width and height, of a byte each.
    tracks = data.index(b"\x16\x54\xae\x6b", data.index(b"\x16\x54\xae\x6b") + 4) + 4
    check = tracks + 9 - data[tracks].bit_length()
    assert data[check : check + 2] == b"\xbf\x84", "a check sum, which becomes room that is not used"
    data[check] = 0xEC
    track = check + 6 + 1
    begins = [tracks, track, data.index(bytes([0xB0, 0x81, size[1], 0xBA, 0x81, size[0]])) - 1]
    assert (data[track - 1], data[begins[-1] - 1]) == (0xAE, 0xE0), "as FFmpeg writes them"
    length = 9 - data[begins[-1]].bit_length()
    end = begins[-1] + length + _vint(data, begins[-1])
    data[end:end] = added
    for begin in begins:
        length = 9 - data[begin].bit_length()
        grown = _vint(data, begin) + len(added)
        assert grown < (1 << 7 * length) - 1, "the size must fit where it stood"
        data[begin : begin + length] = (grown | 1 << 7 * length).to_bytes(length, "big")
    return bytes(data)


def _vint(data: bytearray, at: int) -> int:
    length = 9 - data[at].bit_length()
    return int.from_bytes(data[at : at + length], "big") ^ 1 << 7 * length
