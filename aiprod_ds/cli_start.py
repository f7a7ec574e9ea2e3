"""The commands for who begins, `examples`, `init` and `validate`: their arguments; and what the program says
of itself, its version and the completion for shells. Called by cli.py, which prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.prompt import IntPrompt, Prompt
from rich.table import Table
from rich.text import Text

from aiprod_ds.cli_convert import count
from aiprod_ds.errors import ConfigError
from aiprod_ds.planner.hardware import MACHINES

if TYPE_CHECKING:
    from aiprod_ds.starting.begin import Begun
    from aiprod_ds.validate.run import Validation

_SHELLS = ("bash", "zsh", "tcsh")
_KINDS = {
    "video_vae": "an autoencoder of video (LTX-Video's)",
    "audio_vae": "an autoencoder of sound (Oobleck)",
    "ltx_lora": "adapters on LTX-Video, for a subject or a style",
    "ltx_full": "all weights of LTX-Video",
}
_LTX = "Lightricks/LTX-Video"
_CPU = "cpu"
_MOST_RANKS = 1_000_000
_EXAMPLES = """\
A configuration is used by its name from any folder, without a copy: aiprod-ds train video_vae/tiny

examples:
  aiprod-ds examples                                # what there is
  aiprod-ds examples video_vae/tiny --to my_run     # my_run/configs/video_vae/tiny.yaml, to be edited
  aiprod-ds examples all --to .                     # everything, as it lies in the repository
"""


_INIT_EXAMPLES = """\
examples:
  aiprod-ds init                                                   # asks
  aiprod-ds init run.yaml --train video_vae --data clips --machine h200-141gb --gpus 8
  aiprod-ds init lora.yaml --train ltx_lora --data clips --model /models/LTX-Video
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
        versions = [_version_of(name) for name in ("aiprod_ds", "torch", "deepspeed")]
        sys.stdout.write("aiprod-ds {}, torch {}, deepspeed {}\n".format(*versions))
        parser.exit()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # a checkout is found by its folder


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, *__: Any) -> None:
        import shtab

        sys.stdout.write(f"{shtab.complete(parser, values)}\n")
        parser.exit()


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


def add_init(commands: Any) -> argparse.ArgumentParser:
    """Adds `init` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "init",
        help="write a configuration for a folder of clips and a machine",
        description="Looks into a folder or table of clips and writes a commented configuration that fits "
        "them and the machine, checks it and says the next command. Asks for what is not given, where a "
        "terminal is there.",
        epilog=_INIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="new configuration (default: KIND.yaml)"
    )
    kinds = "; ".join(f"{name}: {text}" for name, text in _KINDS.items())
    parser.add_argument("--train", choices=_KINDS, help=f"what to train. {kinds}")
    parser.add_argument("--data", metavar="PATH", help="folder, or CSV, JSON or JSONL table of clips")
    parser.add_argument(
        "--machine",
        choices=[*sorted(MACHINES), _CPU],
        help="where it will run (default: what this machine has)",
    )
    parser.add_argument(
        "--gpus", type=partial(count, most=_MOST_RANKS), metavar="N", help="GPUs, or processes of a CPU"
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help=f"trained weights, a folder or a hub name (default: of a VAE none, of LTX-Video {_LTX})",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="run folder (default: runs/NAME)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    return parser


def begun(arguments: argparse.Namespace) -> Begun:
    """Writes what was asked for, after asking for what was not said.

    Raises:
        ConfigError: With everything that is missing, where nobody can be asked; or as `begin`.
    """
    console: Console = arguments.console
    if sys.stdin.isatty():
        _ask(arguments, console)
    missing = [
        f"--{name}: must be given where no terminal is there to ask, got nothing. Add it."
        for name in ("train", "data")
        if getattr(arguments, name) is None
    ]
    if missing:
        raise ConfigError(missing)
    from aiprod_ds.starting.begin import begin, here
    from aiprod_ds.starting.draft import Kind, Wish

    kind = Kind(arguments.train)
    machine, ranks = here()
    if arguments.machine is not None and arguments.machine != machine:
        machine, ranks = arguments.machine, 2 if arguments.machine == _CPU else 1
    file = arguments.file or Path(f"{kind.value}.yaml")
    wish = Wish(
        kind=kind,
        file=file,
        data=arguments.data,
        machine=machine,
        ranks=arguments.gpus or ranks,
        model=arguments.model or (_LTX if kind.is_diffusion else None),
        output_dir=arguments.output_dir or f"runs/{file.stem}",
    )
    return begin(wish, is_written_over=arguments.force)


def _ask(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.train is None:
        for name, text in _KINDS.items():
            console.print(f"  {name:10} {text}", markup=False, highlight=False)
        arguments.train = Prompt.ask(
            "What do you train?", console=console, choices=list(_KINDS), default="video_vae"
        )
    while arguments.data is None or not Path(arguments.data).exists():
        if arguments.data is not None:
            console.print(f"{arguments.data}: nothing is there", markup=False, highlight=False)
        arguments.data = Prompt.ask("In which folder or table are the clips?", console=console)
    if arguments.machine is None:
        from aiprod_ds.starting.begin import here

        machine, ranks = here()
        choices = [*sorted(MACHINES), _CPU]
        arguments.machine = Prompt.ask(
            "Where will it run?", console=console, choices=choices, default=machine
        )
        if arguments.gpus is None:
            usual = ranks if arguments.machine == machine else 1
            arguments.gpus = IntPrompt.ask(
                "On how many GPUs, or processes of a CPU?", console=console, default=usual
            )


def add_validate(commands: Any) -> argparse.ArgumentParser:
    """Adds `validate` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "validate",
        help="check in two minutes that this installation computes what it should",
        description="Checks configuration, losses and curriculum against closed forms, then trains each kind "
        "of model on the GPU, or the CPU without one, kills the run and compares what goes on bit for bit. "
        "DS_ACCELERATOR=cpu leaves the GPU out. Exit code 0 if all is well, 1 otherwise.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def validated(arguments: argparse.Namespace) -> Validation:
    """Does the checks; on a terminal each is told of as it is done."""
    from aiprod_ds.validate.run import validate

    console: Console = arguments.console
    if arguments.json or not console.is_terminal:
        return validate()
    with console.status("the trainings have begun; checking numbers meanwhile") as status:
        return validate(lambda outcome: status.update(f"done: {outcome.title}"))


def validation_table(found: Validation) -> Table:
    """Returns the outcomes as people read them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("check", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("what was compared, and what to do", overflow="fold", ratio=1)
    for outcome in found.outcomes:
        mark = Text("✓", style="green") if outcome.is_passed else Text("✗", style="bold red")
        said = Text(outcome.detail)
        if outcome.advice:
            said.append(f"\n{outcome.advice}", style="" if outcome.is_passed else "bold")
        table.add_row(mark, Text(outcome.title), f"{outcome.seconds:.1f}", said)
    failed = sum(not outcome.is_passed for outcome in found.outcomes)
    end = f"{failed} of {len(found.outcomes)} checks failed" if failed else "all is well"
    table.add_row("", Text(end, style="bold"), f"{found.seconds:.1f}", "")
    return table
