"""One file as the survey tells of it: facts in plain numbers and words, and what was found.

Owns the row and its columns, in JSON and in CSV. What a finding is says `findings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from aiprod_ds.decode.record import Probed
from aiprod_ds.survey.findings import Finding, Level

# Of a width to a height; what is further off by 2 % and more is told as a number.
_ASPECTS = ((21, 9), (2, 1), (16, 9), (3, 2), (4, 3), (5, 4), (1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2))
_ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of a file. Numbers are 0 and words empty where a file has none.

    Attributes:
        path: From the folder or the table's folder.
        kind: `picture`, `film` or `sound`; empty of a file that cannot be read.
        num_bytes: Of the file.
        stored_width: In pixels, as the decoder gives it.
        stored_height: Likewise.
        width: As displayed.
        height: As displayed.
        aspect: As displayed, in words.
        rate_hz: Frames a second; 0 of pictures and sounds.
        variable_rate: Whether frames stand for times that differ.
        frames: Of pictures and films.
        seconds: How long it plays.
        rotation_degrees: Counterclockwise, for display.
        mirrored: Before that, from left to right.
        cropped: Whether the container crops.
        pixel_aspect: Width of a stored pixel over its height.
        hdr: `pq` or `hlg`.
        color_matrix: Empty where the file does not say.
        color_range: Likewise.
        audio_path: Of a sound in a file of its own.
        captions: How many it has.
        caption: The first of them, its beginning.
        buckets: Which shape it is cut to, by phase.
        duplicate_of: The first file of the same content.
        findings: What is to be known of it.
    """

    path: str
    kind: str = ""
    num_bytes: int = 0
    container: str = ""
    codec: str = ""
    pixel_format: str = ""
    stored_width: int = 0
    stored_height: int = 0
    width: int = 0
    height: int = 0
    aspect: str = ""
    rate_hz: float = 0.0
    variable_rate: bool = False
    frames: int = 0
    seconds: float = 0.0
    rotation_degrees: int = 0
    mirrored: bool = False
    cropped: bool = False
    pixel_aspect: float = 1.0
    interlaced: bool = False
    hdr: str = ""
    wide_gamut: bool = False
    alpha: bool = False
    color_matrix: str = ""
    color_range: str = ""
    audio_rate_hz: int = 0
    audio_channels: int = 0
    audio_layout: str = ""
    audio_path: str = ""
    captions: int = 0
    caption: str = ""
    buckets: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    duplicate_of: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level | None:
        """The gravest of what was found; None if nothing was."""
        return min((found.level for found in self.findings), default=None)

    @property
    def is_used(self) -> bool:
        """Whether something of it is trained on."""
        return self.level is not Level.LEFT_OUT

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, and JSON has."""
        values = {name: getattr(self, name) for name in COLUMNS}
        values["buckets"] = dict(self.buckets)
        values["findings"] = [[found.kind, found.text] for found in self.findings]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Returns the row that `to_dict` was called of."""
        findings = tuple(Finding(kind=kind, text=text) for kind, text in values["findings"])
        return cls(**{**values, "findings": findings})

    def document(self) -> dict[str, Any]:
        """Returns the row as the JSON document has it: with what is done about each finding."""
        level = self.level
        return self.to_dict() | {
            "level": "" if level is None else level.name.lower(),
            "findings": [found.document() for found in self.findings],
        }

    def cells(self) -> list[Any]:
        """Returns the row as the CSV has it, by `CSV_COLUMNS`."""
        level = self.level
        problems = "; ".join(found.sentence for found in self.findings)
        shapes = "; ".join(f"{phase}: {shape}" for phase, shape in self.buckets.items())
        values = [getattr(self, name) for name in _PLAIN]
        return [*values, "" if level is None else level.name.lower(), problems, shapes]


_NESTED = ("buckets", "findings")
COLUMNS = tuple(each.name for each in fields(Row))
_PLAIN = tuple(name for name in COLUMNS if name not in _NESTED)
CSV_COLUMNS = (*_PLAIN, "level", "problems", "buckets")


def row_of(path: str, probed: Probed, sound: Probed | None) -> Row:
    """Returns the facts of a file that can be read, without findings.

    Args:
        path: From the folder of the list.
        probed: What it holds.
        sound: What a sound file beside it holds.
    """
    record, details = probed.record, probed.details
    heard = record if sound is None else sound.record
    row = Row(
        path=path,
        kind=details.kind,
        num_bytes=details.num_bytes,
        container=details.container,
        codec=details.codec,
        audio_rate_hz=heard.audio_rate_hz or 0,
        audio_channels=heard.audio_channels or 0,
        audio_layout=heard.audio_layout or "",
        sha256=record.sha256,
    )
    if details.kind == "sound":
        return replace(row, seconds=record.seconds)
    is_film = details.kind == "film"
    return replace(
        row,
        pixel_format=details.pixel_format,
        stored_width=details.stored_width,
        stored_height=details.stored_height,
        width=record.width,
        height=record.height,
        aspect=aspect_words(record.width, record.height),
        rate_hz=record.fps if is_film else 0.0,
        variable_rate=details.is_variable_rate,
        frames=record.frames,
        seconds=record.seconds if is_film else 0.0,
        rotation_degrees=record.rotation_degrees,
        mirrored=record.is_mirrored,
        cropped=any(record.crop),
        pixel_aspect=round(record.pixel_aspect, 4),
        interlaced=record.is_interlaced,
        hdr=record.hdr or "",
        wide_gamut=record.is_wide_gamut,
        alpha=record.has_alpha,
        color_matrix=details.color_matrix,
        color_range=details.color_range,
    )


@lru_cache(maxsize=1000)
def aspect_words(width: int, height: int) -> str:
    """Returns `16:9` and the like for what is within 2 % of one, else `1.90:1` or `1:1.90`."""
    ratio = width / height
    wide, high = min(_ASPECTS, key=lambda pair: abs(math.log(ratio * pair[1] / pair[0])))
    if abs(math.log(ratio * high / wide)) <= _ASPECT_TOLERANCE:
        return f"{wide}:{high}"
    return f"{ratio:.2f}:1" if ratio >= 1 else f"1:{1 / ratio:.2f}"
