"""What a run of `encode` is asked for, found before any network runs: clips, shapes, captions, where the
entries go, and everything that cannot be encoded.

Owns the checks; `tasks.py` makes the tasks. Called by `run.py`, and through `check_encoding` by the command
`check`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.codec.encoders import AudioForm, audio_form
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.config.load import read_holdout
from aiprod_ds.curriculum.auto_buckets import Shape
from aiprod_ds.data.latents import AUDIO_LATENTS, CONDITIONS, LATENTS, default_folder, read_found_buckets
from aiprod_ds.data.manifest import Manifest, holdout, require_readable, scan
from aiprod_ds.data.probe_cache import default_probe_cache
from aiprod_ds.data.scenes import usable_clips
from aiprod_ds.data.treatment import ignored_notes, picture_notes, sound_notes
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.encode.media import clip_rate_hz
from aiprod_ds.encode.reader import Failure
from aiprod_ds.encode.shapes import Groups, shape_groups
from aiprod_ds.encode.tasks import Task, caption_tasks, clip_facts, encodable, media_tasks
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import video_strides

_MOST_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run is asked for, whether or not it is done already."""

    root: Path
    output: Path
    num_clips: int
    form: AudioForm | None
    media: tuple[Task, ...]
    captions: tuple[Task, ...]
    refused: tuple[Failure, ...]
    too_short: tuple[str, ...]
    notes: tuple[str, ...]
    found_buckets: Mapping[str, tuple[Shape, ...]]


def check_encoding(config: EncodeConfig, *, source: str = "configuration") -> str:
    """Checks what `run_encoding` would find before it encodes, without weights, and writes nothing.

    Returns:
        What there is to encode, what of it cannot be and what is done with the rest, in words.

    Raises:
        ConfigError: If a model cannot be built or used.
        PlanError: As `run_encoding`.
    """
    work = plan_work(config, source)
    captions = sum(len(task.record.captions) for task in work.captions)
    lines = [f"{work.num_clips} clips, {len(work.media)} latents and {captions} captions for {work.output}"]
    if work.refused:
        lines.append(f"Not encoded: {count_clips(work.refused)}")
    for failure in work.refused[:_MOST_NAMES]:
        lines.append(f"  {failure.clip}: {failure.what}: {failure.reason}")
    return "\n".join([*lines, *(f"Note: {note}." for note in work.notes)])


def plan_work(config: EncodeConfig, source: str) -> Work:
    """Returns what `config` asks for.

    Raises:
        ConfigError: If a model cannot be built or used, or a shape is impossible.
        PlanError: If media or captions are missing, too many media are unreadable, sounds of one shape differ
            in length, or the folder cannot be written.
    """
    media = Path(config.data.media)
    try:
        probes = default_probe_cache(media)
        found = usable_clips(scan(media, cache=probes), config.data, probes=probes)
        require_readable(found, config.data.max_failed_fraction, setting="data.max_failed_fraction")
        manifest, refused = encodable(found)
    except DataError as error:
        raise PlanError(f"{source}: data.media: {error}") from error
    strides = video_strides(
        build_model(config.video.model, seed=config.seed, device="meta"), config.video.model
    )
    sources = (LATENTS,) if config.audio is None else (LATENTS, AUDIO_LATENTS)
    output = _output(config, found.root, source)
    groups = shape_groups(
        config,
        strides,
        clips=[clip_facts(record) for record in manifest.records],
        known=read_found_buckets(output),
    )
    measured = _held_out_later(manifest, config)
    tasks, too_short = media_tasks(manifest, groups.shapes, sources, measured=measured)
    captions, without = _captions(manifest, config)
    failures = (
        *(Failure(clip=path, what="media", reason=reason) for path, reason in refused),
        *(Failure(clip=path, what=CONDITIONS, reason=reason) for path, reason in without),
    )
    num_clips = len(found.records) + len(found.unreadable)
    _require_captions(without, failures, num_clips, config, source)
    form = (
        None
        if config.audio is None
        else audio_form(build_model(config.audio.model, seed=0, device="meta"), config.audio)
    )
    if form is not None:
        _require_equal_lengths(tasks, form, source)
    _require_writable(output, source)
    return Work(
        root=found.root,
        output=output,
        num_clips=num_clips,
        form=form,
        media=tuple(tasks),
        captions=tuple(captions),
        refused=failures,
        too_short=tuple(too_short),
        notes=(*_notes(found, config, form), *_found_notes(tasks, groups)),
        found_buckets=groups.found,
    )


