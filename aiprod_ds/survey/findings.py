"""What can be found of a file, how grave it is, what the trainer does with it and what a user can do.

Owns the words and the rules that need one file alone, with what a configuration asks. Which files are clips,
and the work on them, are `aiprod_ds.data`'s and `aiprod_ds.decode`'s. Called by `run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from aiprod_ds.data.probe_cache import MISSING
from aiprod_ds.decode.record import MediaRecord

if TYPE_CHECKING:
    from aiprod_ds.survey.demands import Demands
    from aiprod_ds.survey.rows import Row

_SILENCE_PEAK = 10 ** (-90 / 20)
_NOTABLE_DC = 0.01
_PLAIN_CHANNELS = 2


class Level(IntEnum):
    """How grave a finding is; the gravest first."""

    LEFT_OUT = 0
    LOOK = 1
    TREATED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingKind:
    """One kind of finding.

    Attributes:
        title: What it is, of several files.
        effect: What the trainer does with such a file.
        advice: What a user can do; empty where nothing is to be done.
    """

    title: str
    level: Level
    effect: str
    advice: str = ""


def _left_out(title: str, advice: str) -> FindingKind:
    return FindingKind(title=title, level=Level.LEFT_OUT, effect="left out", advice=advice)


def _look(title: str, effect: str, advice: str) -> FindingKind:
    return FindingKind(title=title, level=Level.LOOK, effect=effect, advice=advice)


def _treated(title: str, effect: str, advice: str = "") -> FindingKind:
    return FindingKind(title=title, level=Level.TREATED, effect=effect, advice=advice)


_COPY = "Copy or download them again."
_CONVERT = "Convert them, e.g. ffmpeg -i IN -c:v libx264 -crf 16 OUT.mp4, or remove them."
FINDINGS: Mapping[str, FindingKind] = {
    "empty": _left_out("0 bytes", _COPY),
    "incomplete": _left_out("incomplete", _COPY),
    "no_media": _left_out("no media in them", "Put the real files in their place, or remove them."),
    "missing": _left_out("named by the table and missing", "Correct the table or bring the files back."),
    "unreadable": _left_out("cannot be decoded", _CONVERT),
    "no_pictures": _left_out("no pictures in them", "Remove them, or train a model of sounds on them."),
    "no_sound": _left_out("no sound in them", "Remove them, or name a sound file in the column audio."),
    "unusable_sound": _left_out("sound that cannot be used", "Convert them to stereo at 48 kHz."),
    "setting": _left_out("left out by the configuration", "Change data.interlaced or data.hdr to use them."),
    "no_caption_left_out": _left_out(
        "no caption", "Write NAME.txt beside each, or set text.default_caption."
    ),
    "too_short": _left_out("too short for every shape", "Ask for shorter clips, or bring longer ones."),
    "damaged": _look(
        "cannot be decoded in the middle",
        "replaced by another clip in training",
        "Copy them again. check --read-all reads every file to its end.",
    ),
    "duplicate": _look(
        "same content as another file",
        "trained on more than once",
        "Remove the copies, or set data.duplicates: error.",
    ),
    "too_short_for_phase": _look(
        "too short for a phase", "not used in that phase", "Add a shorter bucket to the phase."
    ),
    "small": _look(
        "smaller than the shape they go into",
        "enlarged, which blurs",
        "Ask for smaller clips, or remove them.",
    ),
    "no_caption": _look(
        "no caption", "cannot be encoded for a diffusion model", "Write NAME.txt beside each."
    ),
    "caption_problem": _look(
        "a file of captions that cannot be read", "taken as without caption", "Correct it."
    ),
    "silent": _look("silent", "trained on as silence", "Remove them, or set data.silence_threshold_db."),
    "clipped": _look("clipped sound", "trained on as it is", "Take a better recording where there is one."),
    "dc": _look("sound with an offset (DC)", "trained on as it is", "Filter below 20 Hz."),
    "interlaced": _treated(
        "interlaced", "deinterlaced (bwdif)", "data.interlaced: leave_out leaves them out."
    ),
    "hdr": _treated("HDR", "tone-mapped to SDR", "data.hdr: leave_out leaves them out."),
    "wide_gamut": _treated("wide gamut", "converted to BT.709"),
    "alpha": _treated("transparent", "composited", "data.alpha_background is the color behind them."),
    "variable_rate": _treated(
        "variable frame rate", "frames are taken by their times", "duration.frame_rate_hz makes one rate."
    ),
    "stretched": _treated("pixels that are not square", "stretched to the displayed size"),
    "turned": _treated("stored turned or mirrored", "turned upright"),
    "cropped": _treated("cropped by their container", "cropped as displayed"),
    "mixed_down": _treated("more than two channels", "mixed down (ITU-R BS.775)"),
    "channels": _treated("mono or stereo, other than asked for", "repeated or averaged"),
    "resampled": _treated("another sample rate", "resampled"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found of one file; `text` says what is particular to it."""

    kind: str
    text: str

    @property
    def level(self) -> Level:
        """How grave it is."""
        return FINDINGS[self.kind].level

    @property
    def sentence(self) -> str:
        """What it is and what becomes of it."""
        return f"{self.text}: {FINDINGS[self.kind].effect}"

    def document(self) -> dict[str, Any]:
        """Returns it for JSON."""
        kind = FINDINGS[self.kind]
        return {
            "kind": self.kind,
            "level": kind.level.name.lower(),
            "text": self.text,
            "effect": kind.effect,
            "advice": kind.advice,
        }


