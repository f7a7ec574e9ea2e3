"""Writes the key tables of docs/configuration.md from the configuration models; `--check` only compares.

    python tools/config_reference.py [--check]

Sections that others share with the video VAE trainer stand once. The text of a key is the docstring under its
field in `aiprod_ds/config/`. Everything outside the two marker lines of the page is written by hand and
stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.config.sample import SampleConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.crash import guarded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- tools/config_reference.py: begin -->\n", "<!-- tools/config_reference.py: end -->\n"
_OTHERS: dict[str, type[BaseModel]] = {
    "audio": AudioVAETrainerConfig,
    "diffusion": DiffusionTrainerConfig,
    "encode": EncodeConfig,
    "sample": SampleConfig,
}
_TYPES = {"string": "text", "boolean": "true or false", "object": "mapping", "null": "null"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def main() -> int:
    """Writes or checks the page; returns 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Key tables of docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    others = (additions(model, VAETrainerConfig, kind=kind) for kind, model in _OTHERS.items())
    wanted = before + BEGIN + "\n".join([reference(VAETrainerConfig), *others]) + END + after
    if not arguments.check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        print(
            f"{PAGE}: must hold what the models say, got something else. Run: python "
            "tools/config_reference.py",
            file=sys.stderr,
        )
        return 1
    return 0


def reference(model: type[BaseModel]) -> str:
    """Returns one heading with one table for `model` and for every section inside it, depth first, each kind
    of section once.

    Raises:
        ValueError: If a key has no description.
    """
    return _text(_sections(model, {}, _places(model)))


def additions(model: type[BaseModel], base: type[BaseModel], *, kind: str) -> str:
    """Returns the sections of `model` that `base` does not have, with `kind` in their headings."""
    places = _places(base)
    known = _sections(base, {}, places)
    kinds = {
        path: kind for path, section in _sections(model, {}, places).items() if known.get(path) != section
    }
    return _text(
        {path: section for path, section in _sections(model, kinds, places).items() if path in kinds}
    )


_Section = tuple[str, str, str]


def _text(sections: dict[str, _Section]) -> str:
    return "\n".join(
        f"{heading}\n\n{introduction}\n\n{table}" for heading, introduction, table in sections.values()
    )


def _places(model: type[BaseModel]) -> dict[str, str]:
    """Returns the path at which each record of `model` has its section; of a record that stands several
    times, the topmost."""
    schema = model.model_json_schema()
    places: dict[str, str] = {}
    waiting = [(schema, "")]
    for record, path in waiting:
        for name, key in record["properties"].items():
            for reference, suffix in _references(key):
                if reference not in places:
                    places[reference] = f"{path}.{name}{suffix}".removeprefix(".")
                    waiting.append((schema["$defs"][reference], places[reference]))
    return places


def _sections(model: type[BaseModel], kinds: dict[str, str], places: dict[str, str]) -> dict[str, _Section]:
    """Returns (heading, introduction, table) of every section by its path.

    Args:
        model: The configuration.
        kinds: What stands in the heading behind a path.
        places: The only path at which a record has a section; one without a place has a section wherever it
            stands.
    """
    schema = model.model_json_schema()
    return dict(_below(schema, "", schema["$defs"], kinds, places))


def _below(
    record: dict[str, Any], path: str, records: dict[str, Any], kinds: dict[str, str], places: dict[str, str]
) -> Iterator[tuple[str, _Section]]:
    """Yields the section of `record`, which stands at `path`, and of the records below it."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    below: list[tuple[dict[str, Any], str]] = []
    for name, key in record["properties"].items():
        here = f"{path}.{name}".removeprefix(".")
        if "description" not in key:
            raise ValueError(
                f"{here}: needs a docstring under its field in aiprod_ds/config/, got none. Add one."
            )
        cells = (
            f"`{here}`",
            _words(key, here, kinds, places),
            _default(name, key, record),
            key["description"],
        )
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
        found = ((reference, f"{here}{suffix}") for reference, suffix in _references(key))
        below += [
            (records[reference], child) for reference, child in found if places.get(reference, child) == child
        ]
    heading = f"### {f'`{path}`' if path else 'Top level'}" + (f" ({kinds[path]})" if path in kinds else "")
    yield path, (heading, record["description"], "\n".join(rows) + "\n")
    for child, child_path in below:
        yield from _below(child, child_path, records, kinds, places)


def _words(key: dict[str, Any], path: str, kinds: dict[str, str], places: dict[str, str]) -> str:
    """Returns the type of a key in words, with its bounds: `integer >= 1 or null`."""
    sections = []
    for reference, suffix in _references(key):
        child = places.get(reference, path + suffix)
        anchor = _anchor(child) + (f"-{kinds[child]}" if child in kinds else "")
        # Headings that differ in brackets alone get a number, in the order of the page.
        number = sum(f"(#{anchor}" in section for section in sections)
        is_list = suffix == "[]"
        sections.append(f"{'list of ' * is_list}[section](#{anchor}{f'-{number}' if number else ''})")
    named = key.get("additionalProperties")
    if sections and isinstance(named, dict):
        plain = [_plain(choice) for choice in _choices(named) if "$ref" not in choice]
        return f"mapping of names to {' or '.join([*plain, *sections])}"
    if sections:
        return " or ".join(sections) + " or null" * ({"type": "null"} in _choices(key))
    if _choices(key):
        return " or ".join(_words(choice, path, kinds, places) for choice in _choices(key))
    if "prefixItems" in key:
        return f"list of {len(key['prefixItems'])}, each {_words(key['prefixItems'][0], path, kinds, places)}"
    if key["type"] == "array":
        return f"list of {_words(key['items'], path, kinds, places)}"
    return _plain(key)


def _plain(key: dict[str, Any]) -> str:
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if isinstance(key.get("additionalProperties"), dict):
        return f"mapping of names to {_plain(key['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {key[name]:g}" for name, sign in _BOUNDS.items() if name in key)
    return f"{_TYPES.get(key['type'], key['type'])} {bounds}".rstrip()


def _references(key: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the names of the records that a key may hold, and what stands behind the key's path then: `[]`
    for a list of them, `.NAME` for a mapping, else nothing."""
    found = []
    for choice in (key, *_choices(key)):
        suffix = "[]" if choice.get("type") == "array" else ""
        held = choice.get("items", {}) if suffix else choice
        if "$ref" in held:
            found.append((held["$ref"].rpartition("/")[2], suffix))
    named = key.get("additionalProperties")
    for choice in _choices(named) if isinstance(named, dict) else ():
        found += [(choice["$ref"].rpartition("/")[2], ".NAME")] if "$ref" in choice else []
    return found


def _choices(key: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what a key may be, one of several; empty if there is one form only."""
    choices: list[dict[str, Any]] = key.get("anyOf", key.get("oneOf", []))
    return choices


def _default(name: str, key: dict[str, Any], record: dict[str, Any]) -> str:
    if name in record.get("required", ()):
        return "required"
    if "default" not in key:  # made anew for every record, so the schema does not state it
        return "see there" if key["type"] == "array" else "`{}`"
    default = key["default"]
    if isinstance(default, dict):
        return "its defaults"
    return f"`{default if isinstance(default, str) and default else json.dumps(default)}`"


def _anchor(path: str) -> str:
    """Returns the anchor that a heading with `path` in it gets on the page."""
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "_-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(guarded(main, program="tools/config_reference.py"))