def _held_out_later(manifest: Manifest, config: EncodeConfig) -> frozenset[str]:
    """Returns which clips the training of `curriculum` will hold out by a fraction, and measure in one shape,
    whatever theirs is."""
    if config.curriculum is None or config.data.held_out:
        return frozenset()
    trainer = read_holdout(Path(config.curriculum))
    if trainer.data.validation is not None:
        return frozenset()
    try:
        _, held_out = holdout(manifest, fraction=trainer.data.holdout_fraction, seed=trainer.seed)
    except DataError:  # of one clip nothing is held out; training says so
        return frozenset()
    return frozenset(record.path for record in held_out.records)


def _captions(manifest: Manifest, config: EncodeConfig) -> tuple[list[Task], list[tuple[str, str]]]:
    if config.text is None:
        return [], []
    return caption_tasks(manifest, config.text, a_line_each=config.data.captions_per_line)


def _require_captions(
    without: Sequence[tuple[str, str]],
    failures: Sequence[Failure],
    num_clips: int,
    config: EncodeConfig,
    source: str,
) -> None:
    """Finds before any encoding that captions are missing, of all clips at once."""
    if not without or count_clips(failures) <= config.data.max_failed_fraction * num_clips:
        return
    reasons: dict[str, list[str]] = {}
    for path, reason in without:
        reasons.setdefault(reason, []).append(path)
    named = "; ".join(f"{_listed(paths)}: {reason}" for reason, paths in reasons.items())
    raise PlanError(
        f"{source}: data.media: at most {config.data.max_failed_fraction:.0%} of the clips may fail, got "
        f"{len(without)} of {num_clips} without a caption: {named}, or raise data.max_failed_fraction."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _output(config: EncodeConfig, media: Path, source: str) -> Path:
    if config.data.output_dir is not None:
        return Path(config.data.output_dir)
    try:
        return default_folder(media)
    except DataError as error:
        raise PlanError(f"{source}: data.media: {error}") from error


def _notes(found: Manifest, config: EncodeConfig, form: AudioForm | None) -> tuple[str, ...]:
    sounds = (
        ()
        if form is None
        else sound_notes(found.records, sample_rate_hz=form.sample_rate_hz, channels=form.channels)
    )
    return (*picture_notes(found.records, config.data), *sounds, *ignored_notes(found))


def _found_notes(tasks: Sequence[Task], groups: Groups) -> tuple[str, ...]:
    """Returns what `buckets: auto` found, and how many clips each shape takes."""
    counts = Counter((task.shape.frames, task.shape.height, task.shape.width) for task in tasks if task.shape)
    return tuple(
        f"buckets: auto of {key}: "
        + ", ".join(
            f"{shape.frames} frames {shape.height}x{shape.width} ({counts[shape]} clips)" for shape in shapes
        )
        for key, shapes in groups.found.items()
    )


def _require_writable(output: Path, source: str) -> None:
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise PlanError(
            f"{source}: data.output_dir: must be a folder that can be written, got {output}. Name "
            "another one."
        )


def _require_equal_lengths(tasks: Sequence[Task], form: AudioForm, source: str) -> None:
    """Clips of one shape are stacked in a batch; at their own rates they last differently."""
    lengths: dict[str, dict[int, MediaRecord]] = {}
    for task in tasks:
        assert task.shape is not None, "clips have shapes"
        count = form.num_latents(task.shape.frames / clip_rate_hz(task.record, task.shape))
        lengths.setdefault(task.shape.tag, {}).setdefault(count, task.record)
    problems = [
        f"{source}: audio: clips of {tag} must have audio latents of one length, got "
        + ", ".join(f"{count} ({record.path} at {record.fps:g} Hz)" for count, record in found.items())
        + ". Set frame_rate_hz in the shape's duration, so that all clips have one rate."
        for tag, found in lengths.items()
        if len(found) > 1
    ]
    if problems:
        raise PlanError(problems)


def count_clips(failures: Sequence[Failure]) -> int:
    """Returns how many clips failed, of which one may fail in several ways."""
    return len({failure.clip for failure in failures})