def of_unreadable(reason: str) -> Finding:
    """Returns what is wrong with a file that cannot be used, by the reason that probing gave."""
    for begin, kind in (
        ("is empty", "empty"),
        ("is incomplete", "incomplete"),
        ("is no media", "no_media"),
        (MISSING, "missing"),
        ("holds no video", "no_pictures"),
        ("it holds no sound", "no_sound"),
        ("cannot be decoded: it holds no sound", "no_sound"),
    ):
        if reason.startswith(begin):
            return Finding(kind=kind, text=reason)
    return Finding(kind="unreadable", text=reason)


def of_record(row: Row, record: MediaRecord, heard: MediaRecord, demands: Demands) -> Iterator[Finding]:
    """Yields what is to be known of a file that can be read.

    Args:
        row: Its facts.
        record: Of the file.
        heard: Of the file whose sound counts.
        demands: What is asked.
    """
    if row.height:
        yield from _of_pictures(row, record, demands)
    if heard.audio_rate_hz is not None:
        yield from _of_sound(heard, demands)


def _of_pictures(row: Row, record: MediaRecord, demands: Demands) -> Iterator[Finding]:
    if record.is_interlaced:
        left_out = demands.pictures.interlaced == "leave_out"
        yield Finding(kind="setting" if left_out else "interlaced", text="interlaced")
    if record.hdr is not None:
        left_out = demands.pictures.hdr == "leave_out"
        yield Finding(kind="setting" if left_out else "hdr", text=f"HDR ({record.hdr.upper()})")
    if record.is_wide_gamut:
        yield Finding(kind="wide_gamut", text="wide gamut")
    if record.has_alpha:
        red, green, blue = demands.pictures.alpha_background
        yield Finding(kind="alpha", text=f"transparent, on {red}, {green}, {blue}")
    if row.variable_rate:
        yield Finding(kind="variable_rate", text="variable rate")
    if record.pixel_aspect != 1:
        yield Finding(
            kind="stretched",
            text=f"pixels {record.pixel_aspect:.4g}:1",
        )
    if record.rotation_degrees or record.is_mirrored:
        turn = f"turned {record.rotation_degrees}°" if record.rotation_degrees else ""
        yield Finding(kind="turned", text=" and ".join(filter(None, (turn, "mirrored" * record.is_mirrored))))
    if any(record.crop):
        top, bottom, left, right = record.crop
        yield Finding(kind="cropped", text=f"cropped {top}, {bottom}, {left}, {right}")


def _of_sound(heard: MediaRecord, demands: Demands) -> Iterator[Finding]:
    channels, rate_hz = heard.audio_channels or 0, heard.audio_rate_hz
    if channels > _PLAIN_CHANNELS:
        yield Finding(kind="mixed_down", text=f"{channels} channels ({heard.audio_layout})")
    elif demands.channels is not None and channels != demands.channels:
        yield Finding(kind="channels", text=f"{channels} of {demands.channels} channels")
    if demands.sample_rate_hz is not None and rate_hz != demands.sample_rate_hz:
        yield Finding(kind="resampled", text=f"{rate_hz} Hz to {demands.sample_rate_hz} Hz")
    if heard.audio_peak is not None and heard.audio_peak < _SILENCE_PEAK:
        yield Finding(kind="silent", text="silent (peak below -90 dB)")
    if heard.audio_clipped:
        yield Finding(kind="clipped", text=f"{heard.audio_clipped:,} clipped samples")
    if heard.audio_dc is not None and heard.audio_dc > _NOTABLE_DC:
        yield Finding(kind="dc", text=f"offset (DC) of {heard.audio_dc:.2g}")
