"""What a folder or table of media holds, as far as a first configuration asks: how many clips, how large, how
long.

Owns the few figures; files are looked into by `aiprod_ds.survey`, and what was found is remembered for
training.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from aiprod_ds.errors import ConfigError
from aiprod_ds.survey.demands import Demands, Wanted
from aiprod_ds.survey.rows import Row
from aiprod_ds.survey.run import survey

_LOWEST_SHARE = 0.1  # of clips may be smaller or shorter than what is chosen
_ALIKE = 0.1  # by how much the shape of a picture may differ from the usual one
_FEWEST_CLIPS = 2  # one to train on, one held out


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is in the folder, of the files that can be used.

    Attributes:
        clips: How many.
        unusable: Files that cannot be read, or hold nothing of what is wanted.
        short_side: Pixels that nine of ten clips have in their shorter side; 0 of sounds.
        aspect: Width over height of the usual clip.
        is_mixed: Whether more than one clip of ten has quite another shape.
        frames: That nine of ten films have; 1 of pictures alone, 0 of sounds.
        seconds: That nine of ten films or sounds last.
        sound_rate_hz: Of the usual sound.
        captioned: Clips with a caption.
    """

    clips: int
    unusable: int
    short_side: int
    aspect: float
    is_mixed: bool
    frames: int
    seconds: float
    sound_rate_hz: int
    captioned: int

    @property
    def unusable_share(self) -> float:
        """Share of all files."""
        return self.unusable / (self.clips + self.unusable)


@dataclass(slots=True)
class _Rows:
    used: list[Row] = field(default_factory=list)
    unusable: int = 0

    def row(self, row: Row) -> None:
        if row.is_used:
            self.used.append(row)
        else:
            self.unusable += 1

    def ignored(self, path: str, reason: str) -> None:
        """Files of other kinds are not counted."""


def look(source: Path, *, wanted: Wanted) -> Facts:
    """Looks into every file of a folder or table.

    Raises:
        DataError: If there is nothing there, or the table is malformed.
        ConfigError: If fewer than two clips can be used.
    """
    rows = _Rows()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        survey(source, Demands(wanted=wanted), spool=spool, writers=(rows,))
    if len(rows.used) < _FEWEST_CLIPS:
        raise ConfigError(
            f"--data: must hold at least {_FEWEST_CLIPS} clips, one to train on and one held out, got "
            f"{len(rows.used)} and {rows.unusable} that cannot be used in {source}. `aiprod-ds data "
            f"{source}` says "
            "what is wrong with each."
        )
    sides = [min(row.width, row.height) for row in rows.used]
    aspects = [row.width / row.height for row in rows.used if row.height]
    usual = median(aspects) if aspects else 1.0
    unlike = sum(not 1 - _ALIKE < aspect / usual < 1 + _ALIKE for aspect in aspects)
    films = [row for row in rows.used if row.frames > 1] or rows.used
    rates = [row.audio_rate_hz for row in rows.used if row.audio_rate_hz]
    return Facts(
        clips=len(rows.used),
        unusable=rows.unusable,
        short_side=int(_most_have([float(side) for side in sides])),
        aspect=usual,
        is_mixed=unlike > _LOWEST_SHARE * len(rows.used),
        frames=int(_most_have([float(row.frames) for row in films])),
        seconds=_most_have([row.seconds for row in films]),
        sound_rate_hz=int(median(rates)) if rates else 0,
        captioned=sum(row.captions > 0 for row in rows.used),
    )


def _most_have(values: list[float]) -> float:
    """Returns what nine of ten values reach; of few, the least."""
    return sorted(values)[int(_LOWEST_SHARE * len(values))]
