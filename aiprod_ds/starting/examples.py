"""The shipped examples: their names, what each is for, and copies of them to edit.

Owns what may be copied and that nothing of the reader's is written over. Called by the command `examples`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.config.messages import suggestion
from aiprod_ds.errors import ConfigError
from aiprod_ds.shipped import lookup

# Folders that are copied as a whole, and what they are for.
_FOLDERS = {
    "samples": "11 short clips with captions, for training and held out; their licences are beside them",
    "ds_configs": "the DeepSpeed settings, which configurations name without their folder: zero1_bf16",
    "launch": "scripts for Slurm, a hostfile and an environment file, and a Dockerfile",
}
_COMMANDS = {"encode": "encode", "sample": "sample"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A shipped configuration or folder.

    Attributes:
        name: What commands and `base` take, such as `video_vae/tiny`.
        text: What it is for, its first comment.
        command: What runs it; empty for a folder.
    """

    name: str
    text: str
    command: str


def examples() -> tuple[Example, ...]:
    """Returns everything that can be copied, configurations first."""
    configurations = tuple(
        Example(
            name=name,
            text=_first_comment(lookup.shipped("configs") / f"{name}.yaml"),
            command=f"aiprod-ds {_COMMANDS.get(name.partition('/')[0], 'train')} {name}",
        )
        for name in lookup.shipped_configurations()
    )
    return (*configurations, *(Example(name=name, text=text, command="") for name, text in _FOLDERS.items()))


def copy_examples(names: Sequence[str], folder: Path) -> list[Path]:
    """Copies examples into `folder`, at the places that they have in the repository, and returns the new
    files.

    A file that is there already and equal is left as it is.

    Args:
        names: Of `examples`; `all` is every one.
        folder: Is made if it is not there.

    Raises:
        ConfigError: If a name is unknown, or a file is there and differs; nothing is written.
    """
    known = [example.name for example in examples()]
    wanted = known if "all" in names else [_plain(name) for name in names]
    problems = [
        f"examples: {name}: must be the name of an example, got none such. {suggestion(name, known)}"
        for name in wanted
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    pairs = [pair for name in wanted for pair in _files(name, folder)]
    problems = [
        f"{target}: must not be there or be the shipped file, got another. Name another folder."
        for source, target in pairs
        if target.exists() and target.read_bytes() != source.read_bytes()
    ]
    if problems:
        raise ConfigError(problems)
    made = []
    for source, target in pairs:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(source.stat().st_mode | 0o600)  # an installed package may be read-only
            made.append(target)
    return made


def _plain(name: str) -> str:
    return name.rstrip("/").removeprefix("configs/").removesuffix(".yaml")


def _files(name: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    if name not in _FOLDERS:
        yield lookup.shipped("configs") / f"{name}.yaml", folder / "configs" / f"{name}.yaml"
        return
    root = lookup.shipped(name)
    for source in sorted(path for path in root.rglob("*") if path.is_file()):
        yield source, folder / name / source.relative_to(root)


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").splitlines()[0]
    return line.removeprefix("#").strip()
