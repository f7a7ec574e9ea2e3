"""TensorBoard as a mirror of metrics.jsonl and of what evaluations show; needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiprod_ds.bad_disk import DiskWatch
from aiprod_ds.errors import ConfigError
from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium
from aiprod_ds.metrics.shown import TABLE, caption_of, evaluations_so_far, measures_table, named_media
from aiprod_ds.metrics.tensorboard_events import EventFile


class TensorBoardSink:
    """Writes every metric as a scalar, and evaluations as images (films move), sounds and a table; put it
    behind a `MirrorSink`.

    Args:
        folder: Of the event files; made if it is missing.
        resume_from_update: Update count of the checkpoint that the run continues from; TensorBoard hides what
            was written later.
        disk: See `EventFile`.

    Raises:
        ConfigError: If TensorBoard is not installed.
        OSError: If the folder cannot be made.
    """

    def __init__(
        self, folder: Path, *, resume_from_update: int | None = None, disk: DiskWatch | None = None
    ) -> None:
        try:
            from torch.utils.tensorboard import summary
        except ImportError as error:
            raise ConfigError(
                "report.tensorboard: needs the package tensorboard, which is not installed. "
                "Run `pip install 'aiprod-ds[tensorboard]'` or set report.tensorboard to false."
            ) from error
        purge = None if resume_from_update is None else resume_from_update + 1
        self._forms: Any = summary  # its functions have no types
        self._events = EventFile(folder, disk=disk, purge_step=purge)
        self._originals: set[str] = set()

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Writes one scalar per metric."""
        for name, value in metrics.items():
            self._events.add(self._forms.scalar(name, value), update)
        # At once: what a checkpoint counts as done is not written again by the run that goes on from it.
        self._events.flush()

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Writes the media, the measures of all evaluations so far and the prompts."""
        media = named_media(record, folder)
        for name, medium in media.items():
            if medium.role == "original":  # the same at every evaluation
                if medium.path in self._originals:
                    continue
                self._originals.add(medium.path)
            self._add(name, medium, folder / medium.path, record.update)
        self._events.add(
            self._forms.text(TABLE, _markdown(evaluations_so_far(record, folder))), record.update
        )
        prompts = [f"- `{name}`: {medium.prompt}" for name, medium in media.items() if medium.prompt]
        if prompts:
            self._events.add(self._forms.text("prompts", "\n".join(prompts)), record.update)
        self._events.flush()

    def close(self) -> None:
        """See `Sink.close`."""
        self._events.close()

    def _add(self, name: str, medium: Medium, path: Path, update: int) -> None:
        from aiprod_ds.metrics.tensorboard_media import read_film, read_picture, read_sound

        if medium.kind != "sound":
            image = read_picture(path) if medium.kind == "picture" else read_film(path)
            encoded = {"height": image.height, "width": image.width, "encoded_image_string": image.data}
            self._write(name, medium, update, image={**encoded, "colorspace": 3})
        sound = None if medium.kind == "picture" else read_sound(path)
        if sound is not None:
            self._write(
                name,
                medium,
                update,
                audio={
                    "sample_rate": sound.sample_rate_hz,
                    "num_channels": sound.channels,
                    "length_frames": sound.samples,
                    "encoded_audio_string": sound.data,
                    "content_type": "audio/wav",
                },
            )

    def _write(self, name: str, medium: Medium, update: int, **content: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        about = SummaryMetadata(display_name=name, summary_description=caption_of(medium))
        self._events.add(Summary(value=[Summary.Value(tag=name, metadata=about, **content)]), update)


def _markdown(records: tuple[EvaluationRecord, ...]) -> str:
    columns, rows = measures_table(records)
    lines = [columns, ["---"] * len(columns)]
    lines += [
        [f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
