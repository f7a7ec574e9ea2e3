"""Encodes clips and captions for the diffusion trainer: `run_encoding` is what `aiprod-ds encode` calls, on
any number of ranks.

Owns the order of work, what a failing clip means and the result. Every entry is written whole by one rank and
depends neither on the number of ranks nor on what else is encoded: clips go through the encoders one by one.
A killed run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console

from aiprod_ds import progress
from aiprod_ds.bad_disk import disk_required, fault_in_words
from aiprod_ds.codec.tiling import check_tiles
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.data.latents import (
    EMPTY_PROMPT,
    entry_path,
    remove_parts,
    write_entry,
    write_found_buckets,
)
from aiprod_ds.data.treatment import odd_sound_notes
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.encode.media import read_pictures
from aiprod_ds.encode.packing import pack_encoded
from aiprod_ds.encode.reader import SOUND_LEVEL, Failure, Loaded, MediaReader, load_tasks
from aiprod_ds.encode.stages import CaptionStage, Entry, MediaStage, Stage
from aiprod_ds.encode.tasks import Task, is_done, pending
from aiprod_ds.encode.work import Work, count_clips, plan_work
from aiprod_ds.engine import dist
from aiprod_ds.errors import DataError, EngineError
from aiprod_ds.files import write_atomically
from aiprod_ds.report.progress_line import shown_on

GROUP_TIMEOUT_SECONDS = 7 * 24 * 3600.0
"""For `dist.process_group`: a rank that is done waits for the others longer than any run takes."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSummary:
    """What a run did, over all ranks.

    Attributes:
        output_dir: Where the entries are.
        written: Entries written, by source.
        present: Entries that were there, by source.
        failures: What could not be encoded, and why.
        too_short: Clips that no shape takes.
        failures_file: Holds `failures` and `too_short`.
        seconds: Wall time.
        notes: What is done with media that a clip is not like, in words.
        shards: Where the entries were packed, in words; empty if they were not.
    """

    output_dir: Path
    written: Mapping[str, int]
    present: Mapping[str, int]
    failures: tuple[Failure, ...]
    too_short: tuple[str, ...]
    failures_file: Path
    seconds: float
    notes: tuple[str, ...] = ()
    shards: str = ""


def run_encoding(
    config: EncodeConfig, *, source: str = "configuration", console: Console | None = None
) -> EncodeSummary:
    """Encodes everything that is not there yet and returns the summary, the same on every rank. Collective.

    Args:
        config: What to encode.
        source: How messages name the configuration.
        console: Where the main rank draws progress; None draws none.

    Raises:
        ConfigError: If a model cannot be built or used, or tiles change the latents too much.
        PlanError: If the media are missing or too many of them unreadable, or the folder cannot be written.
        DataError: If more clips fail than may, or entries of another encoder are in the way.
        EngineError: If an entry cannot be written or a device has too little memory.
    """
    began = time.monotonic()
    work = dist.from_main(lambda: plan_work(config, source))
    dist.from_main(lambda: _begin(work))
    result = _Result(failures=list(work.refused))
    device = dist.choose_device()
    shown = console if dist.is_main() else None
    if config.text is not None:
        captions = CaptionStage(config.text, seed=config.seed, device=device)
        dist.from_main(lambda: _write_empty_prompt(captions, work.output))
        result.add(_encode(captions, work.captions, work, config, shown))
        del captions
    media = MediaStage(config, device=device)
    dist.from_main(lambda: _check_tiling(media, work, config))
    result.add(_encode(media, work.media, work, config, shown))
    summary = EncodeSummary(
        output_dir=work.output,
        written=result.written,
        present=result.present,
        failures=tuple(result.failures),
        too_short=work.too_short,
        failures_file=work.output / _failures_name(Path(config.data.media)),
        seconds=time.monotonic() - began,
        notes=(*work.notes, *odd_sound_notes(result.odd_sounds)),
    )
    dist.from_main(lambda: _write_failures(summary))
    _require_few_failures(summary, work, config)
    return replace(summary, shards=dist.from_main(lambda: pack_encoded(config, work.output)))


@dataclass(slots=True, kw_only=True)
class _Result:
    """What was done."""

    written: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    odd_sounds: list[MediaRecord] = field(default_factory=list)

    def add(self, other: _Result) -> None:
        self.written += other.written
        self.present += other.present
        self.failures += other.failures
        self.odd_sounds += other.odd_sounds


def _begin(work: Work) -> None:
    try:
        remove_parts(work.output)
        write_found_buckets(work.output, work.found_buckets)
    except OSError as error:
        words = fault_in_words(error, work.output)
        raise EngineError(
            f"{work.output}: must be writable, got {words}. Name another data.output_dir."
        ) from error


def _write_empty_prompt(stage: CaptionStage, output: Path) -> None:
    path, entry = output / EMPTY_PROMPT, stage.empty_prompt()
    if not is_done(path, entry.metadata):
        _save(path, entry)


