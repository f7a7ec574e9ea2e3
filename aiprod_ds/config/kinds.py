"""Which kind of configuration a file is: a trainer's, of `encode` or of `sample`, by the keys at its top.

A file that looks like none is taken for a trainer's, whose schema then names what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aiprod_ds.config.merge import apply_overrides, read_document

ConfigKind = Literal["trainer", "encode", "sample"]
# Keys that the other kinds do not have; an encode file's `curriculum` is also a trainer's section.
_OWN_KEYS: tuple[tuple[ConfigKind, frozenset[str]], ...] = (
    ("trainer", frozenset({"trainer", "optimizer", "loss", "engine", "checkpoint", "evaluation"})),
    ("sample", frozenset({"prompts", "sampling", "duration", "resolution"})),
    ("encode", frozenset({"video", "audio", "text", "shapes"})),
)


def config_kind(path: Path, overrides: Sequence[str] = ()) -> ConfigKind:
    """Returns the kind of the file, with its `base` files and overrides.

    Raises:
        ConfigError: If it cannot be read.
    """
    document = read_document(path)
    apply_overrides(document, overrides)  # the kind's own reader tells what is wrong with them
    return next((kind for kind, keys in _OWN_KEYS if keys & document.values.keys()), "trainer")
