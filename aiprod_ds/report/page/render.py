"""From templates to a page: one file with its styles and its script in it, that loads nothing and lets
nothing else run.

The page forbids itself everything but its own script, so that no text of a run, whatever its clips and
prompts are called, can do anything in it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Returns the page that a template of this package makes of `values`; all text is escaped."""
    script = _text("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src 'self' file: data:; media-src 'self' file: data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    return (
        _templates()
        .get_template(template)
        .render(
            style=Markup(_text("style.css")),
            script=Markup(script),
            policy=policy,
            version=_version(),
            **values,
        )
    )


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("aiprod_ds.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _text(name: str) -> str:
    return (resources.files("aiprod_ds.report.page") / "templates" / name).read_text(encoding="utf-8")


@cache
def _version() -> str:
    try:
        return metadata.version("aiprod-ds")
    except metadata.PackageNotFoundError:
        return ""
