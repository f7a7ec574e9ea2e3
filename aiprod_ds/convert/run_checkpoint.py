"""Opening a run's checkpoint for a conversion: its weights without the module around them, its adapters, and
their base.

The model's class comes from the run's config.yaml. Called by `sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aiprod_ds.checkpoint.manifest import HashCheck
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.config.load import SavedRun, read_saved_run
from aiprod_ds.convert.checkpoint_weights import CheckpointWeights
from aiprod_ds.convert.derived import Cast, Merged, Renamed, WithLora
from aiprod_ds.convert.diffusers_config import DiffusersModel, family_of, read_diffusers_config
from aiprod_ds.convert.identify import Found
from aiprod_ds.convert.request import LORA_FORMS, Adapters, Opened, Request
from aiprod_ds.convert.weights_folder import WeightsFolder
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.models.diffusion import TRANSFORMER
from aiprod_ds.models.lora_files import read_lora
from aiprod_ds.tensor_file import TensorSource

_VAE, _DOWN = "vae.", ".lora_A.weight"


def open_run(request: Request, found: Found, hashes: HashCheck | None = None) -> Opened:
    """Returns the weights and adapters of a run's checkpoint.

    Args:
        request: `checkpoint`, `ema`, `config`, `base` and `form` are read.
        found: A run folder or a checkpoint.
        hashes: See `open_source`.

    Raises:
        CheckpointError: If no checkpoint is whole, or it has not what the request asks for.
        ConfigError: If the run's configuration is broken.
    """
    checkpoint, run, passed_over = _checkpoint(request, found, hashes)
    config = read_saved_run(run / "config.yaml") if (run / "config.yaml").is_file() else None
    source = CheckpointWeights(checkpoint.folder, ema=request.ema)
    weights = _without_module(source)
    model, told = _model_of_run(request, config)
    place = (
        f"update {checkpoint.state.clock.updates} "
        f"({checkpoint.folder.name}){', average' if request.ema else ''}"
    )
    opened = Opened(
        found=replace(found, path=checkpoint.folder),
        weights=weights,
        model=model,
        told=(f"{found.path}: {place}", *_told_of(passed_over), *told),
        passed_over=passed_over,
    )
    if not any(".lora_A." in name for name in weights):
        return opened
    if hashes is not None:
        hashes.confirm()
    adapters = _adapters(weights, config, checkpoint)
    if request.form in LORA_FORMS:
        return replace(opened, weights=None, adapters=adapters)
    base = _base(request, source, weights, config, model)
    if base is None:
        missing = f"its frozen weights are elsewhere ({source.missing_base}); --base names their folder"
        return replace(opened, weights=None, adapters=adapters, told=(*opened.told, missing))
    scales = dict.fromkeys(_layers(adapters), adapters.config.scale)
    return replace(
        opened, weights=Merged(Cast(base, torch.float32), adapters.tensors, scales, None), adapters=adapters
    )


def _checkpoint(
    request: Request, found: Found, hashes: HashCheck | None
) -> tuple[Checkpoint, Path, tuple[str, ...]]:
    """Returns the checkpoint, its run's folder, and the newer ones that are not whole."""
    if found.kind == "checkpoint":
        checkpoint = CheckpointStore(found.path.parent).read(found.path, weights_only=True, hashes=hashes)
        return checkpoint, found.path.parent.parent, ()
    store = CheckpointStore(found.path / "checkpoints")
    names = store.names()
    named = request.checkpoint
    if named is not None and named not in names:
        raise CheckpointError(
            f"{found.path}: --checkpoint must be one of {', '.join(names) or 'none'}, got {named[:80]!r}."
        )
    if named is not None:
        return store.read(store.folder / named, weights_only=True, hashes=hashes), found.path, ()
    newest = store.newest(weights_only=True, hashes=hashes)
    if newest is None:
        raise CheckpointError(
            f"{found.path}: must hold a checkpoint, got none. Train until the first one, or take export/."
        )
    return newest, found.path, tuple(names[: names.index(newest.folder.name)])


def _told_of(passed_over: Sequence[str]) -> tuple[str, ...]:
    if not passed_over:
        return ()
    return (f"older than the newest: {', '.join(passed_over)} cannot be read; `inspect` says why",)


def _without_module(weights: CheckpointWeights) -> TensorSource:
    """Returns the model's own tensors, without the prefix of the module that was trained."""
    for prefix in (TRANSFORMER, _VAE):
        names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
        if names:
            return Renamed(weights, names)
    return weights


def _model_of_run(request: Request, config: SavedRun | None) -> tuple[DiffusersModel | None, tuple[str, ...]]:
    if request.config is not None:
        return read_diffusers_config(request.config), ()
    if config is None:
        return None, ("there is no config.yaml of the run: the model's class is not known",)
    try:
        return DiffusersModel.of_run(config.model), ()
    except ConfigError as error:
        return None, (f"the model's config.json is not known ({error}); --config names it",)


def _adapters(weights: TensorSource, config: SavedRun | None, checkpoint: Checkpoint) -> Adapters:
    from aiprod_ds.models.lora import adapter_tensors  # imports peft, which takes seconds

    tensors = adapter_tensors({name: weights[name] for name in weights if ".lora_" in name})
    (rank,) = {value.shape[0] for name, value in tensors.items() if name.endswith(_DOWN)}
    phase = checkpoint.state.clock.phase
    adapters = None if config is None else config.phase_adapters(config.curriculum.phases[phase])
    if adapters is None or adapters.rank != rank:
        raise CheckpointError(
            f"{checkpoint.folder}: must be of a phase whose adapters config.yaml describes, got adapters of "
            f"rank {rank} in phase "
            f"{phase}. Take the run folder that it was saved in."
        )
    return Adapters(tensors=tensors, config=adapters)


def _layers(adapters: Adapters) -> list[str]:
    return [name.removesuffix(_DOWN) for name in adapters.tensors if name.endswith(_DOWN)]


def _base(
    request: Request,
    source: CheckpointWeights,
    weights: TensorSource,
    config: SavedRun | None,
    model: DiffusersModel | None,
) -> TensorSource | None:
    """Returns what the adapters were trained on: from the checkpoint, or from where the run started; None if
    it is not known."""
    if source.missing_base is None:
        return Renamed(weights, {_plain(name): name for name in weights if ".lora_" not in name})
    base = _start(request, config, model)
    if base is not None:
        where = str(request.base or request.source)
        source.require_base(base, lambda name: _plain(name.removeprefix(TRANSFORMER)), where=where)
    return base


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _start(request: Request, config: SavedRun | None, model: DiffusersModel | None) -> TensorSource | None:
    if request.base is not None:
        return WeightsFolder(request.base)
    if config is None or config.model.pretrained is None:
        return None
    folder = Path(config.model.pretrained) / (config.model.subfolder or "")
    if not folder.is_dir():  # a name on the hub, or gone
        return None
    merged = config.model.lora_checkpoint
    if merged is None:
        return WeightsFolder(folder)
    if model is None:
        return None
    lora = read_lora(Path(merged.path), model.module, family_of(model, where=str(folder)), alpha=merged.alpha)
    return WithLora(Cast(WeightsFolder(folder), torch.float32), lora)
