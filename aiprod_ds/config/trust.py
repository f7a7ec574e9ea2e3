"""Whether a configuration may name code of its own: `--trust-code`, or `trust_code: true` in the file.

Owns the rule and its words. To import a module is to run it, so the rule stands where a file is read, before
anything is imported. What a program of one's own puts into these records is its own code and is not judged,
nor is a run folder's copy of a configuration, of which nothing is imported. Called by `load`; `model` and
`video_vae` mark the keys that it is about.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from aiprod_ds.config.merge import Document
from aiprod_ds.import_path import INSTALLED, is_installed

KEY = "trust_code"


def _judged(path: str, info: ValidationInfo) -> str:
    # Only `load` gives a context, and says in it whether the file may name code.
    if info.context is not None and not info.context[KEY]:
        problem = untrusted(path)
        if problem is not None:
            raise ValueError(problem)
    return path


CodePath = Annotated[str, AfterValidator(_judged)]


def untrusted(path: str) -> str | None:
    """Returns what is wrong with `path` in a file that may not name code; None for an installed package's and
    for what is no import path."""
    if ":" not in path or is_installed(path):
        return None
    return (
        f"names code outside of {' and '.join(INSTALLED)}, which runs only if it is trusted, got {path!r}. "
        f"If you would run it yourself, add --trust-code, or `{KEY}: true` to the file."
    )


def take_trust(document: Document, problems: list[str], *, by_option: bool) -> bool:
    """Takes `trust_code` out of the document, to which it is what `base` is, and returns whether code is
    trusted."""
    value = document.values.pop(KEY, False)
    if not isinstance(value, bool):
        problems.append(
            f"{document.origin((KEY,))}: {KEY}: must be true or false, got {str(value)[:80]!r}. Correct the "
            "value."
        )
    return by_option or value is True
