"""The progress bar of conversions: bytes, speed and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from aiprod_ds.convert.derived import Counted
from aiprod_ds.tensor_file import TensorSource


@contextmanager
def shown(source: TensorSource, title: str, console: Console | None) -> Iterator[TensorSource]:
    """Gives `source` with a bar that moves as its tensors are read.

    Args:
        source: What is read once.
        title: Beside the bar.
        console: None shows nothing.
    """
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(title, total=sum(spec.nbytes for spec in source.specs.values()))
        yield Counted(source, lambda num_bytes: progress.advance(task, num_bytes))
