"""The index of shards: where each file lies in them, how long it is, its hash, and what is known of it.

Owns the format (docs/file_formats.md, "Shards") and the checks of it. The index lies beside the shards as one
file, so that opening reads nothing else.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiprod_ds.errors import DataError
from aiprod_ds.shards.storage import INDEX, NoSuchFileError, Storage

SHARD_SUFFIX = ".tar"
_FORMAT = "aiprod_ds shards 1"
_MAX_INDEX_BYTES = 16 << 30  # of text; some fifty million files


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One packed file.

    Attributes:
        name: As it was under its folder.
        shard: Which of the index's shards holds it.
        offset: Of its first byte in the shard.
        size: Bytes.
        sha256: Of its bytes.
        facts: What is known of it, as JSON; empty if nothing is. Read with `known`, where it is wanted.
    """

    name: str
    shard: int
    offset: int
    size: int
    sha256: str
    facts: str = ""

    @property
    def known(self) -> Any:
        """What is known of it; None if nothing is."""
        return json.loads(self.facts) if self.facts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What shards hold.

    Attributes:
        kind: What the files are, such as `latents`.
        shards: Name and size of each.
        members: By name, in the order of the shards.
    """

    kind: str
    shards: tuple[tuple[str, int], ...]
    members: Mapping[str, Member]

    @classmethod
    def of(cls, kind: str, shards: Iterable[tuple[str, int]], members: Iterable[Member]) -> ShardIndex:
        """Returns the index of shards and members in order."""
        return cls(kind=kind, shards=tuple(shards), members={member.name: member for member in members})

    def to_bytes(self) -> bytes:
        """Returns the index as its file holds it; the same content always gives the same bytes."""
        header = {
            "format": _FORMAT,
            "kind": self.kind,
            "shards": [list(shard) for shard in self.shards],
            "members": len(self.members),
        }
        lines = [json.dumps(header, ensure_ascii=False)]
        for member in self.members.values():
            row = [member.name, member.shard, member.offset, member.size, member.sha256, member.known]
            lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
        return gzip.compress(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"), mtime=0)


def read_index(storage: Storage) -> ShardIndex:
    """Returns the index of the shards under an address, once it fits them.

    Raises:
        DataError: If there is none, it is damaged, or a shard is missing, of another size or unknown to it.
    """
    try:
        content = storage.read(INDEX)
    except NoSuchFileError as error:
        raise DataError(
            f"{storage.address}: shards must have {INDEX} beside them, got none. {_remedy(storage)}"
        ) from error
    try:
        index = _parse(content)
    except (ValueError, TypeError, KeyError, IndexError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{storage.address}/{INDEX}: must be a whole index of shards, got: {error}. {_remedy(storage)}"
        ) from error
    _require_fresh(storage, index)
    return index


def has_shards(names: Iterable[str]) -> bool:
    """Returns whether a folder of these files is one of shards."""
    return any(name == INDEX or name.endswith(SHARD_SUFFIX) for name in names)


def _parse(content: bytes) -> ShardIndex:
    lines = _lines(content)
    header = json.loads(next(lines, "null"))
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"no header of the format {_FORMAT!r}")
    shards = tuple((str(name), int(size)) for name, size in header["shards"])
    index = ShardIndex.of(str(header["kind"]), shards, (_member(line, shards) for line in lines))
    if len(index.members) != header["members"]:
        raise ValueError(f"{len(index.members)} files where {header['members']} are announced")
    return index


def _lines(content: bytes) -> Iterator[str]:
    inflate = zlib.decompressobj(wbits=31)
    text = inflate.decompress(content, _MAX_INDEX_BYTES)
    if not inflate.eof:
        raise ValueError("an end in the middle")
    return iter(text.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n"))


def _member(line: str, shards: tuple[tuple[str, int], ...]) -> Member:
    name, shard, offset, size, sha256, known = json.loads(line)
    if not (
        isinstance(name, str)
        and isinstance(sha256, str)
        and len(sha256) == 64
        and sha256.isalnum()
        and 0 <= shard < len(shards)
        and size >= 0
        and 0 <= offset <= shards[shard][1] - size
    ):
        raise ValueError(f"a row that lies in no shard: {line[:80]}")
    facts = "" if known is None else json.dumps(known, ensure_ascii=False, separators=(",", ":"))
    return Member(name=name, shard=shard, offset=offset, size=size, sha256=sha256, facts=facts)


def _require_fresh(storage: Storage, index: ShardIndex) -> None:
    sizes = storage.sizes()
    if sizes is None:  # what is read shows by its hash whether it is what was packed
        return
    found = {name: size for name, size in sizes.items() if name.endswith(SHARD_SUFFIX)}
    problems = [
        f"{name} of {found[name]} bytes in place of {size}" if name in found else f"no {name}"
        for name, size in index.shards
        if found.get(name) != size
    ]
    problems += [f"{name}, which it does not know" for name in sorted(found.keys() - dict(index.shards))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{storage.address}: the index must be that of the shards, got {', '.join(problems[:3])}{more}. "
            f"{_remedy(storage)}"
        )


def _remedy(storage: Storage) -> str:
    return f"If the shards are whole, make it with `aiprod-ds shard --index {storage.address}`."
