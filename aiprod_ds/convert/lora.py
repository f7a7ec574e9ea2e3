"""Merging and extracting LoRA between folders, with memory for one file of weights: what `tools/` and `run`
call.

Ties the names and families of `aiprod_ds.models` to the tensors of `weights`; trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.convert.derived import WithLora
from aiprod_ds.convert.diffusers_config import describe_folder
from aiprod_ds.convert.request import shown
from aiprod_ds.convert.weights import Extracted, extract, other_differences
from aiprod_ds.convert.weights_folder import WeightsFolder, new_folder, require_equal, write_like
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.lora_files import LoraWeights, read_lora
from aiprod_ds.models.lora_opened import Alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A LoRA and the folder that it is merged into; nothing is written before `write`.

    Attributes:
        dtype: Of all floating tensors that are written; None keeps each tensor's own.
    """

    base: WeightsFolder
    lora: LoraWeights
    dtype: torch.dtype | None

    @classmethod
    def of(cls, base: Path, lora: Path, *, alpha: Alpha = None, dtype: torch.dtype | None = None) -> Merge:
        """Reads the LoRA and checks that the folder holds the whole model.

        Args:
            base: Folder of a plain transformer in diffusers' layout.
            lora: Folder or file of any form that `lora_files` reads.
            alpha: For a LoRA that does not say it, and for no other; `rank` is each layer's own.
            dtype: See the attributes.

        Raises:
            CheckpointError: If one of the two cannot be read or they do not fit.
            ConfigError: If the family does not know this variant.
        """
        transformer, family = describe_folder(base)
        weights = WeightsFolder(base)
        weights.require_shapes({name: tuple(value.shape) for name, value in transformer.state_dict().items()})
        return cls(base=weights, lora=read_lora(lora, transformer, family, alpha=alpha), dtype=dtype)

    def write(self, folder: Path, *, console: Console | None = None) -> None:
        """Writes the merged model. The sum is made in fp32 and rounded once.

        Args:
            folder: Must not exist.
            console: Shows progress; None shows nothing.

        Raises:
            CheckpointError: If `folder` exists.
        """
        with shown(self._merged(), "merging", console) as merged:
            write_like(self.base, folder, merged)

    def verify(self, folder: Path, *, console: Console | None = None) -> None:
        """Reads what was written and compares it with the class's shapes and, bit by bit, with a second
        computation.

        Args:
            folder: From `write`.
            console: Shows progress; None shows nothing.

        Raises:
            CheckpointError: If anything differs.
        """
        transformer, _ = describe_folder(folder)
        written = WeightsFolder(folder)
        written.require_shapes({name: tuple(value.shape) for name, value in transformer.state_dict().items()})
        with shown(self._merged(), "verifying", console) as merged:
            require_equal(written, merged.items())

    def _merged(self) -> WithLora:
        return WithLora(self.base, self.lora, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Two states of one model and the layers whose difference becomes adapters; nothing is computed before
    `parts`.

    Attributes:
        base: Before training.
        tuned: After it.
        layers: Names, in the model's order; some may turn out not to differ.
    """

    base: WeightsFolder
    tuned: WeightsFolder
    family: type[Family]
    layers: tuple[str, ...]
    rank: int

    @classmethod
    def of(cls, base: Path, tuned: Path, *, rank: int, targets: Sequence[str] = ("*",)) -> Extraction:
        """Checks that both folders hold whole models of one shape and finds the layers.

        Args:
            base: Folder of the transformer before training, in diffusers' layout.
            tuned: Folder of the transformer after it.
            rank: Of every adapter; at most the smaller side of the weights.
            targets: As `lora.targets` of a configuration; every Linear layer of the repeated blocks by
                default.

        Raises:
            CheckpointError: If a folder cannot be read or is not such a model.
            ConfigError: If a target matches no layer, or the family does not know this variant.
        """
        from aiprod_ds.models.lora import choose_layers  # imports peft, which takes seconds

        transformer, family = describe_folder(base)
        folders = WeightsFolder(base), WeightsFolder(tuned)
        for folder in folders:
            folder.require_shapes(
                {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
            )
        layers = choose_layers(transformer, targets, family.lora_targets)
        return cls(base=folders[0], tuned=folders[1], family=family, layers=layers, rank=rank)

    def parts(self, *, console: Console | None = None) -> tuple[Extracted, ...]:
        """Returns the adapters of the layers that differ.

        Args:
            console: Shows progress; None shows nothing.

        Raises:
            CheckpointError: If the rank is above a side of a weight, numbers are not finite or no layer
                differs.
        """
        found = extract(self.base, self.tuned, self.rank, layers=self.layers)
        shown = track(found, "extracting", total=len(self.layers), console=console, disable=console is None)
        parts = tuple(part for part in shown if part.difference_norm)
        if not parts:
            raise CheckpointError(
                f"{self.tuned.folder}: must differ from {self.base.folder} in a target, got equal weights."
            )
        return parts

    def lost(self) -> Mapping[str, float]:
        """Returns the tensors that no adapter holds though they differ, with the norms of their
        differences."""
        return dict(other_differences(self.base, self.tuned, layers=self.layers))

    def write(self, folder: Path, parts: Sequence[Extracted]) -> None:
        """Writes `peft/` and `comfyui.safetensors`, as a training run exports adapters.

        Raises:
            CheckpointError: If `folder` exists.
        """
        from aiprod_ds.models.lora import save_comfyui, save_peft  # imports peft, which takes seconds

        config = LoraConfig(rank=self.rank, targets=tuple(part.layer for part in parts))
        adapters = {}
        for part in parts:
            adapters[f"{part.layer}.lora_A.weight"] = part.down
            adapters[f"{part.layer}.lora_B.weight"] = part.up
        with new_folder(folder) as pending:
            save_peft(adapters, config, pending / "peft")
            if self.family.published is not None:
                path = pending / "comfyui.safetensors"
                save_comfyui(adapters, config, path, original_name=self.family.published.layer_of)
