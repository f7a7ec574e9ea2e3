"""Films cut at their scenes: a record with cuts becomes one record a scene, so that no clip straddles a cut.

Owns the cutting and the memory of cuts between runs; finding them is `decode/scenes.py`'s. A scene is named
`film.mp4#t=1.5,4.25`, from and to which second, so its latents keep their names as long as its cuts stay. All
scenes of a film have its content's hash and are held out together. Called by the trainers and by `encode`
through `usable_clips`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av

from aiprod_ds import progress
from aiprod_ds.config.data import PictureConfig
from aiprod_ds.data.manifest import Manifest, Unreadable
from aiprod_ds.data.treatment import usable_pictures
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.decode.scenes import find_cuts
from aiprod_ds.errors import DataError
from aiprod_ds.files import write_atomically

_FOUND_BY = f"1, PyAV {av.__version__}"
# Containers that count milliseconds may put a cut this part of a frame off.
_FRAME_TOLERANCE = 0.1
_MOST_THREADS = 8
_log = logging.getLogger(__name__)


def usable_clips(manifest: Manifest, config: PictureConfig, *, probes: Path | None) -> Manifest:
    """Returns the clips that the settings take: without what they leave out, and cut at scenes if they say
    so.

    Args:
        manifest: From `scan`.
        config: The data section.
        probes: Where probes of these files are kept; the cuts are kept beside them. None keeps none.

    Raises:
        DataError: If scenes of media in shards are to be cut.
    """
    usable = usable_pictures(manifest, config)
    if config.scenes == "none":
        return usable
    if usable.packed is not None:
        raise DataError(
            f"{usable.where}: scenes cannot be cut in shards, got scenes: cut. Cut before packing, or set "
            "scenes to none."
        )
    cache = None if probes is None else probes.with_name(f"scenes-{probes.name}")
    return cut_at_scenes(usable, threshold=config.scene_threshold, cache=cache)


def cut_at_scenes(manifest: Manifest, *, threshold: float, cache: Path | None = None) -> Manifest:
    """Returns the manifest with one record a scene; films that cannot be decoded to their end are listed in
    `unreadable`.

    Args:
        manifest: From `scan` of videos.
        threshold: As of `find_cuts`.
        cache: In which the cuts of files with this content are kept between runs; None keeps none.
    """
    kept = _read(cache, threshold)
    known = dict(kept)
    unreadable: list[Unreadable] = []
    # Copies are looked into once.
    todo = {r.sha256: r for r in manifest.records if r.frames > 1 and r.sha256 not in known}
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        films = list(todo.values())
        found = threads.map(lambda record: _cuts_of(manifest.root / record.path, threshold), films)
        words = f"finding scenes in {manifest.root}:"
        for record, cuts in progress.steps(zip(films, found, strict=True), words, len(films)):
            if isinstance(cuts, DataError):
                unreadable.append(Unreadable(path=record.path, reason=str(cuts)))
            else:
                known[record.sha256] = cuts
    asked = {record.sha256 for record in manifest.records}
    _write(cache, threshold, {sha: cuts for sha, cuts in known.items() if sha in asked}, before=kept)
    bad = {item.path for item in unreadable}
    records = [
        scene
        for record in manifest.records
        if record.path not in bad
        for scene in scenes_of(record, known.get(record.sha256, ()))
    ]
    return replace(manifest, records=tuple(records), unreadable=(*manifest.unreadable, *unreadable))


def scenes_of(record: MediaRecord, cuts: tuple[float, ...]) -> Iterator[MediaRecord]:
    """Yields a film's scenes as records; the film itself if it has no cut.

    Worked example: 48 frames at 24 Hz with a cut at 1.5 s are 36 frames from 0 to 1.5 s and 12 from then on.

    Args:
        record: Of the whole film.
        cuts: Rising seconds after its beginning.
    """
    inside = [seconds for seconds in cuts if 0 < seconds < record.seconds]
    if not inside:
        yield record
        return
    for start, end in zip([0.0, *inside], [*inside, None], strict=True):
        length = (record.seconds if end is None else end) - start
        frames = max(1, int(length * record.fps + _FRAME_TOLERANCE))
        yield replace(
            record, start_seconds=start, end_seconds=end, frames=frames, seconds=frames / record.fps
        )


def _cuts_of(path: Path, threshold: float) -> tuple[float, ...] | DataError:
    try:
        return find_cuts(path, threshold=threshold)
    except DataError as error:
        return error


def _read(cache: Path | None, threshold: float) -> dict[str, tuple[float, ...]]:
    """Returns the cuts by content; none if there is no file, or another version or threshold made it."""
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["found_by"] != _FOUND_BY or content["threshold"] != threshold:
            return {}
        return {sha: tuple(map(float, cuts)) for sha, cuts in content["cuts"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("cache of scenes is unreadable and is made anew: file=%s error=%s", cache, error)
        return {}


def _write(
    cache: Path | None,
    threshold: float,
    cuts: Mapping[str, tuple[float, ...]],
    *,
    before: Mapping[str, tuple[float, ...]],
) -> None:
    if cache is None or cuts == before:
        return
    content = {"found_by": _FOUND_BY, "threshold": threshold, "cuts": cuts}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(content))
    except OSError as error:
        _log.warning(
            "cache of scenes is not written, the next run looks again: file=%s error=%s", cache, error
        )
