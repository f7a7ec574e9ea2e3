"""The end of a command that met an error which nobody foresaw: three lines for its user, the whole traceback
in a file, and an exit code of its own.

Owns what is told and where the traceback goes. What was foreseen is an `AiprodError` and is told by the
command itself; signals, `SystemExit` and a reader that closed its pipe pass. Called by the command line and
by the programs in `tools/`; loads nothing heavy.
"""

from __future__ import annotations

import hashlib
import os
import platform
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h: "an internal software error has been detected"
_CLOSED_PIPE = 141  # what a shell shows of a program that SIGPIPE ended: 128 + 13
_MOST_CHARACTERS = 300  # of a message; some quote whole tensors
_PACKAGE = Path(__file__).resolve().parent


def guarded(command: Callable[[], int], *, program: str, is_verbose: bool = False) -> int:
    """Returns the exit code of `command`; after an exception that it lets through, `UNFORESEEN`.

    Of several ranks of one host that end by the same traceback, one tells it.

    Args:
        command: The whole command; what it raises on purpose it has told and turned into a code.
        program: Its name, for the message.
        is_verbose: Whether the traceback is printed, too.
    """
    for stream in (sys.stdout, sys.stderr):
        # A path that is not UTF-8 stands in messages as it can; to fail on it would hide what they say.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001  this is the place where everything is caught
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            return _CLOSED_PIPE
        _tell(error, program, is_verbose=is_verbose)
        return UNFORESEEN
    return code


def _has_no_reader() -> bool:
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # it is no file, as in a test
        return False
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    silence(descriptor)
    return True


def silence(descriptor: int) -> None:
    """Gives up what waits for an output that takes nothing: Python flushes it once more when it ends, and
    would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _tell(error: Exception, program: str, *, is_verbose: bool) -> None:
    whole = "".join(traceback.format_exception(error))
    first = (str(error).strip().splitlines() or [""])[0]
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 else ""
    what = f"{rank}{type(error).__name__}: {first}"[:_MOST_CHARACTERS].rstrip(": ")
    try:
        path, is_first = _keep(whole, f"{program}: {what}")
    except OSError as reason:
        path, is_first, is_verbose = None, True, True
        kept = f"The traceback stands above: it could not be written to a file ({reason.strerror})."
    else:
        kept = f"The whole traceback is in {path}."
    if not is_first:
        return
    if is_verbose:
        print(whole, end="", file=sys.stderr)  # noqa: T201  the command line's own end
    lines = (
        f"error: {program} met an error that it does not foresee: {what}",
        f"  where: {_place(error)}",
        f"  {kept} Please report it to this project's issues, with that and the configuration.",
    )
    print("\n".join(lines), file=sys.stderr)  # noqa: T201


def _place(error: Exception) -> str:
    """Returns the innermost place in this package, or where the error came from if it never was there."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is `guarded`
    own = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    if not frames:
        return "unknown"
    frame = (own or list(frames))[-1]
    path = Path(frame.filename)
    shown = path.relative_to(_PACKAGE.parent) if own else path
    return f"{shown}:{frame.lineno} in {frame.name}"


def _keep(whole: str, title: str) -> tuple[Path, bool]:
    """Returns the file that holds the traceback, and whether this process is the first to write it."""
    head = (
        f"{title}\ncommand: {' '.join(sys.argv)}\npython: {sys.version.split()[0]} on {platform.platform()}\n"
        f"working folder: {os.getcwd()}\n\n"  # noqa: PTH109  Path.cwd() is the same, one import further
    )
    data = (head + whole).encode("utf-8", "backslashreplace")
    folder = Path(tempfile.gettempdir())
    if "MASTER_PORT" in os.environ:  # ranks of one launcher: one file, made by the first
        job = f"{os.getppid()}:{os.environ['MASTER_PORT']}:{whole}"
        path = folder / f"aiprod-ds-{hashlib.sha256(job.encode('utf-8', 'replace')).hexdigest()[:16]}.txt"
        with suppress(FileExistsError):
            _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), data)
            return path, True
        if path.lstat().st_uid == os.getuid():
            return path, False
    descriptor, name = tempfile.mkstemp(prefix="aiprod-ds-", suffix=".txt", dir=folder)
    _write(descriptor, data)
    return Path(name), True


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
