"""What is done with files that a clip is not like, in words: nothing is stretched, converted or left out in
silence.

Owns the choice by setting and the sentences of the report; the work is `aiprod_ds.decode`'s. Called by the
trainers and by `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from aiprod_ds.config.data import AudioDataConfig, PictureConfig
from aiprod_ds.data.clip_list import content_mark
from aiprod_ds.data.manifest import Manifest, Unreadable
from aiprod_ds.decode.record import SCENE_MARK, MediaRecord

# In int16 the least that is not 0 is -90 dB; noise below it is dither.
_SILENCE_PEAK = 10 ** (-90 / 20)
_NOTABLE_DC = 0.01
_PLAIN_CHANNELS = 2
_NAMED = 3


def usable_pictures(manifest: Manifest, config: PictureConfig) -> Manifest:
    """Returns the manifest without the clips that settings leave out; these are listed in `ignored`."""
    reasons = {record.path: _left_out(record, config) for record in manifest.records}
    ignored = tuple(Unreadable(path=path, reason=reason) for path, reason in reasons.items() if reason)
    records = tuple(record for record in manifest.records if not reasons[record.path])
    return replace(manifest, records=records, ignored=manifest.ignored + ignored)


def picture_notes(records: Iterable[MediaRecord], config: PictureConfig) -> tuple[str, ...]:
    """Returns what is done with the pictures of clips, one sentence a treatment, with how many clips."""
    red, green, blue = config.alpha_background
    known = tuple(records)
    return _scene_notes(known) + _counted(
        known,
        (
            ("deinterlaced (bwdif)", lambda record: record.is_interlaced),
            ("tone-mapped from HDR (PQ)", lambda record: record.hdr == "pq"),
            ("tone-mapped from HDR (HLG)", lambda record: record.hdr == "hlg"),
            ("converted from wide-gamut primaries to BT.709", lambda record: record.is_wide_gamut),
            ("cropped as their container says", lambda record: any(record.crop)),
            ("stretched to square pixels", lambda record: record.pixel_aspect != 1),
            ("turned or mirrored upright", _is_turned),
            (f"composited on the color {red}, {green}, {blue}", lambda record: record.has_alpha),
        ),
    )


def sound_notes(records: Iterable[MediaRecord], *, sample_rate_hz: int, channels: int) -> tuple[str, ...]:
    """Returns what is done with the sound of clips and what is odd about it, with how many clips.

    Args:
        records: Clips; those without sound are passed over.
        sample_rate_hz: What they are resampled to.
        channels: What they get.
    """
    known = tuple(record for record in records if record.audio_rate_hz is not None)
    return _counted(
        known,
        (
            (
                f"resampled to {sample_rate_hz} Hz",
                lambda record: record.audio_rate_hz != sample_rate_hz,
            ),
            (
                "mixed down from more than two channels (ITU-R BS.775)",
                lambda record: (record.audio_channels or 0) > _PLAIN_CHANNELS,
            ),
            (
                "mono, repeated for two channels",
                lambda record: record.audio_channels == 1 and channels > 1,
            ),
            (
                "stereo, averaged to one channel",
                lambda record: record.audio_channels == _PLAIN_CHANNELS and channels == 1,
            ),
        ),
        noun="sound",
    ) + odd_sound_notes(known)


def odd_sound_notes(records: Iterable[MediaRecord]) -> tuple[str, ...]:
    """Returns what is odd about the sound of clips, as far as it was looked at, with how many clips."""
    return _counted(
        tuple(records),
        (
            ("silent (peak below -90 dB)", lambda record: _is_below(record.audio_peak, _SILENCE_PEAK)),
            (
                "clipped (three or more samples at full scale in a row)",
                lambda record: bool(record.audio_clipped),
            ),
            (
                f"with a mean (DC) beyond {_NOTABLE_DC:g}",
                lambda record: record.audio_dc is not None and record.audio_dc > _NOTABLE_DC,
            ),
        ),
        noun="sound",
    )


def audio_notes(records: Iterable[MediaRecord], config: AudioDataConfig) -> tuple[str, ...]:
    """Returns `sound_notes` of an audio VAE's clips."""
    return sound_notes(records, sample_rate_hz=config.sample_rate_hz, channels=config.channels)


