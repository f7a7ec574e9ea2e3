"""Opening what a conversion starts from: whatever `identify` knows becomes plain weights, adapters, and the model they belong to.

Nothing is written here. Weights stay on disk until they are asked for; adapters, which are small, are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aiprod_ds.checkpoint.checkpoint_weights import CheckpointWeights
from aiprod_ds.checkpoint.deepspeed_folder import DeepSpeedFolder
from aiprod_ds.checkpoint.derived import Cast, Merged, Renamed
from aiprod_ds.checkpoint.distributed_folder import DistributedFolder
from aiprod_ds.checkpoint.identify import IN_WORDS, Found, identify
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.checkpoint.weights_folder import CONFIG, WeightsFolder, open_tensors
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.loader import load_config
from aiprod_ds.config.lora import LoraConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.models.diffusers_config import DiffusersModel, read_diffusers_config
from aiprod_ds.models.diffusion import TRANSFORMER
from aiprod_ds.models.lora_files import LoraWeights, read_lora
from aiprod_ds.models.transformer_folder import family_of
from aiprod_ds.tensor_file import TensorSource

Form = Literal["diffusers", "single-file", "safetensors", "peft", "comfyui", "diffusers-lora"]
LORA_FORMS: tuple[Form, ...] = ("peft", "comfyui", "diffusers-lora")
_VAE = "vae."


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
        base: Of a LoRA, or before training.
        alpha: Of a LoRA that does not say it.
        rank: Of a LoRA that is extracted.
        targets: Layers of a LoRA that is extracted.
        prefix: Only tensors whose names begin so are taken, without it.
        is_trusted: Whether folders of pickles may be opened.
        shard_bytes: The most that one file holds.
    """

    source: Path
    out: Path
    form: Form | None = None
    dtype: torch.dtype | None = None
    ema: bool = False
    checkpoint: str | None = None
    config: Path | None = None
    base: Path | None = None
    alpha: float | None = None
    rank: int | None = None
    targets: Sequence[str] = ("*",)
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
        found: What it is.
        weights: Of the plain model; None of a LoRA without base.
        adapters: Of a LoRA.
        model: What the weights are of; None where nobody says it.
        told: What the user should know.
    """

    found: Found
    weights: TensorSource | None
    adapters: Adapters | None = None
    model: DiffusersModel | None = None
    told: tuple[str, ...] = ()


def open_source(request: Request) -> Opened:
    """Returns what the request names, without having read any weights.

    Raises:
        CheckpointError: If it cannot be read, is not trusted, or an option does not fit it.
        ConfigError: If a configuration that it needs is broken.
    """
    found = identify(request.source)
    _require_options(request, found)
    if found.kind in ("run", "checkpoint"):
        opened = _open_run(request, found)
    elif found.kind == "lora":
        opened = _open_lora(request, found)
    else:
        opened = _open_weights(request, found)
    return opened


def _require_options(request: Request, found: Found) -> None:
    is_ours = found.kind in ("run", "checkpoint")
    wrong = [
        option
        for option, is_given, has_effect in (
            ("--ema", request.ema, is_ours),
            ("--checkpoint", request.checkpoint is not None, found.kind == "run"),
            ("--alpha", request.alpha is not None, found.kind == "lora"),
            ("--prefix", request.prefix is not None, found.kind not in ("run", "checkpoint", "lora")),
        )
        if is_given and not has_effect
    ]
    if wrong:
        raise CheckpointError(f"{request.source}: {wrong[0]} has no effect for a {IN_WORDS[found.kind]}, got it. Remove it.")


def _open_run(request: Request, found: Found) -> Opened:
    checkpoint, run = _checkpoint(request, found)
    config = load_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    weights = _without_module(CheckpointWeights(checkpoint.folder, ema=request.ema))
    model, told = _model_of_run(request, config)
    place = f"update {checkpoint.state.clock.updates} ({checkpoint.folder.name}){', average' if request.ema else ''}"
    opened = Opened(
        found=replace(found, path=checkpoint.folder), weights=weights, model=model, told=(f"{found.path}: {place}", *told)
    )
    return _with_adapters(opened, weights, config, checkpoint) if any(".lora_A." in name for name in weights) else opened


def _checkpoint(request: Request, found: Found) -> tuple[Checkpoint, Path]:
    if found.kind == "checkpoint":
        return CheckpointStore(found.path.parent).read(found.path), found.path.parent.parent
    store = CheckpointStore(found.path / "checkpoints")
    names = store.names()
    if request.checkpoint is not None and request.checkpoint not in names:
        raise CheckpointError(
            f"{found.path}: --checkpoint must be one of {', '.join(names) or 'none'}, got {request.checkpoint[:80]!r}."
        )
    newest = store.read(store.folder / request.checkpoint) if request.checkpoint else store.newest()
    if newest is None:
        raise CheckpointError(f"{found.path}: must hold a checkpoint, got none. Train until the first one, or take export/.")
    return newest, found.path


def _without_module(weights: CheckpointWeights) -> TensorSource:
    """Returns the model's own tensors, without the prefix of the module that was trained."""
    for prefix in (TRANSFORMER, _VAE):
        names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
        if names:
            return Renamed(weights, names)
    return weights


