"""Training or encoding on every accelerator of this machine, by the shipped launch scripts.

Owns the translation of `aiprod-ds launch` without a hostfile; free port, signals and exit code are the
scripts'. Called by the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from aiprod_ds.config.load import config_kind, load_config, load_encode_config
from aiprod_ds.errors import ConfigError
from aiprod_ds.report.command import VARIABLE, encoded, typed_command
from aiprod_ds.shipped import lookup

# Options that are about several hosts, and what they are when they are not given.
_OF_HOSTS: Mapping[str, object] = {
    "--include": "",
    "--exclude": "",
    "--env-file": None,
    "--ssh-port": None,
    "--ssh-config": None,
    "--no-ssh": False,
    "--node-rank": None,
    "--master-addr": None,
    "--master-port": None,
    "--bind-cores": False,
    "--max-restarts": 0,
}


def command_here(arguments: argparse.Namespace) -> list[str]:
    """Returns the command that runs what the options of `launch` ask for on this machine.

    Raises:
        ConfigError: If the configuration is wrong or of `sample`, or an option has no effect here.
    """
    given = {name: getattr(arguments, name[2:].replace("-", "_")) for name in _OF_HOSTS}
    problems = [
        f"{name}: has no effect without --hostfile, got {given[name]!r}. Remove it, or name the hosts."
        for name, default in _OF_HOSTS.items()
        if given[name] != default
    ]
    if problems:
        raise ConfigError(problems)
    config, overrides, trust = arguments.config, arguments.overrides, arguments.trust_code
    folder = None if arguments.run_folder is None else str(arguments.run_folder)
    options = [part for value in overrides for part in ("--set", value)]
    options += [
        flag for flag in ("--trust-code", "--verbose") if getattr(arguments, flag[2:].replace("-", "_"))
    ]
    kind = config_kind(config, overrides)
    if kind == "sample":
        raise ConfigError(
            f"{config}: must be a configuration of train or encode, got one of sample. It takes one process: "
            "aiprod-ds sample."
        )
    if kind == "encode":
        load_encode_config(config, overrides, folder, trust_code=trust)
        output = [] if folder is None else ["--output-dir", folder]
        return [*_script("encode_local.sh"), str(config), *output, *options]
    run_folder = load_config(config, overrides, folder, trust_code=trust).output_dir
    options += ["--resume", arguments.resume]
    options += ["--accept-changed-data"] if arguments.accept_changed_data else []
    return [*_script("train_local.sh"), str(config), run_folder, *options]


def become(command: Sequence[str]) -> None:
    """Replaces this process by `command`, so that signals and exit code are its own."""
    environment = {**os.environ, "VENV": sys.prefix, VARIABLE: encoded(typed_command(sys.argv))}
    os.execvpe(command[0], list(command), environment)


def _script(name: str) -> list[str]:
    return ["bash", str(lookup.shipped("launch") / name)]
