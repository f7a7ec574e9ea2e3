"""The commands for who begins, `examples`, `init` and `validate`: their arguments; and what the program says
of itself, its version and the completion for shells. Called by cli.py, which prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

_SHELLS = ("bash", "zsh", "tcsh")
_EXAMPLES = """\
A configuration is used by its name from any folder, without a copy: aiprod-ds train video_vae/tiny

examples:
  aiprod-ds examples                                # what there is
  aiprod-ds examples video_vae/tiny --to my_run     # my_run/configs/video_vae/tiny.yaml, to be edited
  aiprod-ds examples all --to .                     # everything, as it lies in the repository
"""


def add_program(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are no command's."""
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the version, those of torch and DeepSpeed too"
    )
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=_SHELLS,
        metavar="SHELL",
        help="print what completes commands and options in bash, zsh or tcsh",
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.exit(message=f"aiprod-ds {version('aiprod_ds')}, torch {version('torch')}, "
                    f"deepspeed {version('deepspeed')}\n")  # fmt: skip


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, *__: Any) -> None:
        import shtab

        parser.exit(message=f"{shtab.complete(parser, values)}\n")


def add_examples(commands: Any) -> argparse.ArgumentParser:
    """Adds `examples` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "examples",
        help="list the shipped configurations, settings, scripts and sample clips, or copy some",
        description="Lists what is shipped, or copies some of it to be edited.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to copy, or `all`; none: list them")
    parser.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="where copies go (default: here)"
    )
    return parser


def list_or_copy(arguments: argparse.Namespace) -> Table | Sequence[str]:
    """Returns the list of all examples, or the files that were copied.

    Raises:
        ConfigError: As `copy_examples`.
    """
    from aiprod_ds.starting.examples import copy_examples, examples

    if arguments.names:
        return [str(path) for path in copy_examples(arguments.names, arguments.to)]
    table = Table(box=None, pad_edge=False)
    for name in ("name", "what it is for", "command"):
        table.add_column(name, overflow="fold")
    for example in examples():
        table.add_row(example.name, example.text, example.command)
    return table
