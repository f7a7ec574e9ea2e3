"""Which family a transformer belongs to.

The one list of families: a new one is a file beside this one and a line here.
"""

from __future__ import annotations

from torch import nn

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.wan import Wan

FAMILIES: tuple[type[Family], ...] = (LTXVideo, LTX2, Wan)
FIRST: type[Family] = LTXVideo  # what a first configuration trains, and what an installation is tried with


def find_family(transformer: nn.Module, strides: ModelStrides) -> Family:
    """Returns the description of `transformer`, by the name of its class or of a class that it is derived
    from.

    Args:
        transformer: May be on the meta device.
        strides: Of the video VAE that made the latents.

    Raises:
        ConfigError: If no family knows the class, or the family cannot feed this variant.
    """
    names = {ancestor.__name__ for ancestor in type(transformer).__mro__}
    for family in FAMILIES:
        if family.transformer_class in names:
            return family.of(transformer, strides)
    known = ", ".join(family.transformer_class for family in FAMILIES)
    raise ConfigError(
        f"model.source: must be a transformer of a known family ({known}), got {type(transformer).__name__}. "
        'Use one of them, or write a family for it (docs/guide.md, "Adding a family").'
    )
