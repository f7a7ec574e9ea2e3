"""The one module that the engine trains in a diffusion run: a transformer behind its family's conventions.

Shape suffixes: B batch, L tokens, D values per token.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.tokens import TokenGrid

TRANSFORMER = "transformer."
"""What stands before the transformer's own names in the names of a `DiffusionModule`."""


class DiffusionModule(nn.Module):
    """Holds a diffusion transformer as `transformer`, so that everything trained is reached through
    `engine(...)`.

    Args:
        transformer: Of the class that `family` describes, with or without adapters.
    """

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        super().__init__()
        self.transformer = transformer
        self.family = family

    def forward(
        self,
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, TokenGrid],
    ) -> dict[str, Tensor]:
        """Predicts the velocity eps - x0 of each modality.

        Args:
            noisy: [B,L,D] of any float type by modality; cast to the transformer's.
            timesteps: [B,L] or [B,1] fp32 in [0,1] by modality; not cast, because 16 bits round 1000 * s.
            tensors: The rest of the batch, as `Family.forward` says.
            grids: Where the tokens lie, by modality.

        Returns:
            [B,L,D] by modality, in the transformer's dtype.

        Raises:
            DataError: If a tensor is missing or has the wrong width.
        """
        dtype = next(self.transformer.parameters()).dtype
        cast = {modality: values_BLD.to(dtype) for modality, values_BLD in noisy.items()}
        return self.family.forward(self.transformer, cast, timesteps, tensors, grids)
