"""The options of `aiprod-ds launch` and `aiprod-ds doctor`. Loads nothing heavy: every command passes by
here."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiprod_ds.cluster.ssh import Ssh
from aiprod_ds.cluster.start import Request
from aiprod_ds.errors import ConfigError


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `launch`."""
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "run_folder",
        type=Path,
        nargs="?",
        help="in place of the configuration's; needed with --hostfile, on a file system that all hosts share",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        help="lines of `name slots=N`; without it every accelerator of this machine is used, or its CPU by "
        "two processes; CONFIG may then be one of encode, too",
    )
    _add_hosts(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as of `train`"
    )
    parser.add_argument("--resume", default="auto", help="as of `train`")
    parser.add_argument("--accept-changed-data", action="store_true", help="as of `train`")
    parser.add_argument("--trust-code", action="store_true", help="as of `train`")
    parser.add_argument(
        "--no-ssh", action="store_true", help="start this host's ranks only; the same command on every host"
    )
    parser.add_argument(
        "--node-rank", type=int, help="with --no-ssh: index of this host; else Slurm's or by the host's name"
    )
    parser.add_argument(
        "--master-addr", help="address of the first host, as the others reach it; else found out, or its name"
    )
    parser.add_argument(
        "--master-port", type=int, help="free on the first host; else found out, or 29500 with --no-ssh"
    )
    parser.add_argument(
        "--bind-cores", action="store_true", help="with --no-ssh: cores of its own for every rank, by numactl"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again up to N times where ranks fail, hang or are lost; not after bad input or a stop",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the command")
    parser.add_argument("--verbose", action="store_true", help="show the command and what libraries log, too")


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `doctor`."""
    parser.add_argument("--hostfile", type=Path, help="hosts to examine through ssh; without it this machine")
    _add_hosts(parser)
    parser.add_argument(
        "--run-folder", type=Path, help="where a run would write: room, speed, shared by all hosts"
    )
    parser.add_argument(
        "--master-addr", help="address of the first host, as the others reach it; else found out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def launch_request(arguments: argparse.Namespace) -> Request:
    """Returns what the options of `launch` say.

    Raises:
        ConfigError: If there is no run folder.
    """
    if arguments.run_folder is None:
        raise ConfigError("RUN_FOLDER: must be given with --hostfile, got none. Add one.")
    return Request(
        config=arguments.config,
        run_folder=arguments.run_folder,
        hostfile=arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        overrides=tuple(arguments.overrides),
        resume=arguments.resume,
        accept_changed_data=arguments.accept_changed_data,
        trust_code=arguments.trust_code,
        env_file=arguments.env_file,
        ssh=ssh_of(arguments),
        no_ssh=arguments.no_ssh,
        node_rank=arguments.node_rank,
        master_address=arguments.master_addr,
        master_port=arguments.master_port,
        bind_cores=arguments.bind_cores,
        max_restarts=arguments.max_restarts,
        dry_run=arguments.dry_run,
        verbose=arguments.verbose,
    )


def ssh_of(arguments: argparse.Namespace) -> Ssh:
    """Returns how the options say that hosts are reached."""
    return Ssh(port=arguments.ssh_port, config=arguments.ssh_config)


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include", default="", help="only these hosts and slots: NAME[:SLOT,SLOT][@NAME...]"
    )
    parser.add_argument("--exclude", default="", help="all but these")
    parser.add_argument(
        "--env-file", type=Path, help="NAME=VALUE lines for the ranks; else $DS_ENV_FILE or .deepspeed_env"
    )
    parser.add_argument("--ssh-port", type=int)
    parser.add_argument("--ssh-config", type=Path, help="in place of ~/.ssh/config")
