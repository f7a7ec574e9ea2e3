"""TensorBoard as a mirror of metrics.jsonl; needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from aiprod_ds.errors import ConfigError
from aiprod_ds.metrics.evaluations import EvaluationRecord


class TensorBoardSink:
    """Writes every metric as a scalar; put it behind a `MirrorSink`.

    Args:
        folder: Of the event files; made if it is missing.
        resume_from_update: Update count of the checkpoint that the run continues from; TensorBoard hides what
            was written later.

    Raises:
        ConfigError: If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, resume_from_update: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "report.tensorboard: needs the package tensorboard, which is not installed. "
                "Run `pip install 'aiprod-ds[tensorboard]'` or set report.tensorboard to false."
            ) from error
        purge = None if resume_from_update is None else resume_from_update + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Writes one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, update)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Writes the pictures of an evaluation."""
        for medium in record.media:
            path = folder / medium.path
            if medium.kind == "picture" and path.is_file():
                with Image.open(path) as picture:
                    pixels_HWC = np.asarray(picture.convert("RGB"))
                tag = f"evaluation/{medium.role}" + (f"/{medium.clip}" if medium.clip else "")
                self._writer.add_image(tag, pixels_HWC, record.update, dataformats="HWC")

    def close(self) -> None:
        """See `Sink.close`."""
        self._writer.close()
