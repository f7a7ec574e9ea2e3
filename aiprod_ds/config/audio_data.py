"""Where the sounds of a run come from, and in which form the model gets them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.config.schema import PositiveInt

Decibels = Annotated[float, Field(ge=-120, le=0, allow_inf_nan=False)]


class AudioDataConfig(ClipDataConfig):
    """Audio files and the sound of videos; a table names them in the column `audio`, `video` or `media_path`."""

    sample_rate_hz: PositiveInt = 44_100
    """Every sound is resampled to this rate."""
    channels: Literal[1, 2] = 2
    """What the model gets: mono files are repeated for 2, stereo files averaged for 1; files of more channels are unreadable."""
    loudness_lufs: Decibels | None = None
    """Brings every clip to this loudness (-16 is common) as far as its peak stays within 1. null: as it is in the file."""
    silence_threshold_db: Decibels | None = None
    """Level in dB of full scale. A quieter training clip is drawn again, 8 times at most; if all are quieter, the loudest counts.
    Files whose peak is below it are listed as unreadable. null: every clip counts."""
