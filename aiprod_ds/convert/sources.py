"""Opening what a conversion starts from: whatever `identify` knows becomes plain weights, adapters, and the
model they belong to.

Nothing is written here. Weights stay on disk until they are asked for; adapters, which are small, are read.
"""

from __future__ import annotations

from aiprod_ds.checkpoint.manifest import HashCheck
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.convert.deepspeed_folder import DeepSpeedFolder
from aiprod_ds.convert.derived import Merged, Renamed
from aiprod_ds.convert.diffusers_config import read_diffusers_config
from aiprod_ds.convert.distributed_folder import DistributedFolder
from aiprod_ds.convert.identify import IN_WORDS, Found, identify
from aiprod_ds.convert.request import LORA_FORMS, Adapters, Opened, Request
from aiprod_ds.convert.run_checkpoint import open_run
from aiprod_ds.convert.transformer_folder import family_of
from aiprod_ds.convert.weights_folder import CONFIG, WeightsFolder, open_tensors
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.lora_files import LoraWeights, read_lora
from aiprod_ds.tensor_file import TensorSource


def open_source(request: Request, hashes: HashCheck | None = None) -> Opened:
    """Returns what the request names, without having read any weights.

    Args:
        request: Its options must fit what `source` turns out to be.
        hashes: Is left to compare a run's files of tensors, and the caller to confirm it before what it makes
            of the weights counts; adapters are confirmed. None: all is compared here.

    Raises:
        CheckpointError: If it cannot be read, is not trusted, or an option does not fit it.
        ConfigError: If a configuration that it needs is broken.
    """
    found = identify(request.source)
    _require_options(request, found)
    if found.kind in ("run", "checkpoint"):
        opened = open_run(request, found, hashes)
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
        raise CheckpointError(
            f"{request.source}: {wrong[0]} has no effect for a {IN_WORDS[found.kind]}, got it. Remove it."
        )


def _open_lora(request: Request, found: Found) -> Opened:
    described = request.config or request.base
    if described is None:
        raise CheckpointError(
            f"{request.source}: the transformer of a LoRA must be known, got neither --base (its folder) "
            "nor --config (its "
            "config.json). Name one."
        )
    model = read_diffusers_config(described)
    lora = read_lora(found.path, model.module, family_of(model, where=str(described)), alpha=request.alpha)
    merged = None
    if request.base is not None:
        merged = Merged(WeightsFolder(request.base), lora.tensors(), lora.scales(), None)
    adapters = _same_scale(lora) if request.form in LORA_FORMS else None
    return Opened(found=found, weights=merged, adapters=adapters, model=model)


def _same_scale(lora: LoraWeights) -> Adapters:
    """Returns adapters with one rank and one positive scale; where scales differ, or are not positive, they
    go into B."""
    ranks, scales = lora.ranks(), set(lora.scales().values())
    if len(ranks) > 1:
        raise CheckpointError(
            f"{lora.source}: must have one rank in all layers to be written, got "
            f"{', '.join(map(str, ranks))}. "
            "Merge it into its base instead."
        )
    tensors, scale = lora.tensors(), scales.pop() if len(scales) == 1 and min(scales) > 0 else None
    if scale is None:
        for name, own in lora.scales().items():
            tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"] * own
    alpha = (1.0 if scale is None else scale) * ranks[0]
    return Adapters(
        tensors=tensors, config=LoraConfig(rank=ranks[0], alpha=alpha, targets=tuple(lora.layers))
    )


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
        text = (
            f"{found.path}: update {folder.updates}, {folder.world_size} ranks, {len(folder.trained)} "
            "trained in fp32"
        )
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
            f"{sharded.folder}: must hold one model, got {', '.join(sharded.top_level)}. Choose one with "
            "--prefix, such as "
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
            f"{request.source}: --prefix must begin a name, got {prefix!r}; names begin with "
            f"{', '.join(tops[:8])}."
        )
    return Renamed(weights, names)
