"""What a conversion is asked for, what it starts from, and the bar that shows how far it is.

Owns the records between the command line, `sources` and `run`; opens and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.convert.derived import Counted
from aiprod_ds.convert.diffusers_config import DiffusersModel
from aiprod_ds.convert.identify import Found
from aiprod_ds.models.lora_files import LoraWeights
from aiprod_ds.models.lora_opened import Alpha
from aiprod_ds.tensor_file import TensorSource

Form = Literal["diffusers", "single-file", "safetensors", "peft", "comfyui", "diffusers-lora"]
LORA_FORMS: tuple[Form, ...] = ("peft", "comfyui", "diffusers-lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `aiprod-ds convert` was asked for.

    Attributes:
        source: Anything that `identify` knows.
        out: Must not exist.
        form: Of the result; None: what fits the source.
        dtype: Of all floating tensors; None keeps each tensor's own.
        ema: Whether to take the average of a run's weights.
        checkpoint: Name of one of a run's checkpoints; None: the newest whole one.
        config: A `config.json` or its folder, for weights that have none.
        base: The model that a LoRA belongs to, a folder or (with `config`) a single file; or the folder of
            the model before training.
        alpha: For a LoRA that does not say it, and for no other; `rank` is each layer's own.
        rank: Extracts a LoRA of this rank from `base` and `source`; None extracts none.
        targets: Layers that an extracted LoRA may have, as `lora.targets` of a configuration.
        parts_from: A merged single file, whose other parts and metadata the single file gets, too.
        allow_unknown: Whether tensors that belong to nothing that is known may be left out.
        prefix: Only tensors whose names begin so are taken, without it.
        is_trusted: Whether folders of pickles may be opened.
        shard_bytes: The most that one file of the result holds, unless a tensor is larger.
    """

    source: Path
    out: Path
    form: Form | None = None
    dtype: torch.dtype | None = None
    ema: bool = False
    checkpoint: str | None = None
    config: Path | None = None
    base: Path | None = None
    alpha: Alpha = None
    rank: int | None = None
    targets: Sequence[str] = ("*",)
    parts_from: Path | None = None
    allow_unknown: bool = False
    prefix: str | None = None
    is_trusted: bool = False
    shard_bytes: int = 10 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Adapters of a transformer.

    Attributes:
        tensors: A and B, by `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        config: Rank and alpha.
    """

    tensors: Mapping[str, Tensor]
    config: LoraConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a conversion starts from.

    Attributes:
        weights: Those of the plain model; None for a LoRA without base.
        adapters: Those of a LoRA or a run that trained one; None for anything else.
        model: The class that the weights are of; None where nobody says it.
        lora: What was read of a LoRA file, which `weights` are merged with.
        raw: The files that `weights` come from as they are, for another reading of them; None where
            nobody else reads them.
        told: Lines for the user, such as which checkpoint was taken.
        passed_over: Newer checkpoints of the run, which are not whole.
    """

    found: Found
    weights: TensorSource | None
    adapters: Adapters | None = None
    model: DiffusersModel | None = None
    lora: LoraWeights | None = None
    raw: tuple[Path, ...] | None = None
    told: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


@contextmanager
def shown(source: TensorSource, title: str, console: Console | None) -> Iterator[TensorSource]:
    """Gives `source` with a bar that moves as its tensors are read.

    Args:
        source: Each of its tensors is read once, or the bar ends elsewhere than at 100 %.
        title: What is done, as in `merging`.
        console: Draws the bar; None shows nothing.
    """
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(title, total=sum(spec.nbytes for spec in source.specs.values()))
        yield Counted(source, lambda num_bytes: progress.advance(task, num_bytes))
