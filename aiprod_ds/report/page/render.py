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

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_OWN = "aiprod_ds.report.page"


def render(template: str, *, package: str = _OWN, name: str = "page", **values: Any) -> str:
    """Returns the page that a template makes of `values`; all text is escaped.

    Args:
        template: Its file name.
        package: Whose folder `templates` holds it; it may use the templates of this package, too.
        name: Of a package's own script and style sheet there, of which the latter stands behind this
            package's.
    """
    script = _text(package, f"{name}.js")
    style = _text(_OWN, "style.css") + ("" if package == _OWN else _text(package, f"{name}.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src 'self' file: data:; media-src 'self' file: data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    return (
        _templates(package)
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            policy=policy,
            version=_version(),
            **values,
        )
    )


@cache
def _templates(package: str) -> Environment:
    packages = dict.fromkeys((package, _OWN))
    return Environment(
        loader=ChoiceLoader([PackageLoader(each) for each in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _text(package: str, name: str) -> str:
    return (resources.files(package) / "templates" / name).read_text(encoding="utf-8")


@cache
def _version() -> str:
    try:
        return metadata.version("aiprod-ds")
    except metadata.PackageNotFoundError:
        return ""
