"""The manifest of a checkpoint: every file with its size and sha256, and the comparison that stands before
anything is read.

Owns `manifest.json`: writing it, reading it without trusting it, comparing a folder with it. Knows nothing
about what the files mean. It protects against damage and against names that lead elsewhere; whoever can write
the folder can also write its hashes. Called by `store.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from aiprod_ds import progress
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import file_sha256, read_text
from aiprod_ds.tensor_file import TensorFile, TensorFileError

FORMAT = 2
MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 64 << 20
_MAX_THREADS = 8
_TENSORS = ".safetensors"
_FILE_NAME = re.compile(
    r"\w[\w.-]*(/\w[\w.-]*)*", flags=re.ASCII
)  # no "..", no absolute path, nothing hidden
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


class HashCheck:
    """Compares files with their hashes in threads; what a caller makes of them meanwhile counts once
    `confirm` has returned.

    Hashing leaves the interpreter to other threads. A context: its end waits for the files that are being
    read.

    Args:
        spared_cores: Left to the caller, as far as there is more than one.
    """

    def __init__(self, *, spared_cores: int = 0) -> None:
        cores = (os.cpu_count() or 1) - spared_cores
        self._pool = ThreadPoolExecutor(max_workers=max(1, min(_MAX_THREADS, cores)))
        self._started: list[Future[None]] = []

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads; files that wait are not read any more."""
        self._pool.shutdown(cancel_futures=True)

    def start(self, path: Path, record: FileRecord) -> None:
        """Begins with a file, or lets it wait for those before it."""
        self._started.append(self._pool.submit(_require_content, path, record))

    def confirm(self) -> None:
        """Waits for all that was started.

        Raises:
            CheckpointError: If a file has another content or cannot be read.
        """
        for comparison in self._started:
            comparison.result()


def write_manifest(folder: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Describes every file below `folder`.

    Args:
        folder: Everything in it is whole.
        known: What the writers of some files, by path relative to it, say of them; those are not read again.

    Raises:
        CheckpointError: If a known file has another size, or there is something that `verify_folder` would
            refuse: a link, a device, an unusual name.
        OSError: If the disk fails.
    """
    names = sorted(name for name in _file_names(folder) if name != MANIFEST)
    files = {name: asdict(_describe(folder, name, (known or {}).get(name))) for name in names}
    (folder / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"
    )


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Returns what `folder` must hold, by path relative to it; opens no other file.

    Raises:
        CheckpointError: If the manifest is missing, damaged, of another format, or names something outside
            `folder`.
    """
    path = folder / MANIFEST
    manifest = read_mapping(path)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise CheckpointError(
            f"{path}: must be of format {FORMAT}, got {manifest.get('format')!r}. Take a whole checkpoint."
        )
    return {_own_name(path, name): _record(path, name, entry) for name, entry in files.items()}


def verify_folder(
    folder: Path, *, is_read: Callable[[str], bool] = lambda _: True, hashes: HashCheck | None = None
) -> dict[str, FileRecord]:
    """Compares `folder` with its manifest, sizes before hashes, and returns the manifest.

    Args:
        folder: A checkpoint or a base: what has a `manifest.json`.
        is_read: Whether the caller reads the file of this name; those that it does not read are not hashed.
        hashes: Is left to compare files of tensors, and the caller to confirm it; None: all is compared here.

    Raises:
        CheckpointError: If a file is missing, surplus, no regular file, of another size or of other content,
            cannot be read, or is of safetensors with a header that cannot be one.
    """
    expected = read_manifest(folder)
    try:
        _require_sizes(folder, expected)
        with progress.working(f"verifying {folder}"), HashCheck() as own:
            for name in filter(is_read, expected):
                (hashes if hashes and name.endswith(_TENSORS) else own).start(folder / name, expected[name])
            own.confirm()
        _require_headers(folder, expected)
    except OSError as error:
        raise _unreadable(error.filename or folder, error) from error
    return expected


def read_mapping(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of at most 64 MiB.

    Raises:
        CheckpointError: If it is missing, larger, a link, unreadable or something else.
    """
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: must be a file, got a link. Take a whole checkpoint.")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: must have at most {_MAX_JSON_BYTES} bytes, got {path.stat().st_size}."
            )
        value = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; this is not a whole checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a mapping, got {type(value).__name__}.")
    return value


def _describe(folder: Path, name: str, known: FileRecord | None) -> FileRecord:
    _own_name(folder, name)
    num_bytes = (folder / name).stat().st_size
    if known is None:
        return FileRecord(bytes=num_bytes, sha256=file_sha256(folder / name))
    if num_bytes != known.bytes:
        raise CheckpointError(
            f"{folder / name}: must have the {known.bytes} bytes that were written, got {num_bytes}."
        )
    return known


def _own_name(where: Path, name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where}: files must stay inside the checkpoint and have plain names, got {name!r}."
        )
    return name


def _record(path: Path, name: str, entry: object) -> FileRecord:
    num_bytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(num_bytes) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(
            f"{path}: {name} must have bytes and sha256, got {str(entry)[:200]}. The manifest is damaged."
        )
    return FileRecord(bytes=num_bytes, sha256=sha256)


def _require_sizes(folder: Path, expected: Mapping[str, FileRecord]) -> None:
    found = {name for name in _file_names(folder) if name != MANIFEST}
    for name in sorted(expected.keys() - found):
        raise CheckpointError(f"{folder / name}: listed in the manifest but missing.")
    for name in sorted(found - expected.keys()):
        raise CheckpointError(
            f"{folder / name}: must be listed in the manifest, got a file that is not. Remove it."
        )
    for name, record in expected.items():
        if (size := (folder / name).stat().st_size) != record.bytes:
            raise CheckpointError(f"{folder / name}: must have {record.bytes} bytes, got {size}.")


def _require_content(path: Path, record: FileRecord) -> None:
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if sha256 != record.sha256:
        raise CheckpointError(f"{path}: content differs from the manifest's sha256.")


def _require_headers(folder: Path, names: Iterable[str]) -> None:
    for path in (folder / name for name in names if name.endswith(_TENSORS)):
        try:
            TensorFile(path).close()
        except TensorFileError as error:
            raise CheckpointError(
                f"{path}: must be a safetensors file, got {error}. It is damaged."
            ) from error


def _unreadable(path: Path | str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: must be readable, got {error}. Check the disk.")


def _file_names(folder: Path, prefix: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _file_names(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield prefix + entry.name
            else:  # to open a pipe would wait for ever
                raise CheckpointError(
                    f"{entry.path}: must be a regular file or a folder, got a link or a device. Remove it."
                )