def ignored_notes(*manifests: Manifest) -> tuple[str, ...]:
    """Returns how many files each reason left out, with the names of some."""
    reasons: dict[str, list[str]] = {}
    for manifest in manifests:
        for item in manifest.ignored:
            reasons.setdefault(item.reason, []).append(item.path)
    return tuple(
        f"{_files(len(paths))} ignored, {reason}: {_some(paths)}" for reason, paths in reasons.items()
    )


def unreadable_notes(*manifests: Manifest) -> tuple[str, ...]:
    """Returns which files of the manifests cannot be read, by name and reason, in words."""
    named = [f"{item.path} ({item.reason})" for manifest in manifests for item in manifest.unreadable]
    return (f"{_files(len(named))} left out that cannot be read: {_some(named)}",) if named else ()


def duplicate_notes(train: Manifest, validation: Manifest) -> tuple[str, ...]:
    """Returns what stands more than once, by content: within training, and in training and validation.

    Raises:
        DataError: If latents of which nobody knows the media cannot be read.
    """
    paths: dict[str, list[str]] = {}
    for record in train.records:
        paths.setdefault(_content(train, record), []).append(record.name)
    twice = [names for names in paths.values() if len(names) > 1]
    # Names of two folders may be alike.
    held, own = (
        ("", "")
        if train.where == validation.where
        else (f"{manifest.where}/" for manifest in (validation, train))
    )
    leaks = [
        f"{held}{record.name} = {own}{paths[content][0]}"
        for record in validation.records
        if (content := _content(validation, record)) in paths
    ]
    notes = []
    if leaks:
        notes.append(f"{_clips(len(leaks))} held out and trained on at once, by content: {_some(leaks)}")
    if twice:
        copies = sum(len(names) - 1 for names in twice)
        pairs = [" = ".join(names) for names in twice]
        notes.append(f"{_clips(copies)} in training more than once, by content: {_some(pairs)}")
    return tuple(notes)


def _content(manifest: Manifest, record: MediaRecord) -> str:
    if record.path in manifest.named:
        return content_mark(manifest, record.path)
    _, mark, span = record.name.rpartition(SCENE_MARK)
    return f"{record.sha256}{mark}{span}" if mark else record.sha256


_Rule = tuple[str, Callable[[MediaRecord], bool]]


def _counted(
    records: tuple[MediaRecord, ...], rules: Iterable[_Rule], *, noun: str = "file"
) -> tuple[str, ...]:
    notes = []
    for words, holds in rules:
        names = list(dict.fromkeys(record.path for record in records if holds(record)))
        if names:
            notes.append(f"{len(names)} {noun}{'' if len(names) == 1 else 's'} {words}: {_some(names)}")
    return tuple(notes)


def _scene_notes(records: tuple[MediaRecord, ...]) -> tuple[str, ...]:
    scenes = [record.path for record in records if record.name != record.path]
    films = list(dict.fromkeys(scenes))
    return (f"{_files(len(films))} cut into {len(scenes)} scenes: {_some(films)}",) if films else ()


def _left_out(record: MediaRecord, config: PictureConfig) -> str | None:
    if record.is_interlaced and config.interlaced == "leave_out":
        return "is interlaced (data.interlaced: leave_out)"
    if record.hdr is not None and config.hdr == "leave_out":
        return f"is HDR, {record.hdr.upper()} (data.hdr: leave_out)"
    return None


def _is_turned(record: MediaRecord) -> bool:
    return record.is_mirrored or record.rotation_degrees != 0


def _is_below(value: float | None, limit: float) -> bool:
    return value is not None and value < limit


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _clips(count: int) -> str:
    return f"{count} clip{'' if count == 1 else 's'}"
