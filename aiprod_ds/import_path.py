"""An import path `package.module:Name` becomes what it names: the one way in which a configuration runs code
of its user's own.

Owns the import, its message, and which packages need no trust. Called for `model.source`, for `trainer` and
for the network of rFVD. Whether a file may name code at all is judged when it is read, before anything is
imported: `aiprod_ds.config.schema`. A run folder may be someone else's, so what is read of it imports nothing
that it names: see `load.read_saved_run` and `aiprod_ds.convert.diffusers_config`.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from aiprod_ds.errors import ConfigError

INSTALLED = ("aiprod_ds", "diffusers")  # whoever runs this program runs their code anyway


def is_installed(path: str) -> bool:
    """Returns whether `path` is inside of a package that is known, so that importing it needs no trust."""
    return path.partition(":")[0].partition(".")[0] in INSTALLED


def import_object(path: str, *, key: str) -> Any:
    """Returns the class or function that `path` names; its module is imported like any other.

    Args:
        path: `package.module:Name`.
        key: Of the configuration, for messages.

    Raises:
        ConfigError: If there is no such module, importing it fails in any way, or it has no such name.
    """
    module_name, _, attribute = path.partition(":")
    if module_name.startswith("."):  # importlib refuses it with a TypeError, which a module may raise too
        raise ConfigError(f"{key}: must be importable, got {path!r}, a relative import. Name its package.")
    if not all(name.isidentifier() for name in (*module_name.split("."), attribute)):
        raise ConfigError(f"{key}: must be importable, got {path!r}. Write package.module:Name.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"{key}: must be importable, got {path!r} ({error}). Check the spelling and PYTHONPATH."
        ) from error


def import_factory(path: str, *, key: str) -> Callable[..., Any]:
    """Returns what `path` names if it says that calling it makes a torch module; nothing is called.

    A class of `torch.nn.Module` says so, and a function by its return annotation; of installed packages,
    whose functions were not written to be named in configurations, classes alone count.

    Raises:
        ConfigError: As `import_object`, or if it is anything else.
    """
    found: Any = import_object(path, key=key)
    if is_module_class(found) or (not is_installed(path) and _returns_module(found)):
        return found  # type: ignore[no-any-return]
    kind = "the class" if isinstance(found, type) else f"a {type(found).__name__}"
    raise ConfigError(
        f"{key}: must make a torch module: be a class of torch.nn.Module or a function of your own whose "
        f"return annotation is one, got {kind} {path!r}. Name another, or annotate it: `-> nn.Module`."
    )


def is_module_class(found: object) -> bool:
    """Returns whether `found` is a class of `torch.nn.Module`; loads torch."""
    from torch import nn  # takes seconds to import; reading a configuration does without

    return isinstance(found, type) and issubclass(found, nn.Module)


def _returns_module(found: object) -> bool:
    if not inspect.isfunction(found):
        return False
    try:
        annotation: object = typing.get_type_hints(found).get("return")
    except Exception:  # noqa: BLE001  an annotation is code, and may fail in any way: then it says nothing
        return False
    return is_module_class(annotation)
