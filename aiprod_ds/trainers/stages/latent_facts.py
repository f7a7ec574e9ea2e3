"""What the latents of a VAE are and which of its weights they depend on, found out without weights.

Called before training, by the trainers of VAEs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.errors import ConfigError
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.vae import WrappedVAE


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFacts:
    """What one pass of a clip without values shows.

    Attributes:
        depend_on: Names of the parameters that mean and log-variance depend on, as in `named_parameters()` of
            the module around the VAE.
        has_posterior: Whether there is a log-variance.
    """

    depend_on: frozenset[str]
    has_posterior: bool


def latent_facts(module: WrappedVAE, clip: Tensor) -> LatentFacts | None:
    """Returns the facts; None if the model does not run without weights.

    Args:
        module: Left as it is; its tensors may be on the meta device.
        clip: A batch of one on the meta device, in the type that the module takes.

    Raises:
        ConfigError: If it fails in a way that has nothing to do with that.
    """
    blank: Any = on_meta(module)
    blank.freeze((), latents_depend_on=())
    names = {id(parameter): name for name, parameter in blank.named_parameters()}
    try:
        with torch.enable_grad():
            _, mean, logvar = blank(clip)
    except (RuntimeError, ValueError, NotImplementedError):
        return None  # some models make tensors on the CPU inside of forward
    except Exception as error:  # what a model does with an odd configuration is its own affair
        shape, said = list(clip.shape), f"{type(error).__name__}: {error}"
        raise ConfigError(f"model: must take a clip {shape}, got {said:.200}. Check model.config.") from error
    latents = [mean] if logvar is None else [mean, logvar]
    found = frozenset(names[id(leaf)] for leaf in _leaves(latents) if id(leaf) in names)
    return LatentFacts(depend_on=found, has_posterior=logvar is not None)


def _leaves(outputs: list[Tensor]) -> Iterator[Tensor]:
    """Yields the leaves of the graph behind `outputs`."""
    nodes: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
