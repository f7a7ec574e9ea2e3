"""How the clips of a run differ from those that it had: what was added, lost, altered, renamed or put in
another order.

Owns the comparison of two lists and its words. What follows from a change is decided where a run is resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aiprod_ds.data.clip_list import BESIDE, HELD_OUT, TRAINING, ClipList, Entry
from aiprod_ds.decode.record import SCENE_MARK

_NAMED = 10
_OTHER_MARK = {"time": "another time of the last change", "facts": "another fingerprint"}
_PARTS = {TRAINING: "training", HELD_OUT: "held out", BESIDE: "beside the clips"}
_Key = tuple[str, int]  # a name, and how often it came before: a table may name a clip twice


@dataclass(frozen=True, slots=True, kw_only=True)
class PartChange:
    """What changed among the clips of one part; each entry is a name, with what is known of the change.

    Attributes:
        part: `training`, `held out` or `beside the clips`.
        added: Clips that were not there.
        lost: Clips that are not there any more, and why.
        altered: Clips of another content, size or shape.
        renamed: Clips of the same content under another name.
        reordered: Where the order of what stayed begins to differ; None if it does not.
        num_shifted: Indices that stand for another clip.
        num_indices: Of the longer list.
    """

    part: str
    added: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    reordered: str | None = None
    num_shifted: int = 0
    num_indices: int = 0

    @property
    def text(self) -> str:
        """The change in words: counts, and the first ten names of each kind."""
        found = [
            f"{len(names)} {verb} ({_some(names)})"
            for verb, names in (
                ("added", self.added),
                ("lost", self.lost),
                ("altered", self.altered),
                ("renamed", self.renamed),
            )
            if names
        ]
        found += [f"in another order ({self.reordered})"] if self.reordered else []
        shifted = f"; {self.num_shifted} of {self.num_indices} indices stand for another clip"
        return f"{self.part}: {', '.join(found)}{shifted if self.num_shifted else ''}"


def changes(before: ClipList, now: ClipList) -> tuple[PartChange, ...]:
    """Returns what changed, by part; nothing if both lists are of the same clips in the same order.

    Where the marks of the lists are of two kinds (`ClipList.by`), names, sizes and facts alone are compared.
    """
    if before.sha256 == now.sha256:
        return ()
    is_marked = before.by == now.by
    olds, news = _by_part(before, is_marked=is_marked), _by_part(now, is_marked=is_marked)
    names = {part: {entry.name for entry in entries} for part, entries in news.items()}
    old_names = {part: {entry.name for entry in entries} for part, entries in olds.items()}
    found = []
    for part in _PARTS:
        others = {_PARTS[other]: names[other] - old_names[other] for other in _PARTS if other != part}
        origins = {_PARTS[other]: old_names[other] - names[other] for other in _PARTS if other != part}
        change = _compare(
            part,
            olds[part],
            news[part],
            now.left_out,
            others=others,
            origins=origins,
            other_mark=_OTHER_MARK.get(now.by, "another content"),
        )
        found += [] if change is None else [change]
    return tuple(found)


def in_words(found: Iterable[PartChange]) -> str:
    """Returns all changes on one line."""
    return ". ".join(change.text for change in found)


def _by_part(clips: ClipList, *, is_marked: bool) -> dict[int, list[Entry]]:
    parts: dict[int, list[Entry]] = {part: [] for part in _PARTS}
    for entry in clips.entries():
        kept = entry
        if not is_marked:
            kept = Entry(part=entry.part, name=entry.name, num_bytes=entry.num_bytes, facts=entry.facts)
        parts[entry.part].append(kept)
    return parts


def _compare(
    part: int,
    old: Sequence[Entry],
    new: Sequence[Entry],
    left_out: Mapping[str, str],
    *,
    others: Mapping[str, set[str]],
    origins: Mapping[str, set[str]],
    other_mark: str,
) -> PartChange | None:
    olds, news = _keyed(old), _keyed(new)
    added = {key: entry for key, entry in news.items() if key not in olds}
    lost = {key: entry for key, entry in olds.items() if key not in news}
    renamed = _take_renamed(lost, added)
    stayed = [key for key in olds if key in news]
    altered = [
        f"{key[0]}: {words}"
        for key in stayed
        if (words := _difference(olds[key], news[key], other_mark)) is not None
    ]
    change = PartChange(
        part=_PARTS[part],
        added=tuple(_with(name, _place(name, origins, "was in")) for name, _ in added),
        lost=tuple(
            _with(name, left_out.get(_file_of(name)) or _place(name, others, "now in")) for name, _ in lost
        ),
        altered=tuple(altered),
        renamed=renamed,
        reordered=_reordered(stayed, [key for key in news if key in olds]),
        num_shifted=sum(one.name != two.name for one, two in zip(old, new, strict=False))
        + abs(len(old) - len(new)),
        num_indices=max(len(old), len(new)),
    )
    is_same = not (change.added or change.lost or change.altered or change.renamed or change.reordered)
    return None if is_same else change


def _keyed(entries: Sequence[Entry]) -> dict[_Key, Entry]:
    seen: Counter[str] = Counter()
    keyed: dict[_Key, Entry] = {}
    for entry in entries:
        keyed[entry.name, seen[entry.name]] = entry
        seen[entry.name] += 1
    return keyed


def _take_renamed(lost: dict[_Key, Entry], added: dict[_Key, Entry]) -> tuple[str, ...]:
    """Takes pairs of the same content out of both and returns them in words."""
    by_content: dict[tuple[str, int | None], list[_Key]] = {}
    for key, entry in added.items():
        if entry.mark:
            by_content.setdefault((entry.mark, entry.num_bytes), []).append(key)
    pairs = []
    for key, entry in list(lost.items()):
        same = by_content.get((entry.mark, entry.num_bytes))
        if same:
            target = same.pop(0)
            pairs.append(f"{key[0]} -> {target[0]}")
            del lost[key], added[target]
    return tuple(pairs)


def _difference(old: Entry, new: Entry, other_mark: str) -> str | None:
    """Returns how two entries of one name differ, in words; None if they do not."""
    found = []
    if None not in (old.num_bytes, new.num_bytes) and old.num_bytes != new.num_bytes:
        found.append(f"{old.num_bytes} -> {new.num_bytes} bytes")
    elif old.mark != new.mark:
        found.append(other_mark)
    for name in dict.fromkeys((*old.facts, *new.facts)):
        one, two = old.facts.get(name), new.facts.get(name)
        if one != two:
            found.append(f"{name} {one} -> {two}")
    return ", ".join(found) or None


def _reordered(old: Sequence[_Key], new: Sequence[_Key]) -> str | None:
    for one, two in zip(old, new, strict=True):
        if one != two:
            return f"{two[0]} comes before {one[0]}"
    return None


def _file_of(name: str) -> str:
    """Returns the path of a clip, which may be a scene of its file."""
    path, mark, _ = name.rpartition(SCENE_MARK)
    return path if mark else name


def _place(name: str, parts: Mapping[str, set[str]], words: str) -> str | None:
    return next((f"{words} {part}" for part, names in parts.items() if name in names), None)


def _with(name: str, reason: str | None) -> str:
    return name if reason is None else f"{name}: {reason}"


def _some(names: Sequence[str]) -> str:
    more = f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more
