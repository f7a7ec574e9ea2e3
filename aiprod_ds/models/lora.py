"""Low-rank adapters (LoRA) on Linear layers: wrapping, merging, and two file forms that others read. The only
importer of peft.

    y = W x + b + scale * B (A x),   scale = alpha / rank,   A random, B zero at the start

Precision: an engine casts the whole module to its compute type and keeps fp32 masters of what is trained. So
the frozen base exists in the compute type only, and "fp32 adapters" are the optimizer's masters: they, and
not their 16-bit copies, are updated, saved and exported.

Names: functions take the names of the transformer's own state, without the prefix of a module around it. An
adapter's tensors are called `<layer>.lora_A.weight` [rank,in] and `<layer>.lora_B.weight` [out,rank].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.files import read_text
from aiprod_ds.models.lora_files import LoraWeights
from aiprod_ds.models.lora_opened import CONFIG_FILE, WEIGHTS_FILE, listed, read_tensors
from aiprod_ds.rng import stream_seed

_ADAPTER = "default"  # PEFT's own name for the only adapter
_PEFT_PREFIX = "base_model.model."
_COMFYUI_PREFIX, _DIFFUSERS_PREFIX = "diffusion_model.", "transformer."


def add_lora(
    transformer: nn.Module, config: LoraConfig, *, allowed: Sequence[str], seed: int
) -> tuple[str, ...]:
    """Wraps the Linear layers that `config.targets` name, in place; afterwards only adapters are trained.

    The function of the model does not change. A depends on `seed` alone, so that all ranks draw the same.

    Args:
        transformer: May be on the meta device, for planning.
        config: Its `targets` must each match a layer; the others of its fields go to PEFT.
        allowed: Patterns of layers that may be wrapped: `Family.lora_targets`.
        seed: Draws A in a stream of its own; the global generator is left as it was.

    Returns:
        The names of the wrapped layers, in the model's order.

    Raises:
        ConfigError: If a pattern matches no layer that may be wrapped; all such patterns at once.
    """
    names = choose_layers(transformer, config.targets, allowed)
    is_plan = next(transformer.parameters()).is_meta  # PEFT would draw values and forget them
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "lora"))
        inject_adapter_in_model(
            _peft_config(config, names), transformer, adapter_name=_ADAPTER, low_cpu_mem_usage=is_plan
        )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    wrapped = tuple(name for name, _ in _wrapped_layers(transformer))
    assert wrapped == names, "PEFT wrapped other layers than it was told"
    return wrapped


def choose_layers(transformer: nn.Module, targets: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the Linear layers that match one of `targets` and one of `allowed`, in the model's
    order.

    Raises:
        ConfigError: If a target matches none; all such targets at once.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    usable = [name for name in linear if any(_matches(name, pattern) for pattern in allowed)]
    problems = []
    for index, pattern in enumerate(targets):
        if any(_matches(name, pattern) for name in usable):
            continue
        elsewhere = next((name for name in linear if _matches(name, pattern)), None)
        if elsewhere is not None:
            rule, fix = (
                f"inside {', '.join(allowed)}",
                f"It only matches layers like {elsewhere}. Take it out.",
            )
        else:
            rule, fix = (
                f"of {type(transformer).__name__}",
                suggestion(pattern, {_end(name) for name in usable}),
            )
        problems.append(f"lora.targets[{index}]: must match a Linear layer {rule}, got {pattern!r}. {fix}")
    if problems:
        raise ConfigError(problems)
    return tuple(name for name in usable if any(_matches(name, pattern) for pattern in targets))


def adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapters in the state of a wrapped transformer, by the names of this file, in fp32."""
    return {
        name.replace(f".{_ADAPTER}.", "."): value.float()
        for name, value in state.items()
        if ".lora_A." in name or ".lora_B." in name
    }


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns the state of the plain model that computes the same: W + scale * B A for each wrapped layer, in
    fp32.

    Worked number: W = 1, A = 2, B = 3, scale 0.5: 4.

    Args:
        state: That of a wrapped transformer; a plain one comes back as it is.
        scale: `LoraConfig.scale`, the same for all layers.

    Returns:
        Merged weights in fp32, everything else as it is.
    """
    adapters = adapter_tensors(state)
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        layer = plain.removesuffix(".weight")
        down, up = adapters.get(f"{layer}.lora_A.weight"), adapters.get(f"{layer}.lora_B.weight")
        merged[plain] = value if down is None or up is None else value.float() + scale * (up @ down)
    return merged


def merge_lora(transformer: nn.Module) -> None:
    """Merges the adapters into their layers and takes them away, in place: a plain model in fp32, all of it
    trainable.

    Weights must be whole: not partitioned by ZeRO-3, where `AdapterNames` says what to read and to write.
    """
    transformer.float()
    for _, layer in _wrapped_layers(transformer):
        base: Any = layer.get_base_layer()
        parts: Any = layer
        with torch.no_grad():
            base.weight += parts.scaling[_ADAPTER] * (
                parts.lora_B[_ADAPTER].weight @ parts.lora_A[_ADAPTER].weight
            )
    remove_lora(transformer)


def remove_lora(transformer: nn.Module) -> None:
    """Takes the adapters away without merging them, in place: the plain model, all of it trainable, its
    weights untouched.

    Weights may be partitioned by ZeRO-3. A model without adapters becomes trainable.
    """
    layers = list(_wrapped_layers(transformer))
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, layer.get_base_layer())
    if layers:
        del transformer.peft_config
    transformer.requires_grad_(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterNames:
    """The parameters of one wrapped layer, by their names in the transformer.

    Attributes:
        layer: The layer's own name in the plain model.
        scale: Factor of B A.
    """

    layer: str
    scale: float

    @property
    def base(self) -> str:
        """The frozen weight W."""
        return f"{self.layer}.base_layer.weight"

    @property
    def down(self) -> str:
        """A."""
        return f"{self.layer}.lora_A.{_ADAPTER}.weight"

    @property
    def up(self) -> str:
        """B."""
        return f"{self.layer}.lora_B.{_ADAPTER}.weight"

    @property
    def plain(self) -> str:
        """The weight W of the plain model, where a merged one goes."""
        return f"{self.layer}.weight"


def adapter_names(transformer: nn.Module) -> tuple[AdapterNames, ...]:
    """Returns the names of every wrapped layer's parameters, in the model's order; none for a plain model."""
    found = []
    for name, layer in _wrapped_layers(transformer):
        parts: Any = layer
        found.append(AdapterNames(layer=name, scale=parts.scaling[_ADAPTER]))
    return tuple(found)


def start_from(transformer: nn.Module, lora: LoraWeights) -> None:
    """Gives the adapters of a wrapped transformer the values that `lora` has, in place, to go on training
    them.

    Where the scales differ, B is multiplied by theirs over the model's, so that the function is that of
    `lora`.

    Worked number: scale 1.5 in the file and 0.5 in the model: B is multiplied by 3.

    Args:
        transformer: From `add_lora`; its weights whole, not partitioned by ZeRO-3.
        lora: Of the same layers and the same rank in all of them.

    Raises:
        CheckpointError: If layers or ranks differ; nothing is changed then.
    """
    lora.require_plain("to be trained on")
    names = adapter_names(transformer)
    own, theirs = {name.layer for name in names}, set(lora.layers)
    if own != theirs:
        surplus = listed(sorted(theirs - own)) or "none"
        missing = listed(sorted(own - theirs)) or "none"
        raise CheckpointError(
            f"{lora.source}: must adapt the layers that lora.targets name, got {surplus} beside them and "
            f"without {missing}. "
            "Set lora.targets to the file's layers."
        )
    ranks = {transformer.get_parameter(name.down).shape[0] for name in names}
    if set(lora.ranks()) != ranks:
        raise CheckpointError(
            f"{lora.source}: must have the rank of the configuration ({', '.join(map(str, ranks))}) in "
            "every layer, got "
            f"{', '.join(map(str, lora.ranks()))}. Set lora.rank, or merge the file with "
            "model.lora_checkpoint."
        )
    for name in names:
        layer = lora.layers[name.layer]
        with torch.no_grad():
            transformer.get_parameter(name.down).copy_(layer.down)
            transformer.get_parameter(name.up).copy_(layer.up * (layer.scale / name.scale))


def save_peft(adapters: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads.

    diffusers reads the second one too: `load_lora_adapter(folder, weight_name="adapter_model.safetensors",
    prefix="base_model.model")`.

    Args:
        adapters: From `adapter_tensors`.
        config: Its rank and alpha stand in the file; targets are taken from the adapters' names.
        folder: Made if it is missing.
    """
    peft_config = _peft_config(config, _layers_of(adapters))
    peft_config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(str(folder))
    tensors = {f"{_PEFT_PREFIX}{name}": value.contiguous() for name, value in adapters.items()}
    save_file(
        tensors,
        folder / WEIGHTS_FILE,
        metadata={"format": "pt", "lora_adapter_metadata": _for_diffusers(peft_config)},
    )


