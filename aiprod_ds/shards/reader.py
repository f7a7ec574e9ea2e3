"""The files of shards by name: their bytes, or a path for libraries that want one.

Owns what is read from where: of local shards a range of the tar, of remote ones the cache or a range of the
object. Never a whole shard: the sampler's order jumps through all of them, and a cache that is smaller than
the data would fetch each shard again and again. Every file is compared with its hash before it is used, once
a process and when it comes from afar. Usable in forks and picklable.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aiprod_ds.errors import DataError
from aiprod_ds.shards.cache import ShardCache
from aiprod_ds.shards.index import Member, ShardIndex
from aiprod_ds.shards.storage import Storage

_GAP_BYTES = 64 << 10  # between files that one request takes together; the request costs more
_MAX_REQUEST_BYTES = 64 << 20


class ShardReader:
    """Packed files.

    Args:
        storage: Where the shards are.
        index: Theirs.
        cache: For remote storages; None reads everything anew.
    """

    def __init__(self, storage: Storage, index: ShardIndex, *, cache: ShardCache | None = None) -> None:
        self.address = storage.address
        self._storage = storage
        self._index = index
        self._cache = cache if storage.is_remote else None
        self._verified: set[str] = set()
        self._fetched: dict[str, bytes] = {}

    @property
    def kind(self) -> str:
        """What the files are."""
        return self._index.kind

    @property
    def members(self) -> Mapping[str, Member]:
        """The files by name."""
        return self._index.members

    def __str__(self) -> str:
        return self.address

    def require_kind(self, kind: str) -> None:
        """Checks that the files are what somebody wants.

        Raises:
            DataError: If they are something else.
        """
        if self.kind != kind:
            raise DataError(f"{self.address}: must be shards of {kind}, got {self.kind}. Name others.")

    def where(self, name: str) -> str:
        """Returns how messages name a file."""
        return f"{self.address}/{name}"

    def find(self, name: str) -> PackedEntry | None:
        """Returns a file; None if there is none of that name."""
        return PackedEntry(reader=self, name=name) if name in self._index.members else None

    def fetch(self, names: Sequence[str]) -> None:
        """Brings files near that are to be read next, those that lie together with one request.

        Raises:
            DataError: As `read`.
        """
        self._fetched = {}
        if not self._storage.is_remote:
            return
        missing = []
        for name in names:
            member, data = self._index.members[name], self._cached(self._index.members[name])
            if data is None:
                missing.append(member)
            else:
                self._fetched[name] = data
        for span in _spans(missing):
            self._download(span)

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file, which are what was packed.

        Raises:
            DataError: If there is no such file, it cannot be read, or its bytes have another hash.
        """
        if name not in self._index.members:
            raise DataError(f"{self.where(name)}: must be in the index of the shards, got no such file.")
        member = self._index.members[name]
        if name not in self._fetched:
            data = self._cached(member)
            if data is None:
                self._download([member])
            else:
                self._fetched[name] = data
        return self._fetched.pop(name)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yields a path under which a file can be read inside the block; its name ends as the file's does.

        Raises:
            DataError: As `read`; one that the block raises names the file, not the path.
        """
        descriptor = os.memfd_create("clip", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as memory:
                memory.write(self.read(name))
            with tempfile.TemporaryDirectory(prefix="aiprod-ds-") as folder:
                path = Path(folder, PurePosixPath(name).name)
                path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
                try:
                    yield path
                except DataError as error:
                    raise DataError(str(error).replace(str(path), self.where(name))) from error
        finally:
            os.close(descriptor)

    def _cached(self, member: Member) -> bytes | None:
        """Returns a file that the cache holds rightly."""
        descriptor = None if self._cache is None else self._cache.open(member.sha256)
        if descriptor is None or self._cache is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            data = file.read()
        if member.name in self._verified or self._is_right(member, data):
            return data
        self._cache.drop(member.sha256)  # the disk has changed it
        return None

    def _download(self, span: Sequence[Member]) -> None:
        start, end = span[0].offset, span[-1].offset + span[-1].size
        shard, _ = self._index.shards[span[0].shard]
        data = self._storage.read(shard, start, end - start)
        for member in span:
            part = data[member.offset - start : member.offset - start + member.size]
            is_known = member.name in self._verified and not self._storage.is_remote
            if not is_known and not self._is_right(member, part):
                raise DataError(
                    f"{self.where(member.name)}: must be {member.size} bytes at {member.offset} of {shard} "
                    f"with the hash {member.sha256[:12]} of the index, got others: it is damaged. Pack it "
                    "again with `aiprod-ds shard`."
                )
            if self._cache is not None:
                self._cache.keep(member.sha256, part)
            self._fetched[member.name] = part

    def _is_right(self, member: Member, data: bytes) -> bool:
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            return False
        self._verified.add(member.name)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """One file of shards, where code of folders has a path."""

    reader: ShardReader
    name: str

    def __str__(self) -> str:
        return self.reader.where(self.name)

    @property
    def suffix(self) -> str:
        """The end of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def known(self) -> Any:
        """What the index says of it; reads nothing."""
        return self.reader.members[self.name].known

    def read(self) -> bytes:
        """See `ShardReader.read`."""
        return self.reader.read(self.name)


def _spans(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Yields members in groups that one request reads."""
    span: list[Member] = []
    for member in sorted(members, key=lambda member: (member.shard, member.offset)):
        if span and (
            member.shard != span[0].shard
            or member.offset - span[-1].offset - span[-1].size > _GAP_BYTES
            or member.offset + member.size - span[0].offset > _MAX_REQUEST_BYTES
        ):
            yield span
            span = []
        span.append(member)
    if span:
        yield span
