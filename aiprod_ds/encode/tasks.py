"""What is to be encoded: every clip in every shape that training will ask for, without what is already there.

Owns the choice of shapes and the comparison with existing files. Runs on the main rank; every rank gets the
same list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aiprod_ds.config.encode import CaptionConfig
from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.buckets import bucket_clips, long_enough
from aiprod_ds.data.captions import CAPTION_SUFFIXES, with_captions, with_trigger
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    LATENTS,
    LatentShape,
    entry_name,
    entry_path,
    read_header,
    require_inside,
)
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.decode.pixels import BLACK, Color
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError

_NO_CAPTION = (
    f"it must have a caption, got none in its row or beside it ({', '.join(CAPTION_SUFFIXES)}). Add one or "
    "set text.default_caption"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One clip to encode.

    Attributes:
        record: Of the media; its captions are those to encode.
        shape: Of the pictures; None for captions, which have none.
        sources: What to write, of `latents`, `audio_latents` and `conditions`.
    """

    record: MediaRecord
    shape: LatentShape | None
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its entries."""
        return entry_name(self.record.name, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """What decides an entry beside its clip, by source.

    Attributes:
        fingerprints: Of the networks. An entry of another one is an error.
        settings: Precision and tiles in words. An entry of others is encoded again.
        background: RGB behind transparent pixels.
    """

    fingerprints: Mapping[str, str]
    settings: Mapping[str, str]
    background: Color = BLACK

    def identity(self, task: Task, source: str) -> dict[str, str]:
        """Returns the metadata that an entry must have to count as done."""
        if source == CONDITIONS:
            return self.caption_identity(*task.record.captions)
        record = task.record
        identity = {**self._made_by(source), "media_sha256": record.sha256}
        if source == AUDIO_LATENTS and record.audio_sha256 is not None:
            identity["audio_sha256"] = record.audio_sha256
        treated = _treatment(record, self.background) if source == LATENTS else ""
        # Said of treated media only, so that what was encoded of plain media before stays.
        return {**identity, "pixels": treated} if treated else identity

    def caption_identity(self, *captions: str) -> dict[str, str]:
        """Returns the metadata that the embeddings of a clip's captions must have to count as done."""
        hashes = [hashlib.sha256(caption.encode()).hexdigest() for caption in captions]
        return {**self._made_by(CONDITIONS), "caption_sha256": " ".join(hashes)}

    def _made_by(self, source: str) -> dict[str, str]:
        return {"fingerprint": self.fingerprints[source], "settings": self.settings[source]}


def encodable(manifest: Manifest) -> tuple[Manifest, list[tuple[str, str]]]:
    """Returns the clips that can have entries of their own, and (path, reason) of all others, unreadable
    files among them."""
    refused = [(item.path, item.reason) for item in manifest.unreadable]
    kept: dict[str, MediaRecord] = {}
    for record in manifest.records:
        try:
            require_inside(record.path)
        except DataError as error:
            refused.append((record.path, str(error)))
            continue
        if record.name in kept:
            refused.append(
                (record.name, "it stands in the manifest more than once; only the first row is encoded")
            )
        kept.setdefault(record.name, record)
    return replace(manifest, records=tuple(kept.values())), refused


def media_tasks(
    manifest: Manifest,
    shapes: Sequence[tuple[BucketPlan, ...]],
    sources: tuple[str, ...],
    *,
    measured: Collection[str] = (),
) -> tuple[list[Task], list[str]]:
    """Returns one task for every clip and shape, and the clips that no shape takes because they are too
    short.

    Args:
        shapes: Of `shapes.shape_groups`: a clip goes to those buckets of a group that will draw it.
        sources: What each task writes.
        measured: Paths of clips that go to the last group's first bucket, too, if they are long enough.
    """
    clips = [clip_facts(record) for record in manifest.records]
    wanted: dict[tuple[int, LatentShape], None] = {}
    for buckets in shapes:
        for bucket, indices in zip(buckets, bucket_clips(clips, buckets), strict=True):
            wanted.update(dict.fromkeys((index, _shape(bucket)) for index in indices))
    for index in long_enough(clips, shapes[-1][0]) if measured else ():
        if manifest.records[index].path in measured:
            wanted[index, _shape(shapes[-1][0])] = None
    # Shapes together, large ones first: equal clips are spread over ranks evenly.
    ordered = sorted(wanted, key=lambda pair: (-pair[1].frames * pair[1].height * pair[1].width, pair[0]))
    used = {index for index, _ in wanted}
    tasks = [Task(record=manifest.records[index], shape=shape, sources=sources) for index, shape in ordered]
    return tasks, [clip.name for index, clip in enumerate(clips) if index not in used]