def save_diffusers(adapters: Mapping[str, Tensor], config: LoraConfig, path: Path) -> None:
    """Writes one file as `save_comfyui`, with keys `transformer.<layer>.lora_A|lora_B.weight`, as diffusers'
    pipelines save them.

    Args:
        adapters: From `adapter_tensors`.
        config: Its scale is multiplied into lora_B.
        path: In a folder that exists.
    """
    _save_one_file(adapters, config, path, key_of=lambda layer: f"{_DIFFUSERS_PREFIX}{layer}")


def save_comfyui(
    adapters: Mapping[str, Tensor], config: LoraConfig, path: Path, *, original_name: Callable[[str], str]
) -> None:
    """Writes one file with keys `diffusion_model.<original layer>.lora_A|lora_B.weight`, for ComfyUI and
    diffusers' pipelines.

    alpha / rank is multiplied into lora_B, so that readers that ignore alpha get the right sum; the metadata
    hold `rank`, `alpha` as trained, and `alpha_is_folded`.

    Args:
        adapters: From `adapter_tensors`.
        config: Its scale is multiplied into lora_B.
        path: In a folder that exists.
        original_name: `Family.original_name`.
    """
    _save_one_file(adapters, config, path, key_of=lambda layer: f"{_COMFYUI_PREFIX}{original_name(layer)}")


