"""The doctor's visit: which hosts, with which environment, and the page of what was found. Called by the
command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from aiprod_ds.cluster.examine import Examiner
from aiprod_ds.cluster.findings import judge
from aiprod_ds.cluster.hostfile import Host, read_hostfile, select_hosts
from aiprod_ds.cluster.options import ssh_of
from aiprod_ds.cluster.start import ranks_environment
from aiprod_ds.cluster.view import DoctorView
from aiprod_ds.errors import ConfigError

_CPU_RANKS = 2


def visit(arguments: argparse.Namespace) -> DoctorView:
    """Returns what was found on the hosts of the hostfile, or on this machine without one.

    Raises:
        ConfigError: If hostfile, environment or options are wrong; no host has been asked.
    """
    hosts: tuple[Host, ...] = ()
    environment: Mapping[str, str] = {}
    problems: list[str] = []
    try:
        hosts = _hosts(arguments)
    except ConfigError as error:
        problems += error.problems
    try:
        environment = ranks_environment(arguments.env_file, for_ssh=arguments.hostfile is not None)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    examiner = Examiner(
        hosts=hosts,
        ssh=None if arguments.hostfile is None else ssh_of(arguments),
        environment=environment,
        run_folder=arguments.run_folder,
        master_address=arguments.master_addr,
    )
    found = examiner.examine(measures=True)
    return DoctorView(found=found, findings=judge(found))


def _hosts(arguments: argparse.Namespace) -> tuple[Host, ...]:
    if arguments.hostfile is not None:
        return select_hosts(
            read_hostfile(arguments.hostfile), include=arguments.include, exclude=arguments.exclude
        )
    if arguments.include or arguments.exclude:
        raise ConfigError(
            "--include, --exclude: have no effect without --hostfile. Remove them, or name one."
        )
    import torch

    from aiprod_ds.cluster.probe import uses_cpu  # loads torch, which takes seconds

    slots = _CPU_RANKS if uses_cpu(os.environ) else torch.cuda.device_count()
    return (Host(name="localhost", slots=tuple(range(slots))),)