def caption_tasks(
    manifest: Manifest, text: CaptionConfig, *, a_line_each: bool
) -> tuple[list[Task], list[tuple[str, str]]]:
    """Returns one task for the captions of every clip, and (path, reason) of clips without one.

    Args:
        text: Its `default_caption` stands for a missing one; its `trigger` is put before each.
        a_line_each: Whether each line of a text file is a caption of its own.
    """
    captioned, problems = with_captions(manifest, a_line_each=a_line_each)
    tasks, refused = [], []
    for record in captioned.records:
        captions = record.captions or (() if text.default_caption is None else (text.default_caption,))
        if record.path in problems or not captions:
            refused.append((record.name, problems.get(record.path, _NO_CAPTION)))
            continue
        first, *more = with_trigger(captions, text.trigger)
        tasks.append(
            Task(
                record=replace(record, caption=first, more_captions=tuple(more)),
                shape=None,
                sources=(CONDITIONS,),
            )
        )
    return tasks, refused


def pending(tasks: Iterable[Task], root: Path, encoders: Encoders) -> list[Task]:
    """Returns the tasks with those of their sources that are not done: absent, damaged, or of another media
    or caption.

    Raises:
        DataError: If an entry was made by another encoder.
    """
    left = []
    for task in tasks:
        sources = tuple(
            source
            for source in task.sources
            if not is_done(entry_path(root, source, task.name), encoders.identity(task, source))
        )
        if sources:
            left.append(replace(task, sources=sources))
    return left


def is_done(path: Path, identity: Mapping[str, str]) -> bool:
    """Returns whether an entry is whole and says of itself what `identity` does.

    Raises:
        DataError: If it was made by another encoder.
    """
    if not path.exists():
        return False
    try:
        found = read_header(path).metadata
    except DataError:
        return False
    fingerprint = found.get("fingerprint", "none")
    if fingerprint != identity["fingerprint"]:
        raise DataError(
            f"{path}: was made by another encoder ({fingerprint[:12]}, now {identity['fingerprint'][:12]}). "
            "Name another data.output_dir, or delete the old entries."
        )
    return all(found.get(name) == value for name, value in identity.items())


def _treatment(record: MediaRecord, background: Color) -> str:
    """Returns what is done with the pictures of media that are not plain; empty for plain ones."""
    words = []
    if record.is_interlaced:
        words.append("deinterlaced")
    if record.hdr is not None or record.is_wide_gamut:
        words.append(f"{record.hdr or 'wide gamut'} to SDR")
    if record.pixel_aspect != 1 or record.is_mirrored or any(record.crop):
        words.append(f"displayed {record.width}x{record.height}")
    if record.has_alpha:
        words.append("on {},{},{}".format(*background))
    return ", ".join(words)


def clip_facts(record: MediaRecord) -> ClipFacts:
    """Returns what decides into which buckets a clip goes."""
    return ClipFacts(
        name=record.name,
        frames=record.frames,
        seconds=record.seconds,
        height=record.height,
        width=record.width,
    )


def _shape(bucket: BucketPlan) -> LatentShape:
    return LatentShape(
        frames=bucket.frames, height=bucket.height, width=bucket.width, frame_rate_hz=bucket.frame_rate_hz
    )
