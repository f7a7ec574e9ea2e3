"""What latents there are: a `.precomputed` folder becomes a `Manifest` of clips that can be trained on.

Owns finding entries and the checks that need no tensor: partner files, fingerprints, lengths that fit each
other. Reads headers only (of ltx-trainer's files, which have none, the whole file). Called before training;
`latent_dataset.py` reads the tensors.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiprod_ds import progress
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    FOREIGN_SUFFIX,
    LATENTS,
    PRECOMPUTED,
    SUFFIX,
    EntryFile,
    Header,
    LatentShape,
    default_folder,
    entry_name,
    find_entry,
    read_header,
    split_name,
    unnumbered,
)
from aiprod_ds.data.manifest import Manifest, Unreadable, read_table
from aiprod_ds.decode.record import SCENE_MARK, MediaRecord
from aiprod_ds.errors import DataError
from aiprod_ds.shards.reader import ShardReader

_DURATION_TOLERANCE_SECONDS = 0.1  # more than two latents of any published audio VAE
_MEDIA = "media_sha256"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentNeeds:
    """What a run asks of its latents.

    Attributes:
        strides: Of the video VAE, to know the pixels of entries that do not say them.
        with_audio: Whether every clip needs audio latents.
        fingerprints: What returns that of the encoder that the run names, by source; asked for only where an
            entry has one, since it reads all weights. A source that is missing here is not checked.
    """

    strides: ModelStrides
    with_audio: bool = False
    fingerprints: Mapping[str, Callable[[], str]] = field(default_factory=dict)


def scan_latents(source: Path | ShardReader, needs: LatentNeeds) -> Manifest:
    """Returns the clips of `source` whose files are complete and fit each other; the others are listed in
    `unreadable`.

    A clip's record states the frames, rate and size of its media where its entries do, so that buckets choose
    as they did when it was encoded; for ltx-trainer's entries, those of its latents.

    Args:
        source: A folder with `latents/`, a folder of media with `.precomputed/` in it or its latents beside
            it (`default_folder`), or a table in such a folder, whose rows choose the clips; or shards of
            latents.
        needs: What a clip must have, or it counts as unreadable.

    Raises:
        DataError: If there are no latents, the table is malformed, or an entry was made by another encoder.
    """
    root = _root(source)
    found = _entries(root)
    is_folder = isinstance(source, ShardReader) or source.is_dir()
    wanted = list(found) if is_folder else _of_rows(Path(str(source)), found)
    reader = _ClipReader(root=root, needs=needs)
    files: dict[str, tuple[str, ...]] = {}
    records: list[MediaRecord] = []
    unreadable: list[Unreadable] = []
    for clip in progress.steps(wanted, f"reading the latents of {root}:", len(wanted)):
        known = (
            clip if clip in found else str(Path(clip).with_suffix(""))
        )  # ltx-trainer leaves the suffix of the media out
        try:
            records.append(reader.record(known, found.get(known, [])))
            files[known] = tuple(reader.opened)
        except _UnusableError as error:
            unreadable.append(Unreadable(path=clip, reason=str(error)))
    if reader.unchecked:
        _log.warning(
            "latents without fingerprint are not compared with the encoders: folder=%s files=%d",
            root,
            reader.unchecked,
        )
    if isinstance(root, ShardReader):
        manifest = Manifest(root=Path(root.address), records=tuple(records), packed=root)
    else:
        manifest = Manifest(root=root, records=tuple(records))
    named = frozenset(reader.named)
    return replace(manifest, unreadable=tuple(unreadable), files=files, named=named)


def _of_rows(table: Path, found: Mapping[str, object]) -> list[str]:
    """Returns the clips of the rows; a row of a film that was cut stands for its scenes."""
    scenes: dict[str, list[str]] = {}
    for clip in found:
        film, mark, _ = clip.rpartition(SCENE_MARK)
        if mark:
            scenes.setdefault(film, []).append(clip)
    rows = [listed.path for listed in read_table(table)]
    return [clip for path in rows for clip in ([path] if path in found else scenes.get(path, [path]))]


class _UnusableError(ValueError):
    """A clip cannot be trained on; says why, without its name."""


def _root(source: Path | ShardReader) -> Path | ShardReader:
    if isinstance(source, ShardReader):
        source.require_kind(LATENTS)
        return source
    return latents_root(source)


def latents_root(source: Path) -> Path:
    """Returns the folder of the latents that `scan_latents` finds for a folder or a table.

    Raises:
        DataError: If there is none.
    """
    folder = source if source.is_dir() else source.parent
    for root in (folder, folder / PRECOMPUTED, default_folder(folder)):
        if (root / LATENTS).is_dir():
            return root
    raise DataError(
        f"{source}: must be a folder with {LATENTS}/ or {PRECOMPUTED}/{LATENTS}/, or the media or manifest "
        f"of {default_folder(folder)}/{LATENTS}/, got none. "
        "Run `aiprod-ds encode` first."
    )


def _entries(root: Path | ShardReader) -> dict[str, list[LatentShape | None]]:
    """Returns the shapes of every clip, in the order of `latent_names`."""
    found: dict[str, list[LatentShape | None]] = {}
    for name in latent_names(root):
        clip, shape = split_name(name)
        found.setdefault(clip, []).append(shape)
    return found


def latent_names(root: Path | ShardReader) -> list[str]:
    """Returns the names of all latents without folder and suffix: of a folder sorted, of shards as they were
    packed."""
    if isinstance(root, ShardReader):
        first, last = f"{LATENTS}/", SUFFIX
        packed = (name for name in root.members if name.startswith(first) and name.endswith(last))
        return [name.removeprefix(first).removesuffix(last) for name in packed]
    folder = root / LATENTS
    names = {
        path.relative_to(folder).as_posix()[: -len(path.suffix)]
        for path in folder.rglob("*")
        if _is_entry(path)
    }
    return sorted(names)


def _is_entry(path: Path) -> bool:
    return path.suffix in (SUFFIX, FOREIGN_SUFFIX)


@dataclass(slots=True, kw_only=True)
class _ClipReader:
    """Reads the headers of one clip after the other and compares them with those before."""

    root: Path | ShardReader
    needs: LatentNeeds
    unchecked: int = 0
    opened: list[str] = field(default_factory=list)  # of the last clip
    named: set[str] = field(default_factory=set)  # see `Manifest.named`
    _firsts: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def record(self, clip: str, shapes: list[LatentShape | None]) -> MediaRecord:
        self.opened.clear()
        if not shapes:
            raise _UnusableError(f"{LATENTS} are missing")
        records = {self._entry(clip, shape) for shape in shapes}
        self._condition(clip)
        if len(records) > 1:
            raise _UnusableError(
                "its shapes were encoded from different media, or one of them by ltx-trainer"
            )
        return records.pop()

    def _entry(self, clip: str, shape: LatentShape | None) -> MediaRecord:
        name = entry_name(clip, shape)
        video = self._header(LATENTS, name)
        latent_CFHW = _shape_of(video, "latents", dimensions=(4,), where=LATENTS)
        self._same(f"channels of {LATENTS}", latent_CFHW[:1], name)
        if _MEDIA not in video.metadata:
            self.named.add(clip)
        record = _record(clip, name, video, latent_CFHW, self.needs.strides)
        if self.needs.with_audio:
            audio = self._header(AUDIO_LATENTS, name)
            latent = _shape_of(audio, "latents", dimensions=(2, 3), where=AUDIO_LATENTS)
            frames, fps = record.frames if shape is None else shape.frames, _number(video, "fps")
            _check_duration(audio, seconds=frames / fps)
            # Clips of one bucket are stacked; at their own rates, equal frames last differently.
            resampled = "" if shape is None or shape.frame_rate_hz is None else f" at {fps:g} Hz"
            self._same(f"length of {AUDIO_LATENTS} of {frames} frames{resampled}", latent, name)
        return record

    def _condition(self, clip: str) -> None:
        header = self._header(CONDITIONS, clip)
        for name, shape in sorted(header.shapes.items()):
            self._same(f"{unnumbered(name)} of {CONDITIONS}", shape, clip)
        for name, dimensions in (("prompt_embeds", 2), ("prompt_attention_mask", 1)):
            _shape_of(header, name, dimensions=(dimensions,), where=CONDITIONS)

    def _header(self, source: str, name: str) -> Header:
        path = find_entry(self.root, source, name)
        if path is None:
            raise _UnusableError(f"{source}/{name}{SUFFIX} is missing")
        try:
            header = read_header(path)
        except DataError as error:
            raise _UnusableError(str(error)) from error
        self._check_fingerprint(header, source, path)
        self.opened.append(f"{source}/{name}{path.suffix}")
        return header

    def _check_fingerprint(self, header: Header, source: str, path: EntryFile) -> None:
        ask, found = self.needs.fingerprints.get(source), header.metadata.get("fingerprint")
        if ask is None:
            return
        if found is None:
            self.unchecked += 1
        elif found != (expected := ask()):
            raise DataError(
                f"{path}: must come from the encoder that the configuration names ({expected[:12]}), got "
                "one with fingerprint "
                f"{found[:12]}. Name the encoder that made it, or encode again into another folder."
            )

    def _same(self, what: str, shape: tuple[int, ...], name: str) -> None:
        first, other = self._firsts.setdefault(what, (shape, name))
        if shape != first:
            raise _UnusableError(f"{what} must be {list(first)} as in {other}, got {list(shape)}")


def _record(
    clip: str, name: str, header: Header, latent_CFHW: tuple[int, ...], strides: ModelStrides
) -> MediaRecord:
    if _MEDIA in header.metadata:
        return MediaRecord(
            path=clip,
            sha256=header.metadata[_MEDIA],
            frames=int(_number(header, "media_frames")),
            fps=_number(header, "media_fps"),
            height=int(_number(header, "media_height")),
            width=int(_number(header, "media_width")),
            seconds=_number(header, "media_seconds"),
        )
    fps = _number(header, "fps")
    _, latent_frames, latent_height, latent_width = latent_CFHW
    frames = 1 + (latent_frames - 1) * strides.temporal
    return MediaRecord(
        path=clip,
        sha256=hashlib.sha256(
            name.encode()
        ).hexdigest(),  # the media is not at hand; its name decides who is held out
        frames=frames,
        fps=fps,
        height=latent_height * strides.spatial,
        width=latent_width * strides.spatial,
        seconds=frames / fps,
    )


def _shape_of(header: Header, name: str, *, dimensions: tuple[int, ...], where: str) -> tuple[int, ...]:
    shape = header.shapes.get(name)
    if shape is None or len(shape) not in dimensions:
        expected = " or ".join(map(str, dimensions))
        got = "none" if shape is None else str(list(shape))
        raise _UnusableError(f"{where} must hold {name} of {expected} dimensions, got {got}")
    return shape


def _number(header: Header, name: str) -> float:
    text = header.metadata.get(name)
    try:
        number = float(text or "")
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise _UnusableError(f"{name} must be stated as a positive number, got {text}")
    return number


def _check_duration(audio: Header, *, seconds: float) -> None:
    duration = _number(audio, "duration")
    if abs(duration - seconds) > _DURATION_TOLERANCE_SECONDS:
        raise _UnusableError(
            f"{AUDIO_LATENTS} must last {seconds:.3f} s as its video does, got {duration:.3f} s"
        )