def _save_one_file(
    adapters: Mapping[str, Tensor], config: LoraConfig, path: Path, *, key_of: Callable[[str], str]
) -> None:
    tensors = {}
    for layer in _layers_of(adapters):
        key = key_of(layer)
        tensors[f"{key}.lora_A.weight"] = adapters[f"{layer}.lora_A.weight"].contiguous()
        tensors[f"{key}.lora_B.weight"] = (adapters[f"{layer}.lora_B.weight"] * config.scale).contiguous()
    numbers = {"rank": str(config.rank), "alpha": str(config.scale * config.rank), "alpha_is_folded": "true"}
    save_file(tensors, path, metadata={"format": "pt", **numbers})


def load_lora(transformer: nn.Module, folder: Path, *, allowed: Sequence[str]) -> LoraConfig:
    """Wraps `transformer` with the adapters that `save_peft` wrote, in place.

    Args:
        transformer: A plain model, without adapters.
        folder: What `save_peft` made.
        allowed: Patterns of layers that may be wrapped: `Family.lora_targets`.

    Returns:
        What the adapters were trained with; its targets are whole names.

    Raises:
        CheckpointError: If the folder is not readable, holds another kind of adapter, or tensors that do not
            fit the model.
    """
    config, adapters = _read_peft(folder)
    try:
        add_lora(transformer, config, allowed=allowed, seed=0)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: must fit {type(transformer).__name__}. {error}") from error
    state = transformer.state_dict()
    own = {name.replace(f".{_ADAPTER}.", "."): value for name, value in state.items() if ".lora_" in name}
    wrong = [name for name in sorted({*own, *adapters}) if _shape(own, name) != _shape(adapters, name)]
    if wrong:
        found = [f"{name} {_shape(adapters, name)} instead of {_shape(own, name)}" for name in wrong[:3]]
        raise CheckpointError(
            f"{folder}: must hold the adapters' shapes in {type(transformer).__name__}, got "
            f"{'; '.join(found)}. "
            "Take the base model that they were trained on."
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(adapters[name])
    return config


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _end(name: str) -> str:
    """Returns the last part of a name, with what stands before a number: `to_out.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _wrapped_layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _peft_config(config: LoraConfig, layers: Sequence[str]) -> PeftConfig:
    return PeftConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]  # PEFT divides it, so a fraction is fine
        lora_dropout=config.dropout,
        target_modules=list(layers),
        bias="none",
    )


def _for_diffusers(config: PeftConfig) -> str:
    facts = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules or ()),
    }
    return json.dumps({f"{_PEFT_PREFIX}{key}": value for key, value in facts.items()})


def _layers_of(adapters: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight")]


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "none"


def _read_peft(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    try:
        values = json.loads(read_text(folder / CONFIG_FILE))
        adapters = {
            name.removeprefix(_PEFT_PREFIX): value
            for name, value in read_tensors(folder / WEIGHTS_FILE)[0].items()
        }
        rank, alpha, dropout = int(values["r"]), float(values["lora_alpha"]), float(values["lora_dropout"])
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        RecursionError,
        CheckpointError,
    ) as error:
        raise CheckpointError(
            f"{folder}: must hold {CONFIG_FILE} and {WEIGHTS_FILE} of a LoRA adapter ({error})."
        ) from error
    other = [
        key
        for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
        if values.get(key)
    ]
    if other:
        raise CheckpointError(
            f"{folder}: must be a plain LoRA adapter of one rank, got {', '.join(other)}. Convert it first."
        )
    return LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=tuple(_layers_of(adapters))), adapters
