"""Packs files into tar shards with their index, and makes the index anew from shards.

Owns the shards' form: plain tar files, the names being those of the files, so that unpacking gives the folder
again; the same files always give the same bytes. Called by `aiprod_ds.data.packed.packing`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiprod_ds.bad_disk import disk_required
from aiprod_ds.errors import DataError
from aiprod_ds.shards.index import SHARD_SUFFIX, Member, ShardIndex
from aiprod_ds.shards.storage import INDEX, Storage

_BLOCK = tarfile.BLOCKSIZE
_COPIED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A file to pack.

    Attributes:
        name: In the shards.
        content: Its bytes, or the file that holds them.
        facts: What the index says of it, as JSON has it; None: nothing.
    """

    name: str
    content: bytes | Path
    facts: Mapping[str, object] | None = None


def write_shards(
    groups: Iterable[Sequence[PackedFile]], storage: Storage, *, kind: str, shard_bytes: int
) -> ShardIndex:
    """Writes shards and, when all are there, their index; returns it.

    Args:
        groups: Files that are read together, such as those of one clip; a group is never cut.
        storage: Holds nothing yet.
        kind: What the files are.
        shard_bytes: What a shard holds at most, if no single group is larger.

    Raises:
        DataError: If something lies there already, or a file cannot be read or written.
        DiskError: If the folder for temporary files takes no shard.
    """
    require_empty(storage)
    with disk_required(Path(tempfile.gettempdir()), "a shard, for a while"):
        return _write_shards(groups, storage, kind=kind, shard_bytes=shard_bytes)


def _write_shards(
    groups: Iterable[Sequence[PackedFile]], storage: Storage, *, kind: str, shard_bytes: int
) -> ShardIndex:
    shards: list[tuple[str, int]] = []
    members: list[Member] = []
    with tempfile.TemporaryDirectory(prefix="aiprod-ds-shards-") as folder:
        waiting = _Shard(Path(folder, "shard"), number=0)
        for group in groups:
            if waiting.members and waiting.size + _size(group) > shard_bytes:
                shards.append(waiting.finish(storage))
                members += waiting.members
                waiting = _Shard(Path(folder, "shard"), number=len(shards))
            for file in group:
                waiting.add(file)
        if waiting.members:
            shards.append(waiting.finish(storage))
            members += waiting.members
        else:
            waiting.close()
        index = ShardIndex.of(kind, shards, members)
        if len(index.members) != len(members):
            raise DataError(f"{storage.address}: every file must have a name of its own, got one twice.")
        _write_index(index, storage, Path(folder))
    return index


def index_shards(
    storage: Storage, *, kind_of: Callable[[Sequence[str]], str], facts_of: Callable[[str, Path], object]
) -> ShardIndex:
    """Makes the index of shards anew and writes it beside them: reads every shard once.

    Args:
        storage: Holds the shards.
        kind_of: Given all names, says what the files are.
        facts_of: Given a name and a file, says what is known of it; None: nothing.

    Raises:
        DataError: If there are no shards, or one is no tar.
        DiskError: If the folder for temporary files takes no shard.
    """
    sizes = storage.sizes()
    if sizes is None:
        raise DataError(f"{storage.address}: cannot be listed. Make the index where the shards were written.")
    shards = sorted((name, size) for name, size in sizes.items() if name.endswith(SHARD_SUFFIX))
    if not shards:
        raise DataError(f"{storage.address}: must hold shards ({SHARD_SUFFIX}), got none.")
    members: list[Member] = []
    with (
        disk_required(Path(tempfile.gettempdir()), "a shard, for a while"),
        tempfile.TemporaryDirectory(prefix="aiprod-ds-shards-") as folder,
    ):
        for number, (name, size) in enumerate(shards):
            local = Path(folder, "shard")
            _download(storage, name, size, local)
            members += _members_of(local, number, f"{storage.address}/{name}", facts_of)
        index = ShardIndex.of(kind_of([member.name for member in members]), shards, members)
        _write_index(index, storage, Path(folder))
    return index


def require_empty(storage: Storage) -> None:
    """Checks that nothing lies under an address.

    Raises:
        DataError: If something does.
    """
    found = sorted(storage.sizes() or ())
    if found:
        raise DataError(
            f"{storage.address}: must be empty, got {len(found)} files ({', '.join(found[:3])}). Name "
            "another place, or delete them."
        )


class _Shard:
    """A shard that is being written to a local file."""

    def __init__(self, path: Path, *, number: int) -> None:
        self._path = path
        self._number = number
        self._file: BinaryIO = path.open("wb")
        self.members: list[Member] = []
        self.size = 0

    def add(self, file: PackedFile) -> None:
        size = _size([file])
        # Nothing of the machine that packs: neither times nor owners.
        info = tarfile.TarInfo(file.name)
        info.size, info.mode = size, 0o644
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        offset, digest = self.size, hashlib.sha256()
        for block in _blocks(file.content):
            digest.update(block)
            self._write(block)
        if self.size - offset != size:
            raise DataError(f"{file.content!s}: must not change while it is packed. Pack again.")
        self._write(bytes(-size % _BLOCK))
        facts = "" if file.facts is None else json.dumps(file.facts, ensure_ascii=False)
        self.members.append(
            Member(
                name=file.name,
                shard=self._number,
                offset=offset,
                size=size,
                sha256=digest.hexdigest(),
                facts=facts,
            )
        )

    def finish(self, storage: Storage) -> tuple[str, int]:
        self._write(bytes(2 * _BLOCK))
        self.close()
        name = f"shard-{self._number:06d}{SHARD_SUFFIX}"
        storage.write(name, self._path)
        return name, self.size

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)


def _size(files: Sequence[PackedFile]) -> int:
    try:
        return sum(
            len(file.content) if isinstance(file.content, bytes) else file.content.stat().st_size
            for file in files
        )
    except OSError as error:
        raise DataError(f"{error.filename}: must be readable, got: {error.strerror}.") from error


def _blocks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    try:
        with content.open("rb") as file:
            while block := file.read(_COPIED_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"{content}: must be readable, got: {error.strerror}.") from error


def _write_index(index: ShardIndex, storage: Storage, folder: Path) -> None:
    path = folder / INDEX
    path.write_bytes(index.to_bytes())
    storage.write(INDEX, path)


def _download(storage: Storage, name: str, size: int, target: Path) -> None:
    with target.open("wb") as file:
        for start in range(0, size, _COPIED_BYTES):
            file.write(storage.read(name, start, min(_COPIED_BYTES, size - start)))


def _members_of(
    shard: Path, number: int, where: str, facts_of: Callable[[str, Path], object]
) -> list[Member]:
    members = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                content = archive.extractfile(info)
                if content is None:  # a folder or a link
                    continue
                copy = shard.with_name(f"member{Path(info.name).suffix}")
                digest = hashlib.sha256()
                with copy.open("wb") as file:
                    while block := content.read(_COPIED_BYTES):
                        digest.update(block)
                        file.write(block)
                known = facts_of(info.name, copy)
                facts = "" if known is None else json.dumps(known, ensure_ascii=False)
                members.append(
                    Member(
                        name=info.name,
                        shard=number,
                        offset=info.offset_data,
                        size=info.size,
                        sha256=digest.hexdigest(),
                        facts=facts,
                    )
                )
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{where}: must be a whole tar file, got: {error}. Pack it again.") from error
    return members