def _check_tiling(stage: MediaStage, work: Work, config: EncodeConfig) -> None:
    tiling = config.video.tiling
    if tiling is None or not work.media:
        return
    task = work.media[0]  # of the largest shape
    assert task.shape is not None, "clips have shapes"
    video_CTHW = read_pictures(work.root, task.record, task.shape, background=config.data.alpha_background)
    deviation = check_tiles(video_CTHW, tiling, whole=stage.video.encode_whole, tiled=stage.video.encode)
    _log.info(
        "tiles against whole encoding: deviation=%.3g allowed=%g clip=%s",
        deviation,
        tiling.max_deviation,
        task.name,
    )


def _encode(
    stage: Stage, tasks: Sequence[Task], work: Work, config: EncodeConfig, console: Console | None
) -> _Result:
    """Returns what all ranks did together. Collective."""
    todo = dist.from_main(lambda: pending(tasks, work.output, stage.encoders))
    wanted = Counter(source for task in tasks for source in task.sources)
    missing = Counter(source for task in todo for source in task.sources)
    own = _encode_own(stage, todo[dist.rank() :: dist.world_size()], work, config, console)
    together = _Result(present=wanted - missing)
    for part in dist.gather_objects(own):
        together.add(part)
    return together


def _encode_own(
    stage: Stage, tasks: Sequence[Task], work: Work, config: EncodeConfig, console: Console | None
) -> _Result:
    result = _Result()
    most = config.data.max_failed_fraction * work.num_clips
    silence = config.audio is not None and config.audio.missing_sound == "silence"
    reader = MediaReader(
        root=work.root,
        form=work.form,
        fill_with_silence=silence,
        background=config.data.alpha_background,
    )
    loads = load_tasks(tasks, reader, num_workers=config.data.num_workers)
    with shown_on(console), progress.counting(f"encoding {stage.title}", len(tasks)) as shown:
        for task, loaded in loads:
            failure = (
                loaded if isinstance(loaded, Failure) else _write(stage, task, loaded, work.output, result)
            )
            if failure is not None:
                _log.warning(
                    "clip failed: clip=%s what=%s reason=%s", failure.clip, failure.what, failure.reason
                )
                result.failures.append(failure)
                if count_clips(result.failures) > most:
                    break  # no use to go on; all ranks raise together at the end
            shown.advance(note=f"{len(result.failures)} failed" if result.failures else "")
    return result


def _write(stage: Stage, task: Task, loaded: Loaded, output: Path, result: _Result) -> Failure | None:
    try:
        for entry in stage.entries(task, loaded):
            _save(entry_path(output, entry.source, task.name), entry)
            result.written[entry.source] += 1
        result.odd_sounds += _odd_sounds(task, loaded)
    except DataError as error:
        return Failure.of(task, error)
    return None


def _odd_sounds(task: Task, loaded: Loaded) -> list[MediaRecord]:
    """Returns the task's record with what its sound is like, if that is odd; a sound in a file of its own was
    looked at as a whole before."""
    if SOUND_LEVEL not in loaded or task.record.audio_path is not None:
        return []
    peak, clipped, mean = loaded[SOUND_LEVEL].tolist()
    record = replace(task.record, audio_peak=peak, audio_clipped=int(clipped), audio_dc=mean)
    return [record] if odd_sound_notes([record]) else []


def _save(path: Path, entry: Entry) -> None:
    try:
        write_entry(path, entry.tensors, entry.metadata)
    except OSError as error:
        raise EngineError(
            f"{path}: must be writable, got {fault_in_words(error, path)}. Make room or name another "
            "data.output_dir; what is encoded stays."
        ) from error


def _failures_name(media: Path) -> str:
    # Tables side by side, such as train.csv and validation.csv, share one folder of entries.
    return "failures.json" if media.is_dir() else f"failures_{media.stem}.json"


def _write_failures(summary: EncodeSummary) -> None:
    document = {
        "failures": [asdict(failure) for failure in summary.failures],
        "too_short": list(summary.too_short),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # A name that is no UTF-8 holds lone surrogates, which JSON has as escapes.
    escaped = text.encode("utf-8", "backslashreplace").decode()
    with disk_required(summary.failures_file, "the list of failures"):
        summary.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(summary.failures_file, f"{escaped}\n")


def _require_few_failures(summary: EncodeSummary, work: Work, config: EncodeConfig) -> None:
    failed = count_clips(summary.failures)
    if failed <= config.data.max_failed_fraction * work.num_clips:
        return
    named = "; ".join(f"{failure.clip} ({failure.reason})" for failure in summary.failures[:5])
    more = f"; and {len(summary.failures) - 5} more" if len(summary.failures) > 5 else ""
    raise DataError(
        f"{config.data.media}: at most {config.data.max_failed_fraction:.0%} of the clips may fail, got "
        f"{failed} of "
        f"{work.num_clips}: {named}{more}. Repair these clips, or raise data.max_failed_fraction. "
        f"All failures are in {summary.failures_file}."
    )
