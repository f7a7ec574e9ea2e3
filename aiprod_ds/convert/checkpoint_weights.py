"""The weights in one of our own checkpoints, read tensor by tensor: of any ZeRO stage and number of ranks.

A checkpoint of adapters may refer to its base instead of holding it; then frozen tensors are known by name
and shape only, and `require_base` says whether weights from elsewhere are the ones that it refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.state import tensors_sha256, weights_sha256
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import Kind
from aiprod_ds.tensor_file import TensorSource, TensorSpec


class CheckpointWeights(TensorSource):
    """Trained parameters in fp32, frozen ones and buffers in their own types, by their names in the module
    that was trained.

    Args:
        folder: A checkpoint whose manifest was compared.
        ema: Whether trained parameters are their average and not the last ones.

    Attributes:
        missing_base: Where the frozen weights come from, in words, if they are not here; None if all can be
            read.

    Raises:
        CheckpointError: If it is damaged, or has no average.
    """

    def __init__(self, folder: Path, *, ema: bool = False) -> None:
        self._reader = ShardReader(folder / "engine")
        trained: Kind = "ema" if ema else "master"
        if ema and not self._reader.names("ema"):
            raise CheckpointError(
                f"{folder}: must hold an average of the weights for --ema, got none. The run had no section "
                "ema."
            )
        kinds: tuple[Kind, ...] = (trained, "frozen", "buffer")
        base = self._reader.facts.base
        self.missing_base = None if base is None or base.is_stored else base.origin
        self._kinds = {name: kind for kind in kinds for name in self._reader.names(kind)}
        self.specs = {name: self._spec(kind, name) for name, kind in self._kinds.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.whole(self._kinds[name], name)

    def require_base(
        self, base: Mapping[str, Tensor], plain_name: Callable[[str], str], *, where: str
    ) -> None:
        """Checks that weights from elsewhere are those that this checkpoint refers to; reads all of them.

        Args:
            base: By their names in the plain model, in any type that holds them.
            plain_name: Returns the name there of a tensor here.
            where: How the message names those weights.

        Raises:
            CheckpointError: If they are others.
        """
        facts, digests = self._reader.facts, dict[str, str]()
        assert facts.base is not None, "there is something to compare with"
        for name in facts.names("frozen"):
            spec, plain = self.specs[name], plain_name(name)
            value = base[plain].to(spec.dtype) if plain in base else torch.empty(0)
            digests[name] = tensors_sha256([(name, value)])
        if weights_sha256(digests) != facts.base.sha256:
            raise CheckpointError(
                f"{where}: must be the weights that the adapters were trained on ({facts.base.origin}), got "
                "others. Name them "
                "with --base."
            )

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()

    def _spec(self, kind: Kind, name: str) -> TensorSpec:
        whole = self._reader.metadata_of(kind, name)
        return TensorSpec(dtype=getattr(torch, whole.dtype), shape=whole.shape)
