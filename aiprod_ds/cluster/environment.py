"""The environment of the ranks on other hosts: files of `NAME=VALUE` lines, and how they pass through pdsh's
shells unharmed.

DeepSpeed writes values into a shell command with double quotes around them at most, and stops at blank lines.
So its file is made here, from values that mean nothing to a shell between double quotes. Called by the
launcher and the doctor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from aiprod_ds.errors import ConfigError
from aiprod_ds.files import read_text

# What DeepSpeed passes on by itself: multinode runner's EXPORT_ENVS and the GPUs' own (deepspeed 0.19.8,
# launcher/runner.py:39).
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
# What decides on which processors and how the ranks run, and so must be equal everywhere; an env file may say
# otherwise.
_EXPORTED_BY_US = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALIVE_IN_QUOTES = re.compile(r'["$`\\]|[\x00-\x1f\x7f]')
_OF_THE_LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
}


def read_environment(path: Path) -> dict[str, str]:
    """Returns the variables of an environment file.

    Raises:
        ConfigError: With every bad line, or if the file cannot be read.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: must be a readable text file, got {error}. Begin with a copy of launch/env.example."
        ) from error
    return parse_environment(text, str(path))


def parse_environment(text: str, where: str) -> dict[str, str]:
    """Returns the variables of an environment file's text: one `NAME=VALUE` a line, blank lines and `#` lines
    between them.

    A value is everything after the `=`, without blanks at its ends; spaces and single quotes in it are kept.

    Raises:
        ConfigError: With every line that is not of this form, sets a variable twice or one that the launcher
            owns, or has a value that a shell would change or run.
    """
    values: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, sign, value = entry.partition("=")
        value = value.strip()
        problem = _problem(name, sign, value)
        if problem is None and name in values:
            problem = f"must set {name} once, got it again. Remove one of the two."
        if problem is not None:
            problems.append(f"{where}:{number}: {problem}")
        values[name] = value
    if problems:
        raise ConfigError(problems)
    return values


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what of this process's environment the ranks on other hosts get.

    Raises:
        ConfigError: With every variable whose value a shell would change or run.
    """
    chosen = {
        name: value
        for name, value in environment.items()
        if name in _EXPORTED_BY_US or name.startswith(_EXPORTED_BY_DEEPSPEED)
    }
    problems = [
        f"environment: {name}: {problem}"
        for name, value in sorted(chosen.items())
        if (problem := _problem(name, "=", value))
    ]
    if problems:
        raise ConfigError(problems)
    return chosen


def render_for_pdsh(values: Mapping[str, str]) -> str:
    """Returns a file for DeepSpeed's `DS_ENV_FILE`: no blank lines, and `%` doubled, because pdsh replaces
    %h, %n and %u."""
    return "".join(f"{name}={value.replace('%', '%%')}\n" for name, value in values.items())


def default_environment_files() -> list[Path]:
    """Returns the files that DeepSpeed would read by itself: `$DS_ENV_FILE`, or what exists of
    `.deepspeed_env` in the home folder and in the working folder; a later one overrides."""
    named = os.environ.get("DS_ENV_FILE")
    candidates = [Path(named)] if named else [Path.home() / ".deepspeed_env", Path(".deepspeed_env")]
    return [path for path in candidates if path.is_file() or path == Path(named or "")]


def _problem(name: str, sign: str, value: str) -> str | None:
    """Returns what is wrong with an entry; None if it is good. Values are not shown: some are secrets."""
    if not sign or _NAME.fullmatch(name) is None:
        return (
            f"must have the form `NAME=VALUE`, without `export` and blanks around the =, got {name[:40]!r} "
            "at its start."
        )
    if name in _OF_THE_LAUNCHER:
        return f"{name} is set by the launcher for every rank. Remove the line."
    found = _ALIVE_IN_QUOTES.search(value)
    if found is not None:
        return (
            f"the value of {name} must be the text itself, without double quotes, $, ` and \\, got "
            f"{found[0]!r}. "
            "Nothing is expanded or unquoted: write spaces as they are and other variables' values in full."
        )
    if value[:1] == "'" == value[-1:]:
        return (
            f"the value of {name} must be the text itself, got quotes around it. Remove them; spaces are "
            "kept."
        )
    return None
