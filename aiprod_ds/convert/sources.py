"""Opening what a conversion starts from: whatever `identify` knows becomes plain weights, adapters, and the
model they belong to.

Nothing is written here. Weights stay on disk until they are asked for; adapters, which are small, are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.checkpoint.manifest import HashCheck
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.convert.deepspeed_folder import DeepSpeedFolder
from aiprod_ds.convert.derived import Renamed, WithLora
from aiprod_ds.convert.diffusers_config import DiffusersModel, family_of, read_diffusers_config
from aiprod_ds.convert.distributed_folder import DistributedFolder
from aiprod_ds.convert.identify import IN_WORDS, Found, identify
from aiprod_ds.convert.quantized import METADATA_KEY, Dequantized, formats_of_layers
from aiprod_ds.convert.request import LORA_FORMS, Adapters, Form, Opened, Request
from aiprod_ds.convert.run_checkpoint import open_run
from aiprod_ds.convert.single_file import names_in_single_file, other_tensors, part_of
from aiprod_ds.convert.weights_folder import CONFIG, WeightsFolder, open_tensors
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.lora_files import LoraWeights, read_lora
from aiprod_ds.tensor_file import TensorFile, TensorSource


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
            ("--parts-from", request.parts_from is not None, request.form not in LORA_FORMS),
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
    if described.is_file() and described.name.endswith(".safetensors"):
        raise CheckpointError(
            f"{described}: must come with --config, as a single file has no {CONFIG}, got none."
        )
    model = read_diffusers_config(described)
    lora = read_lora(
        found.path,
        model.module,
        family_of(model, where=str(described)),
        alpha=request.alpha,
        allow_unknown=request.allow_unknown,
    )
    merged, raw, told = None, None, _told_of(lora)
    if request.base is not None:
        base, raw, of_base = _named_base(request, request.base, model)
        merged, told = WithLora(base, lora), (*told, *of_base)
    adapters = _same_scale(lora) if request.form in LORA_FORMS else None
    return Opened(found=found, weights=merged, adapters=adapters, model=model, lora=lora, raw=raw, told=told)


def _told_of(lora: LoraWeights) -> tuple[str, ...]:
    counts = ", ".join(f"{part} {count} tensors" for part, count in lora.others.items())
    return (f"{lora.source}: not of the transformer, left out: {counts}",) if counts else ()


def _named_base(
    request: Request, base: Path, model: DiffusersModel
) -> tuple[TensorSource, tuple[Path, ...] | None, tuple[str, ...]]:
    """Returns the model that a LoRA is added to, by diffusers' names, its files, and what to tell: of a
    folder,
    or of a file that may hold more."""
    source = WeightsFolder(base) if base.is_dir() else open_tensors(base)
    weights = _dequantized(source, model)
    names = names_in_single_file(weights.specs, model.class_name, list(model.shapes))
    left = other_tensors(
        weights.specs,
        names.values(),
        model.class_name,
        where=str(base),
        allow_unknown=request.allow_unknown,
    )
    counts = ", ".join(f"{part} {count} tensors" for part, count in left.items())
    told = (
        *((f"{base}: {weights.told}",) if weights.told else ()),
        *((f"{base}: left out: {counts}",) if left else ()),
    )
    return Renamed(weights, names), _raw(source), told


def _dequantized(source: TensorSource, model: DiffusersModel | None) -> Dequantized:
    metadata = source.metadata if isinstance(source, TensorFile) else {}
    if model is None:
        return Dequantized(source, metadata)
    return Dequantized(source, metadata, lambda name: part_of(name, model.class_name) is not None)


def _same_scale(lora: LoraWeights) -> Adapters:
    """Returns adapters with one rank and one positive scale; where scales differ, or are not positive, they
    go into B."""
    lora.require_plain("to be written as a LoRA")
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
    described = request.config
    if described is None and found.kind == "weights" and (found.path / CONFIG).is_file():
        described = found.path
    model = None if described is None else read_diffusers_config(described)
    raw = _raw(weights) if request.prefix is None else None
    weights = _dequantized(weights, model if request.prefix is None else None)
    told = (*told, f"{found.path}: {weights.told}") if weights.told else told
    if request.prefix is not None:
        weights = _with_prefix(weights, request)
    return Opened(found=found, weights=weights, model=model, raw=raw, told=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a merged single file holds beside its transformer.

    Attributes:
        tensors: As they are in the file.
        metadata: Of the file, such as the configuration of the whole; formats of layers of these parts alone.
    """

    tensors: TensorSource
    metadata: Mapping[str, str]


def open_parts(path: Path, model: DiffusersModel | None, form: Form) -> Parts:
    """Returns the other models of a merged single file.

    Raises:
        CheckpointError: If it is no such file, or no single file of a known class is written.
    """
    if form != "single-file" or model is None:
        raise CheckpointError(f"--parts-from: must come with --to single-file, got {form}. Remove it.")
    file = open_tensors(path)
    names = {name: name for name in file if part_of(name, model.class_name) is not None}
    if not names:
        raise CheckpointError(
            f"{path}: must hold parts beside the transformer, such as a VAE, got none. Remove --parts-from."
        )
    metadata = dict(file.metadata)
    if METADATA_KEY in metadata:
        metadata[METADATA_KEY] = formats_of_layers(metadata[METADATA_KEY], names)
    return Parts(tensors=Renamed(file, names), metadata=metadata)


def _raw(weights: TensorSource) -> tuple[Path, ...] | None:
    if isinstance(weights, WeightsFolder):
        return weights.paths()
    return (weights.path,) if isinstance(weights, TensorFile) else None


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
