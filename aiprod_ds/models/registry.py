"""Turns `model.source` into a module: a diffusers class by name, or any import path.

Owns name resolution and construction; knows nothing about what the model is for. Called by the trainers and
by `plan`, which builds on the meta device so that no memory is taken.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aiprod_ds import progress
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.import_path import import_factory, is_module_class
from aiprod_ds.rng import stream_seed


def build_model(config: ModelConfig, *, seed: int, device: str = "cpu") -> nn.Module:
    """Returns the module that `config` names, in fp32 and training mode.

    Random weights depend on `seed` alone, so that all ranks build the same model.

    Args:
        config: Where the class and its arguments or weights come from.
        seed: Without effect where `config.pretrained` gives the weights.
        device: `"meta"` builds shapes only, for planning.

    Raises:
        ConfigError: If the source does not resolve, its constructor refuses the arguments or the weights
            cannot be loaded.
    """
    factory = resolve(config.source)
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        # diffusers' Oobleck uses the old weight_norm, which the modules that wrap VAEs replace.
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        torch.manual_seed(stream_seed(seed, "weights"))
        module = _construct(factory, config, is_plan=device == "meta")
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.source: must make a torch module, got {type(module).__name__} from {config.source!r}."
        )
    return module.train()


def resolve(source: str) -> Callable[..., Any]:
    """Returns the class or function that `source` names: `AutoencoderKLWan` in diffusers, or
    `package.module:Name`. That it makes a module is judged before it is called.

    Raises:
        ConfigError: If there is none, or it is not said to make a torch module.
    """
    if ":" in source:
        return import_factory(source, key="model.source")
    import diffusers  # takes seconds to import; needed only here

    try:
        found = getattr(diffusers, source, None)
    except Exception as error:  # diffusers imports the class's file now, and what that needs may be missing
        raise ConfigError(
            f"model.source: must be a class that diffusers can load here, got {source!r} ({error})."
        ) from error
    if found is None:
        near = difflib.get_close_matches(source, dir(diffusers), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            "model.source: must name a diffusers class or an import path 'package.module:Name', got "
            f"{source!r}.{hint}"
        )
    if not is_module_class(found):
        raise ConfigError(
            f"model.source: must name a model of diffusers, got {source!r}, which is no torch module. Name a "
            "model's class."
        )
    return found  # type: ignore[no-any-return]  # diffusers resolves names lazily and is untyped


def _construct(factory: Callable[..., Any], config: ModelConfig, *, is_plan: bool) -> Any:
    try:
        if config.pretrained is None:
            return factory(**config.config)
        if is_plan:
            return factory.from_config(factory.load_config(config.pretrained, **_place(config)))  # type: ignore[attr-defined]
        with progress.working(f"loading {config.pretrained}", has_own_bar=True):
            module = _pretrained(factory, config.pretrained, _place(config))
    except ConfigError:
        raise
    except Exception as error:  # a constructor that is given what it does not expect may fail in any way
        where = "model.config" if config.pretrained is None else "model.pretrained"
        got = config.config if config.pretrained is None else config.pretrained
        raise ConfigError(f"{where}: {config.source} must accept it, got {got!r} ({error}).") from error
    return module


def _place(config: ModelConfig) -> dict[str, str]:
    return {} if config.subfolder is None else {"subfolder": config.subfolder}


def _pretrained(factory: Any, folder: str, place: dict[str, str]) -> Any:
    """Returns the model with all its weights: diffusers only logs those that are missing, surplus or of
    another shape."""
    from diffusers import ModelMixin  # takes seconds to import; needed only here

    if not (isinstance(factory, type) and issubclass(factory, ModelMixin)):
        return factory.from_pretrained(folder, torch_dtype=torch.float32, **place)
    from_pretrained: Any = factory.from_pretrained
    module, found = from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True, **place)
    problems = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if problems:
        told = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in sorted(problems.items())
        )
        raise ConfigError(
            f"model.pretrained: must hold exactly the weights of {factory.__name__}, got {folder!r} with "
            f"{told}. "
            "Name the folder of this very model."
        )
    return module
