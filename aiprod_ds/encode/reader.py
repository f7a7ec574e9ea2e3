"""Reads the clips of tasks ahead of the encoders, in worker processes; a clip that cannot be read becomes a
`Failure`.

Owns the worker processes; what a clip is is `media.py`'s.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aiprod_ds.codec.encoders import AudioForm
from aiprod_ds.data.latents import AUDIO_LATENTS, LATENTS
from aiprod_ds.decode.pixels import BLACK, Color
from aiprod_ds.decode.probe import SoundLevel
from aiprod_ds.encode.media import read_pictures, read_sound
from aiprod_ds.encode.tasks import Task
from aiprod_ds.errors import DataError

Loaded = Mapping[str, Tensor]
"""What a task needs, by source."""
SOUND_LEVEL = "sound_level"
"""Peak, clipped samples and mean of the sound's span, as `MediaRecord` has them of whole sounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A clip that was not encoded, what of it, and why."""

    clip: str
    what: str
    reason: str

    @classmethod
    def of(cls, task: Task, error: DataError) -> Failure:
        """Returns the failure of a task."""
        what = (
            ", ".join(task.sources)
            if task.shape is None
            else f"{', '.join(task.sources)} of {task.shape.tag}"
        )
        return cls(clip=task.record.name, what=what, reason=str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaReader:
    """Reads pictures and sound; a caption needs no reading.

    Attributes:
        form: What the audio encoder takes; None without one.
        fill_with_silence: Whether missing sound is silence.
        background: RGB behind transparent pixels.
    """

    root: Path
    form: AudioForm | None
    fill_with_silence: bool
    background: Color = BLACK

    def __call__(self, task: Task) -> Loaded:
        """Returns `latents` [3,T,H,W] and `audio_latents` [C,N] as far as the task writes them: what is to be
        encoded; and with a sound its `SOUND_LEVEL` [3].

        Raises:
            DataError: If one of them cannot be read.
        """
        loaded: dict[str, Tensor] = {}
        if LATENTS in task.sources:
            assert task.shape is not None, "clips have shapes"
            loaded[LATENTS] = read_pictures(self.root, task.record, task.shape, background=self.background)
        if AUDIO_LATENTS in task.sources:
            assert task.shape is not None, "clips have shapes"
            assert self.form is not None, "sounds need an encoder"
            level = SoundLevel()
            loaded[AUDIO_LATENTS] = read_sound(
                self.root,
                task.record,
                task.shape,
                self.form,
                fill_with_silence=self.fill_with_silence,
                level=level,
            )
            if level.samples:
                facts = [level.peak, float(level.clipped), level.dc()]
                loaded[SOUND_LEVEL] = torch.tensor(facts, dtype=torch.float64)
        return loaded


def load_tasks(
    tasks: Sequence[Task], read: Callable[[Task], Loaded], *, num_workers: int
) -> Iterator[tuple[Task, Loaded | Failure]]:
    """Yields every task with what was read for it, in order.

    Args:
        read: Picklable where worker processes are not forked.
        num_workers: Processes that read ahead; 0 reads in this one.

    Raises:
        DataError: If a worker dies.
    """
    loader: DataLoader[Any] = DataLoader(
        _Tasks(tasks, read),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
    )
    try:
        yield from zip(tasks, loader, strict=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"encode: worker processes must stay alive, got {error} Raise the machine's memory or lower "
            "data.num_workers."
        ) from error


class _Tasks(Dataset[Any]):
    """Runs in the workers."""

    def __init__(self, tasks: Sequence[Task], read: Callable[[Task], Loaded]) -> None:
        self._tasks = tasks
        self._read = read

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Loaded | Failure:
        try:
            return self._read(self._tasks[index])
        except DataError as error:
            return Failure.of(self._tasks[index], error)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_worker: int) -> None:
    gc.freeze()  # garbage of the parent may hold threads that a fork has not; see the loader of `data`
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the encoding process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
