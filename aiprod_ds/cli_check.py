"""The option `--read-all` of `check`: every clip is read to its end before a run meets it.

Owns the option and its words; reading is `aiprod_ds.data.reading.read_all`'s. Called by `cli.py`, which
prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from aiprod_ds.errors import ConfigError, PlanError


def add_read_all(parser: argparse.ArgumentParser) -> None:
    """Adds the option to the parser of `check`."""
    parser.add_argument(
        "--read-all",
        action="store_true",
        help="read every clip of training and validation to its end, and list those that cannot be",
    )


def require_clips_of_training(arguments: argparse.Namespace, kind: str) -> None:
    """Checks that the option has a meaning for the kind of configuration.

    Raises:
        ConfigError: If it is none of a trainer.
    """
    if arguments.read_all and kind != "trainer":
        raise ConfigError(
            f"{arguments.config}: --read-all: is for the clips of training and validation, got a "
            f"configuration of {kind}. Leave it out."
        )


def read_all(data: Any, plan: Any, *, max_fraction: float, source: str) -> Iterator[str]:
    """Reads all clips and yields, in words, those that cannot be read and how many were read.

    Args:
        data: The clips of a run, a `ClipData`.
        plan: The phases, a `RunPlan`.
        max_fraction: `data.max_unreadable_fraction`, of training clips and of held-out clips each.
        source: How messages name the configuration.

    Raises:
        PlanError: After the list, if there are more than `max_fraction` of either.
    """
    sets = (
        ("training", len(data.train_clips), data.unread_for_training(plan)),
        ("held-out", len(data.validation_clips), data.unread_held_out(plan)),
    )
    problems = []
    for kind, count, unread in sets:
        yield from (f"cannot be read: {clip.name}: {clip.reason}" for clip in unread)
        yield f"{count - len(unread)} of {count} {kind} clips can be read to their end"
        if len(unread) > max_fraction * count:
            problems.append(
                f"{source}: data: at most {max_fraction:.0%} of the {kind} clips may be unreadable, got "
                f"{len(unread)} of {count}, listed above. Repair or remove them, or raise "
                "data.max_unreadable_fraction."
            )
    if problems:
        raise PlanError(problems)
