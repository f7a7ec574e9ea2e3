"""The list of a run's clips: what is a change and what is not, its form, and that it is small and quick."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.clip_changes import changes, in_words
from aiprod_ds.data.clip_list import (
    ClipList,
    Fingerprint,
    Listing,
    list_facts,
    list_files,
    own_fingerprint,
)
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import (
    CONDITIONS,
    EMPTY_PROMPT,
    LATENTS,
    LatentShape,
    entry_path,
    write_entry,
)
from aiprod_ds.data.manifest import Manifest, Unreadable, holdout
from aiprod_ds.data.scenes import scenes_of
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError

NOWHERE = Path("nowhere")
SHAPE = LatentShape(frames=5, height=64, width=64)


def _record(number: int, **facts: Any) -> MediaRecord:
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    usual = {"frames": 24, "fps": 24.0, "height": 36, "width": 64, "seconds": 1.0}
    return MediaRecord(**{"path": f"{number:06d}.mp4", "sha256": sha256, **usual, **facts})


def _list(
    *records: MediaRecord,
    held_out: tuple[MediaRecord, ...] = (),
    by: Fingerprint = "auto",
    **manifest: Any,
) -> ClipList:
    train = Manifest(root=NOWHERE, records=records, **manifest)
    validation = replace(train, records=held_out, unreadable=(), ignored=())
    return list_files(Listing(train=train, validation=validation, by=by), selection={})


def _change(before: ClipList, now: ClipList) -> str:
    return in_words(changes(before, now))


FOUR = tuple(_record(number) for number in range(4))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"rotation_degrees": 90}, "rotation_degrees None -> 90"),
        ({"crop": (1, 0, 0, 0)}, "crop None -> [1, 0, 0, 0]"),
        ({"frames": 23, "seconds": 23 / 24}, f"frames 24 -> 23, seconds 1.0 -> {23 / 24}"),
        ({"sha256": "0" * 64}, "another content"),
    ],
)
def test_what_was_probed_counts(facts: dict[str, Any], words: str) -> None:
    now = _list(FOUR[0], replace(FOUR[1], **facts), *FOUR[2:])
    assert _change(_list(*FOUR), now) == f"training: 1 altered (000001.mp4: {words})"


@pytest.mark.parametrize(
    "facts",
    [
        {"caption": "another"},
        {"audio_path": "other.wav", "audio_sha256": "1" * 64, "audio_rate_hz": 48_000},
        {"audio_peak": 0.5, "audio_clipped": 3, "audio_dc": 0.1},
    ],
)
def test_what_pictures_are_not_trained_on_does_not_count(facts: dict[str, Any]) -> None:
    assert _list(FOUR[0], replace(FOUR[1], **facts), *FOUR[2:]) == _list(*FOUR)


def test_the_sound_counts_where_it_is_what_is_trained_on() -> None:
    sounds = tuple(replace(clip, audio_rate_hz=44_100, audio_channels=2) for clip in FOUR)
    before = _list(*sounds, medium="sound")
    now = _list(replace(sounds[0], audio_channels=1), *sounds[1:], medium="sound")
    assert _change(before, now) == "training: 1 altered (000000.mp4: audio_channels 2 -> 1)"


def test_ten_names_and_a_count_are_told() -> None:
    clips = tuple(_record(number) for number in range(30))
    words = _change(_list(*clips), _list(*clips[15:]))
    assert words.startswith("training: 15 lost (000000.mp4; 000001.mp4; ")
    assert words.endswith("000009.mp4; and 5 more); 30 of 30 indices stand for another clip")


def test_a_clip_that_cannot_be_read_any_more_is_lost_with_the_reason() -> None:
    now = _list(
        FOUR[0],
        FOUR[3],
        unreadable=(Unreadable(path=FOUR[1].path, reason="is missing: there is no such file"),),
        ignored=(Unreadable(path=FOUR[2].path, reason="hidden"),),
    )
    assert _change(_list(*FOUR), now) == (
        "training: 2 lost (000001.mp4: unreadable now: is missing: there is no such file; 000002.mp4: "
        "ignored now: hidden); 3 of 4 indices stand for another clip"
    )


def test_scenes_are_clips_of_their_own() -> None:
    scenes = tuple(scenes_of(_record(7, frames=48, seconds=2.0), (0.5,)))
    before = _list(FOUR[0], *scenes)
    now = _list(FOUR[0], scenes[1], unreadable=(Unreadable(path=scenes[0].path, reason="is cut off"),))
    assert _change(before, now) == (
        f"training: 1 lost ({scenes[0].name}: unreadable now: is cut off); 2 of 3 indices stand for another "
        "clip"
    )


def test_a_row_twice_is_not_the_row_once() -> None:
    """A table may name a clip more than once, to have it more often."""
    twice = _list(*FOUR, FOUR[0])
    assert _change(_list(*FOUR), twice) == (
        "training: 1 added (000000.mp4); 1 of 5 indices stand for another clip"
    )
    assert changes(twice, _list(*FOUR, FOUR[0])) == ()


def test_another_holdout_is_a_change_of_both_parts() -> None:
    manifest = Manifest(root=NOWHERE, records=FOUR)
    before, now = (
        _list(*train.records, held_out=validation.records)
        for train, validation in (holdout(manifest, fraction=0.25, seed=seed) for seed in (0, 1))
    )
    words = _change(before, now)
    assert ": was in held out" in words
    assert ": now in held out" in words
    assert ": was in training" in words


def test_marks_of_two_kinds_are_not_compared() -> None:
    before, now = _list(*FOUR), _list(*FOUR, by="size")
    assert before.sha256 != now.sha256
    assert changes(before, now) == ()
    assert _change(before, _list(*FOUR[:3], by="size")) != ""


def test_two_folders_with_the_same_names_are_told_apart() -> None:
    other = replace(FOUR[0], sha256="0" * 64)
    before, now = _list(*FOUR, held_out=(other,)), _list(*FOUR[1:], held_out=(other,))
    assert _change(before, now) == ("training: 1 lost (000000.mp4); 4 of 4 indices stand for another clip")


def test_a_list_is_read_as_it_was_made() -> None:
    clips = _list(*FOUR, replace(FOUR[0], path="odd \udce4\n名.mp4"), held_out=FOUR[:1])
    found = ClipList.read(clips.compressed, where="here")
    assert found == clips
    assert list(found.entries()) == list(clips.entries())
    assert (found.num_training, found.num_held_out) == (5, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(b"[]\n"),
        gzip.compress(b'{"format": 2, "by": "content", "selection": {}}\n'),
        gzip.compress(b'{"format": 1, "by": "content", "selection": {}}\n{"a": 1}\n'),
        gzip.compress(b'{"format": 1, "by": "content", "selection": {}}\n[7, "a"]\n'),
        _list(*FOUR).compressed[:-20],
    ],
    ids=["nothing", "text", "empty", "no header", "format", "no entries", "short entry", "cut off"],
)
def test_what_is_no_list_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="here: must be a list of clips"):
        ClipList.read(content, where="here")


class _Said(list[int]):
    fingerprint = "of the attribute"


class _Computed(list[int]):
    def fingerprint(self) -> int:
        return 7


def test_own_datasets_say_what_they_can() -> None:
    loaders: list[Any] = [DataLoader(items) for items in (_Said([1]), [1])]  # type: ignore[arg-type]
    datasets: list[Any] = [[1], _Said(), _Computed(), *loaders]
    said = [own_fingerprint(each) for each in datasets]
    assert said == [None, "of the attribute", "7", "of the attribute", None]
    clips = [ClipFacts(name=f"dataset[{i}]", frames=9, seconds=1.0, height=8, width=8) for i in range(3)]
    before = list_facts(clips, clips[:1], selection={}, fingerprints={"dataset.fingerprint": "a"})
    assert changes(before, ClipList.read(before.compressed, where="")) == ()
    other = list_facts(clips, clips[:1], selection={}, fingerprints={"dataset.fingerprint": "b"})
    assert _change(before, other) == (
        "beside the clips: 1 altered (dataset.fingerprint: another fingerprint)"
    )
    longer = [replace(clips[0], frames=10), *clips[1:], replace(clips[0], name="dataset[3]")]
    grown = list_facts(longer, clips[:1], selection={}, fingerprints={"dataset.fingerprint": "a"})
    assert _change(before, grown) == (
        "training: 1 added (dataset[3]), 1 altered (dataset[0]: frames 9 -> 10); 1 of 4 indices stand for "
        "another clip"
    )


# Latents


def _write(root: Path, clip: str, *, value: float = 0.0, channels: int = 64) -> None:
    facts = {"media_sha256": f"sha of {clip}", "fps": "24.0", "fingerprint": "f"}
    facts |= {"media_frames": "5", "media_fps": "24.0", "media_seconds": "0.2"}
    facts |= {"media_height": "64", "media_width": "64"}
    latents = torch.full((channels, 3, 16, 16), value).bfloat16()
    write_entry(entry_path(root, LATENTS, f"{clip}@{SHAPE.tag}"), {"latents": latents}, facts)
    prompt = {"prompt_embeds": torch.zeros(2, 3), "prompt_attention_mask": torch.ones(2)}
    write_entry(entry_path(root, CONDITIONS, clip), prompt, {})


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    root = tmp_path / "latents_of_clips"
    for clip in ("a.mp4", "deep/b.mp4", "c.mp4"):
        _write(root, clip)
    (root / EMPTY_PROMPT).write_bytes(b"empty")
    return root


def _listed(root: Path, by: Fingerprint = "auto", *, beside: bool = True) -> ClipList:
    found = scan_latents(root, LatentNeeds(strides=ModelStrides(spatial=4, temporal=2)))
    assert len(found.records) == 3
    held_out = replace(found, records=found.records[:1])
    listing = Listing(
        train=replace(found, records=found.records[1:]),
        validation=held_out,
        by=by,
        beside=(EMPTY_PROMPT,) if beside else (),
    )
    return list_files(listing, selection={})


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _latent_of(root: Path, clip: str) -> Path:
    return entry_path(root, LATENTS, f"{clip}@{SHAPE.tag}")


def _encoded_again(root: Path) -> None:
    before = _latent_of(root, "c.mp4").stat().st_size
    _write(root, "c.mp4", value=1.0)
    assert _latent_of(root, "c.mp4").stat().st_size == before > 3 * (16 << 10), "sampled, not read whole"


def _another_caption(root: Path) -> None:
    _flip(entry_path(root, CONDITIONS, "c.mp4"), -1)


def _one_byte(root: Path) -> None:
    _flip(_latent_of(root, "c.mp4"), -(20 << 10))  # between the samples


def _touched(root: Path) -> None:
    os.utime(_latent_of(root, "c.mp4"), ns=(1, 1))


ALTERED = "training: 1 altered (c.mp4: another content)"
LATER = "training: 1 altered (c.mp4: another time of the last change)"


@pytest.mark.parametrize(
    ("by", "change", "words"),
    [
        ("auto", _encoded_again, ALTERED),
        ("auto", _another_caption, ALTERED),
        ("auto", _touched, ""),
        ("content", _one_byte, ALTERED),
        ("content", _touched, ""),
        ("time", _touched, LATER),
        ("size", _encoded_again, ""),
    ],
)
def test_latents_are_compared_as_the_setting_says(
    latents: Path, by: Fingerprint, change: Callable[[Path], None], words: str
) -> None:
    before = _listed(latents, by)
    assert before.by == ("samples" if by == "auto" else by)
    assert _listed(latents, by) == before
    change(latents)
    assert _change(before, _listed(latents, by)) == words


def test_the_empty_caption_counts_where_it_is_trained_on(latents: Path) -> None:
    before, without = _listed(latents), _listed(latents, beside=False)
    _flip(latents / EMPTY_PROMPT, 0)
    assert _change(before, _listed(latents)) == (
        f"beside the clips: 1 altered ({EMPTY_PROMPT}: another content)"
    )
    assert _listed(latents, beside=False) == without


def test_latents_in_another_place_are_the_same(latents: Path, tmp_path: Path) -> None:
    before = _listed(latents)
    shutil.copytree(latents, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    assert _listed(tmp_path / "copy") == before


# How much it takes


@pytest.mark.slow
def test_a_hundred_thousand_clips_take_two_seconds_and_four_megabytes(tmp_path: Path) -> None:
    draws = random.Random(0)
    lengths = [draws.randint(24, 2000) for _ in range(100_000)]
    records = tuple(
        replace(
            _record(number, frames=frames, seconds=frames / 24), path=f"day_{number % 97}/clip_{number}.mp4"
        )
        for number, frames in enumerate(lengths)
    )
    train, validation = Manifest(root=tmp_path, records=records), Manifest(root=tmp_path, records=())
    listing = Listing(train=train, validation=validation)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        clips = list_files(listing, selection={})
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2.0
    assert len(clips.compressed) < 4_000_000
    some = replace(listing, train=replace(train, records=records[:10_000]))  # watched, it takes far longer
    tracemalloc.start()
    try:
        of_some = list_files(some, selection={})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(of_some.compressed) + 1_000_000, "clips are written one by one"
