"""The weights in one of our own checkpoints, read tensor by tensor: of any ZeRO stage and number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.checkpoint.pieces import PieceReader
from aiprod_ds.errors import CheckpointError
from aiprod_ds.pieces import Kind
from aiprod_ds.tensor_file import TensorSource, TensorSpec


class CheckpointWeights(TensorSource):
    """Trained parameters in fp32, frozen ones and buffers in their own types, by their names in the module that was trained.

    Args:
        folder: A checkpoint whose manifest was compared.
        ema: Whether trained parameters are their average and not the last ones.

    Raises:
        CheckpointError: If it is damaged, or has no average.
    """

    def __init__(self, folder: Path, *, ema: bool = False) -> None:
        self._reader = PieceReader(folder / "engine")
        trained: Kind = "ema" if ema else "master"
        if ema and not self._reader.names("ema"):
            raise CheckpointError(
                f"{folder}: must hold an average of the weights for --ema, got none. The run had no section ema."
            )
        kinds: tuple[Kind, ...] = (trained, "frozen", "buffer")
        self._kinds = {name: kind for kind in kinds for name in self._reader.names(kind)}
        self.specs = {name: self._spec(kind, name) for name, kind in self._kinds.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.whole(self._kinds[name], name)

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()

    def _spec(self, kind: Kind, name: str) -> TensorSpec:
        whole = self._reader.whole_of(kind, name)
        return TensorSpec(dtype=getattr(torch, whole.dtype), shape=whole.shape)
