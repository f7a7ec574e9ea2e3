"""An import path `package.module:Name` becomes what it names: the one way in which a configuration runs code
of its user's own.

Owns the import and its message. Called for `model.source` and for `trainer` of files that a user trains or
plans with. A run folder may be someone else's, so what is read of it imports nothing that it names: see
`load.read_saved_run` and `aiprod_ds.convert.diffusers_config`.
"""

from __future__ import annotations

import importlib
from typing import Any

from aiprod_ds.errors import ConfigError


def import_object(path: str, *, key: str) -> Any:
    """Returns the class or function that `path` names; its module is imported like any other.

    Args:
        path: `package.module:Name`.
        key: Of the configuration, for messages.

    Raises:
        ConfigError: If there is no such module or it has no such name.
    """
    module_name, _, attribute = path.partition(":")
    if module_name.startswith("."):  # importlib refuses it with a TypeError, which a module may raise too
        raise ConfigError(f"{key}: must be importable, got {path!r}, a relative import. Name its package.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}: must be importable, got {path!r} ({error}). Check the spelling and PYTHONPATH."
        ) from error
