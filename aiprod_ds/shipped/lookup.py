"""Where a name in a configuration or on the command line leads: a file of the reader's, or one that is
shipped.

Owns the order of the search. What is shipped lies at the top of a checkout, and in this folder of an
installed package. Called by the configuration's readers and the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

_CONFIGURATIONS, _SETTINGS = "configs", "ds_configs"
_HERE = Path(__file__).resolve().parent
_IS_INSTALLED = (_HERE / _CONFIGURATIONS).is_dir()


def shipped(part: str = "") -> Path:
    """Returns the folder of what is shipped, or a part of it: `configs`, `ds_configs`, `samples`,
    `launch`."""
    return (_HERE if _IS_INSTALLED else _HERE.parents[1]) / part


def is_of_the_installation(folder: Path) -> bool:
    """Returns whether a folder belongs to an installed package, into which nothing is written."""
    return _IS_INSTALLED and folder.resolve().is_relative_to(_HERE)


def shipped_configurations() -> list[str]:
    """Returns the names of the shipped configurations, such as `video_vae/tiny`, sorted."""
    folder = shipped(_CONFIGURATIONS)
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found)


def shipped_settings() -> list[str]:
    """Returns the names of the shipped DeepSpeed settings, such as `zero1_bf16`, sorted."""
    return sorted(path.stem for path in shipped(_SETTINGS).glob("*.json"))


def configuration(path: Path) -> Path:
    """Returns the file that `path` names: the reader's if it is there, else the shipped one of that name,
    else `path`, which is not there."""
    return path if _is_file(path) else shipped_configuration(path) or path


def shipped_configuration(path: Path) -> Path | None:
    """Returns the shipped configuration of that name, also if `configs/` stands before it and `.yaml` behind;
    None if there is none."""
    name = path.as_posix().removeprefix(f"{_CONFIGURATIONS}/").removesuffix(".yaml")
    return shipped(_CONFIGURATIONS) / f"{name}.yaml" if name in shipped_configurations() else None


def instead_of(path: Path) -> str:
    """Returns in words what to do about a configuration that is not there."""
    near = get_close_matches(path.as_posix(), shipped_configurations(), n=1)
    return (
        f"Did you mean {near[0]}?" if near else "Check the path; `aiprod-ds examples` lists what is shipped."
    )


def settings(given: str, folders: Sequence[Path]) -> Path | None:
    """Returns the DeepSpeed settings that `given` names, in one of `folders` or shipped; None if there are
    none."""
    found = next((folder / given for folder in folders if _is_file(folder / given)), None)
    if found is not None:
        return found
    name = given.removeprefix(f"{_SETTINGS}/").removesuffix(".json")
    return shipped(_SETTINGS) / f"{name}.json" if name in shipped_settings() else None


def media(given: str, folders: Sequence[Path]) -> Path | None:
    """Returns the folder or table that `given` names, in one of `folders` or among what is shipped; None if
    it is in none."""
    places = (folder / given for folder in (*folders, shipped()))
    return next((place for place in places if _exists(place)), None)


def searched(*files: Path) -> tuple[Path, ...]:
    """Returns the folders in which a relative path is looked for: the working folder, then of each of
    `files`, which name it or lead to it, its folder and those above."""
    return tuple(dict.fromkeys((Path(), *(folder for file in files for folder in file.resolve().parents))))


def in_words(*files: Path) -> str:
    """Returns what `searched` returns as people say it."""
    folders = dict.fromkeys(str(file.resolve().parent) for file in files)
    above = "".join(f", {folder} and the folders above it" for folder in folders)
    return f"the working folder {Path.cwd()}{above}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
