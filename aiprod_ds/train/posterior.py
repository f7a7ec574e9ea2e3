"""The rule that a VAE trainer's model has a posterior to regularise."""

from __future__ import annotations

from torch import Tensor

from aiprod_ds.curriculum.phase import PhasePlan
from aiprod_ds.errors import ConfigError


def require_posterior(logvar: Tensor | None, phase: PhasePlan) -> Tensor:
    """Returns the log-variance.

    Raises:
        ConfigError: If the model is a deterministic autoencoder.
    """
    if logvar is None:
        raise ConfigError(
            f"loss.kl_weight: needs a model with a posterior, got a deterministic autoencoder in phase {phase.name}. "
            "Use a model whose encode returns a distribution."
        )
    return logvar
