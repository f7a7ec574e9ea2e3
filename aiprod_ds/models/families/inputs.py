"""The checks that all families make on the tensors of a batch and on a transformer's configuration.

Owns messages, so that they say the same everywhere. Called by the families.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.models.families.protocol import LATENTS
from aiprod_ds.models.families.tokens import Tokens, tokens_of


def latent_tokens(
    tensors: Mapping[str, Tensor], modality: str, *, patch: tuple[int, ...], token_width: int, family: str
) -> Tokens:
    """Returns the tokens of one modality.

    Raises:
        DataError: If the latents are missing, do not fit the patch, or have not the channels that the
            transformer takes.
    """
    name = LATENTS[modality]
    tokens = tokens_of(require(tensors, name, family=family), patch)
    if tokens.values.shape[2] != token_width:
        raise DataError(
            f"{name}: the transformer of {family!r} takes {token_width} values per token, got "
            f"{tokens.values.shape[2]} from "
            f"latents {list(tensors[name].shape)} with patch {list(patch)}. Encode with the VAE that "
            "belongs to the transformer, "
            "or set the transformer's input channels to the VAE's."
        )
    return tokens


def prompt(tensors: Mapping[str, Tensor], name: str, *, width: int, family: str) -> Tensor:
    """Returns text embeddings [B,S,width].

    Raises:
        DataError: If they are missing or have another width.
    """
    embeds = require(tensors, name, family=family)
    if embeds.dim() != 3 or embeds.shape[2] != width:
        raise DataError(
            f"{name}: the transformer of {family!r} takes [B, S, {width}], got {list(embeds.shape)}. "
            "Encode with the text encoder that belongs to the transformer, or set its caption channels to "
            "the encoder's."
        )
    return embeds


def frame_rates(tensors: Mapping[str, Tensor], *, num_axes: int, family: str) -> Tensor:
    """Returns frames per second as fp32 [B, 1, ...] of `num_axes` axes, to divide positions by.

    Raises:
        DataError: If they are missing.
    """
    return require(tensors, "fps", family=family).float().view(-1, *[1] * (num_axes - 1))


def require(tensors: Mapping[str, Tensor], name: str, *, family: str) -> Tensor:
    """Returns the tensor called `name`.

    Raises:
        DataError: If there is none.
    """
    if name not in tensors:
        raise DataError(
            f"{name}: the family {family!r} needs it in every sample, got {sorted(tensors)}. Encode it."
        )
    return tensors[name]


def same_width_out(family: str, *, channels_in: int, channels_out: int | None) -> None:
    """Checks that a transformer answers in the shape of its input, as text-to-video models do.

    Raises:
        ConfigError: If it does not.
    """
    if channels_out not in (None, channels_in):
        raise ConfigError(
            f"model: a transformer of the family {family!r} must have out_channels equal to in_channels, "
            f"got {channels_out} and "
            f"{channels_in}. Variants with conditions joined to their input channels cannot be trained here."
        )