def _model_of_run(request: Request, config: RunConfig | None) -> tuple[DiffusersModel | None, tuple[str, ...]]:
    if request.config is not None:
        return read_diffusers_config(request.config), ()
    if config is None:
        return None, ("there is no config.yaml of the run: the model's class is not known",)
    try:
        return DiffusersModel.of_run(config.model), ()
    except ConfigError as error:
        return None, (f"the model's config.json is not known ({error}); --config names it",)


def _with_adapters(opened: Opened, weights: TensorSource, config: RunConfig | None, checkpoint: Checkpoint) -> Opened:
    from aiprod_ds.models.lora import adapter_tensors  # imports peft, which takes seconds

    tensors = adapter_tensors({name: weights[name] for name in weights if ".lora_" in name})
    (rank,) = {value.shape[0] for name, value in tensors.items() if name.endswith(".lora_A.weight")}
    phase = checkpoint.state.clock.phase
    adapters = config.phase_adapters(config.curriculum.phases[phase]) if isinstance(config, DiffusionTrainerConfig) else None
    if adapters is None or adapters.rank != rank:
        raise CheckpointError(
            f"{checkpoint.folder}: must be of a phase whose adapters config.yaml describes, got adapters of rank {rank} in phase "
            f"{phase}. Take the run folder that it was saved in."
        )
    base = Renamed(weights, {name.replace(".base_layer.", "."): name for name in weights if ".lora_" not in name})
    scales = {name.removesuffix(".lora_A.weight"): adapters.scale for name in tensors if name.endswith(".lora_A.weight")}
    merged = Merged(Cast(base, torch.float32), tensors, scales, None)
    return replace(opened, weights=merged, adapters=Adapters(tensors=tensors, config=adapters))


def _open_lora(request: Request, found: Found) -> Opened:
    described = request.config or request.base
    if described is None:
        raise CheckpointError(
            f"{request.source}: the transformer of a LoRA must be known, got neither --base (its folder) nor --config (its "
            "config.json). Name one."
        )
    model = read_diffusers_config(described)
    lora = read_lora(found.path, model.module, family_of(model, where=str(described)), alpha=request.alpha)
    merged = None
    if request.base is not None:
        merged = Merged(WeightsFolder(request.base), lora.tensors(), lora.scales(), None)
    return Opened(found=found, weights=merged, adapters=_same_scale(lora), model=model)


def _same_scale(lora: LoraWeights) -> Adapters:
    """Returns adapters with one rank and one scale; where scales differ they are multiplied into B."""
    ranks, scales = lora.ranks(), set(lora.scales().values())
    if len(ranks) > 1:
        raise CheckpointError(
            f"{lora.source}: must have one rank in all layers to be written, got {', '.join(map(str, ranks))}. "
            "Merge it into its base instead."
        )
    tensors, scale = lora.tensors(), scales.pop() if len(scales) == 1 else None
    if scale is None:
        for name, own in lora.scales().items():
            tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"] * own
    alpha = (1.0 if scale is None else scale) * ranks[0]
    return Adapters(tensors=tensors, config=LoraConfig(rank=ranks[0], alpha=alpha, targets=tuple(lora.layers)))


def _open_weights(request: Request, found: Found) -> Opened:
    weights, told = _foreign(request, found)
    if request.prefix is not None:
        weights = _with_prefix(weights, request)
    described = request.config
    if described is None and found.kind == "weights" and (found.path / CONFIG).is_file():
        described = found.path
    model = None if described is None else read_diffusers_config(described)
    return Opened(found=found, weights=weights, model=model, told=told)


def _foreign(request: Request, found: Found) -> tuple[TensorSource, tuple[str, ...]]:
    if found.kind == "weights":
        return WeightsFolder(found.path), ()
    if found.kind == "tensors":
        return open_tensors(found.path), ()
    if found.kind == "deepspeed":
        folder = DeepSpeedFolder(found.path, is_trusted=request.is_trusted)
        text = f"{found.path}: update {folder.updates}, {folder.world_size} ranks, {len(folder.trained)} trained in fp32"
        if not folder.trained:
            text += ": ZeRO-0 keeps its weights as the model has them"
        return folder, (text,)
    sharded = DistributedFolder(found.path, is_trusted=request.is_trusted)
    if request.prefix is None and sharded.top_level:
        return _only_top_level(sharded), ()
    return sharded, ()


def _only_top_level(sharded: DistributedFolder) -> TensorSource:
    if len(sharded.top_level) > 1 or not all(name.startswith(f"{sharded.top_level[0]}.") for name in sharded):
        raise CheckpointError(
            f"{sharded.folder}: must hold one model, got {', '.join(sharded.top_level)}. Choose one with --prefix, such as "
            f"--prefix {sharded.top_level[0]}."
        )
    prefix = f"{sharded.top_level[0]}."
    return Renamed(sharded, {name.removeprefix(prefix): name for name in sharded})


def _with_prefix(weights: TensorSource, request: Request) -> TensorSource:
    prefix = str(request.prefix)
    prefix += "" if prefix.endswith(".") else "."
    names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    if not names:
        tops = sorted({name.split(".")[0] for name in weights})
        raise CheckpointError(
            f"{request.source}: --prefix must begin a name, got {prefix!r}; names begin with {', '.join(tops[:8])}."
        )
    return Renamed(weights, names)
