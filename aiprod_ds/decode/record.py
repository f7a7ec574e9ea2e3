"""What is known of one clip once its file was looked into.

Owns the records; `probe.py` fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Medium = Literal["video", "sound"]
"""What of a file counts: its pictures, or its sound alone."""
Hdr = Literal["pq", "hlg"]
"""Transfer curves of HDR."""
Kind = Literal["picture", "film", "sound"]
"""What a file is: an animation of several frames is a film."""
SCENE_MARK = "#t="
"""Before the seconds in the name of a scene, as in fragments of addresses (W3C Media Fragments)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRecord:
    """One readable clip: `path` relative to the manifest's root, frames >= 1, seconds = frames / fps, pixels
    as displayed.

    An image has one frame; its `fps` is what FFmpeg assumes and means nothing. A sound is a clip of 1x1 whose
    frames are its samples and whose `fps` is its sample rate.

    Attributes:
        height: As displayed: turned upright, with square pixels.
        width: As displayed.
        crop: What the container does not show of the stored picture: rows at the top and bottom, columns on
            the left and right.
        pixel_aspect: Width of a stored pixel over its height.
        rotation_degrees: How far the stored picture is turned counterclockwise for display: 0, 90, 180, 270.
        is_mirrored: Whether it is mirrored from left to right before that.
        is_interlaced: Whether frames say that they consist of two fields.
        hdr: The transfer curve if it is HDR.
        is_wide_gamut: Whether it is SDR in the primaries of BT.2020 or Display P3.
        has_alpha: Whether the first frame is transparent somewhere.
        audio_path: Of a sound in a file of its own, relative to the manifest's root.
        audio_sha256: Of that file.
        audio_layout: The channels as FFmpeg names them, such as `stereo` or `5.1(side)`.
        audio_peak: Largest absolute sample; this and what follows is known of sounds and of `audio_path`.
        audio_clipped: Samples in runs of three or more at full scale.
        audio_dc: Largest absolute mean of a channel.
        start_seconds: When it begins in its file; above 0 for scenes of a film.
        end_seconds: When it ends; None with the file.
        caption: What is said of it; None if nothing.
        more_captions: Further ones, only beside `caption`.
    """

    path: str
    sha256: str
    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    pixel_aspect: float = 1.0
    rotation_degrees: int = 0
    is_mirrored: bool = False
    is_interlaced: bool = False
    hdr: Hdr | None = None
    is_wide_gamut: bool = False
    has_alpha: bool = False
    audio_path: str | None = None
    audio_sha256: str | None = None
    audio_rate_hz: int | None = None
    audio_channels: int | None = None
    audio_layout: str | None = None
    audio_peak: float | None = None
    audio_clipped: int | None = None
    audio_dc: float | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    caption: str | None = None
    more_captions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the clip is called: its path, and of a scene also from and to which second it lasts."""
        if self.start_seconds == 0 and self.end_seconds is None:
            return self.path
        end = "" if self.end_seconds is None else f",{self.end_seconds:.6g}"
        return f"{self.path}{SCENE_MARK}{self.start_seconds:.6g}{end}"

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions, the first of them `caption`."""
        return () if self.caption is None else (self.caption, *self.more_captions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What else a file says of itself; no clip depends on it.

    Attributes:
        num_bytes: Of the file.
        container: FFmpeg's name of the format, the first of several.
        codec: FFmpeg's name, of the pictures if there are any.
        pixel_format: FFmpeg's name; empty of a sound.
        stored_height: Rows of the decoded picture, before it is cropped, stretched and turned.
        stored_width: Columns, likewise.
        is_variable_rate: Whether frames stand for times that differ.
        color_matrix: From YUV to RGB, such as `bt709`; empty where the file does not say.
        color_range: `limited` or `full`; empty where the file does not say.
    """

    kind: Kind
    num_bytes: int
    container: str = ""
    codec: str = ""
    pixel_format: str = ""
    stored_height: int = 0
    stored_width: int = 0
    is_variable_rate: bool = False
    color_matrix: str = ""
    color_range: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Everything that is known of a file."""

    record: MediaRecord
    details: Details
