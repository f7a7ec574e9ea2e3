"""Files of latents and prompt embeddings: their names, how one is written whole or not at all, and how one is
read.

Owns the layout of a `.precomputed` folder:

    latents/<clip>@<frames>x<height>x<width>.safetensors        [C,F,H,W]
    audio_latents/<clip>@<frames>x<height>x<width>.safetensors  [C,T] or [C,T,M]
    conditions/<clip>.safetensors                               prompt_embeds [S,D], prompt_attention_mask [S]
    empty_prompt.safetensors                                    the same of the empty caption
    buckets.safetensors                                         what `buckets: auto` of a curriculum found

An entry of conditions holds further captions of its clip under `prompt_embeds.1`, `prompt_embeds.2` and so
on. `<clip>` is the media file's path in its manifest with its suffix; the shape is the clip's in pixels, with
`@<rate>hz` behind it where clips are resampled. ltx-trainer keeps one entry a clip, named without a shape, as
`.pt`; such names are read too. Encoding writes here, `latent_index.py` lists what there is and
`latent_dataset.py` reads it.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

from aiprod_ds.curriculum.auto_buckets import Shape
from aiprod_ds.errors import DataError
from aiprod_ds.shards.reader import PackedEntry, ShardReader
from aiprod_ds.shipped import lookup
from aiprod_ds.tensor_file import TensorFile, TensorFileError, tensors_in

LATENTS, AUDIO_LATENTS, CONDITIONS = "latents", "audio_latents", "conditions"
SUFFIX, FOREIGN_SUFFIX = ".safetensors", ".pt"
PRECOMPUTED = ".precomputed"
_BESIDE = "_latents"
_PROMPT = "prompt_embeds"
_MORE = re.compile(r"\.\d+$")
EMPTY_PROMPT = f"empty_prompt{SUFFIX}"
FOUND_BUCKETS = f"buckets{SUFFIX}"
"""Holds the shapes that `buckets: auto` found, under `AutoPlan.key`: whole numbers [N,3], each frames, height
and width."""
TEMPORARY_SUFFIX = ".part"
EntryFile: TypeAlias = Path | PackedEntry
"""Where an entry is: a file of its own, or in shards."""
_TAGGED = re.compile(
    r"^(?P<clip>.+)@(?P<frames>\d+)x(?P<height>\d+)x(?P<width>\d+)(?:@(?P<rate>[0-9.e+-]+)hz)?$",
    re.DOTALL,  # names of files may hold line feeds
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """The shape of a clip before it is encoded: frames and pixels, and the rate it is resampled to; None
    keeps its own."""

    frames: int
    height: int
    width: int
    frame_rate_hz: float | None = None

    @property
    def tag(self) -> str:
        """The shape as file names have it: `17x512x768` or `17x512x768@24hz`."""
        rate = "" if self.frame_rate_hz is None else f"@{self.frame_rate_hz!r}hz".replace(".0hz", "hz")
        return f"{self.frames}x{self.height}x{self.width}{rate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says without its tensors being read.

    Attributes:
        metadata: Text by name; of ltx-trainer's files, their numbers as text.
    """

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def to_facts(self) -> dict[str, Any]:
        """Returns it as the index of shards holds it."""
        return {
            "metadata": dict(self.metadata),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    @classmethod
    def of_facts(cls, facts: Any, *, where: str) -> Header:
        """Returns what `to_facts` returned.

        Raises:
            DataError: If it is something else.
        """
        try:
            shapes = {name: tuple(int(size) for size in shape) for name, shape in facts["shapes"].items()}
            return cls(metadata={name: str(text) for name, text in facts["metadata"].items()}, shapes=shapes)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: the index must say what it holds, got {str(facts)[:40]!r}. Make it anew with "
                "`aiprod-ds shard --index`."
            ) from error


def default_folder(media: Path) -> Path:
    """Returns where the latents of the media in a folder are unless a configuration says otherwise:
    `<folder>_latents` beside it, so that no scan of media meets them; or `.precomputed` in it where that
    exists, as ltx-trainer has it. Of shipped samples, in the working folder.

    Raises:
        DataError: If the folder is the root of the file system, which has nothing beside it.
    """
    if (media / PRECOMPUTED).is_dir():
        return media / PRECOMPUTED
    if lookup.is_of_the_installation(media):
        return Path(f"{media.name}{_BESIDE}")
    named = media if media.name not in ("", "..") else media.resolve()
    if not named.name:
        raise DataError(f"{media}: has no folder beside it for latents. Name data.output_dir.")
    return named.with_name(f"{named.name}{_BESIDE}")


def numbered(name: str, index: int) -> str:
    """Returns the name of a tensor of a clip's caption: that of the first is plain, the next is `name.1`."""
    return name if index == 0 else f"{name}.{index}"


def unnumbered(name: str) -> str:
    """Returns the name that the tensor has of the first caption."""
    return _MORE.sub("", name)


def entry_name(clip: str, shape: LatentShape | None) -> str:
    """Returns the name of a clip's entry without folder and suffix."""
    return clip if shape is None else f"{clip}@{shape.tag}"


def split_name(name: str) -> tuple[str, LatentShape | None]:
    """Returns the clip and the shape in an entry's name; the shape is None where the name has none."""
    match = _TAGGED.match(name)
    if match is None:
        return name, None
    rate = None if match["rate"] is None else float(match["rate"])
    shape = LatentShape(
        frames=int(match["frames"]),
        height=int(match["height"]),
        width=int(match["width"]),
        frame_rate_hz=rate,
    )
    return match["clip"], shape


def entry_path(root: Path, source: str, name: str) -> Path:
    """Returns where the entry `name` of one source is written."""
    return root / source / f"{name}{SUFFIX}"


def find_entry(root: Path | ShardReader, source: str, name: str) -> EntryFile | None:
    """Returns the file of an entry, ours before ltx-trainer's; None if there is none. Shards hold ours
    only."""
    if isinstance(root, ShardReader):
        return root.find(f"{source}/{name}{SUFFIX}")
    ours = entry_path(root, source, name)
    if ours.exists():
        return ours
    foreign = root / source / f"{name}{FOREIGN_SUFFIX}"
    return foreign if foreign.exists() else None


def find_beside(root: Path | ShardReader, name: str) -> EntryFile | None:
    """Returns a file that lies beside the sources, such as `EMPTY_PROMPT`; None if there is none."""
    if isinstance(root, ShardReader):
        return root.find(name)
    return root / name if (root / name).exists() else None


def read_found_buckets(root: Path | ShardReader) -> dict[str, tuple[Shape, ...]]:
    """Returns the shapes that `buckets: auto` found when these latents were encoded, by `AutoPlan.key`.

    Raises:
        DataError: If the file is damaged.
    """
    entry = find_beside(root, FOUND_BUCKETS)
    if entry is None:
        return {}
    return {
        key: tuple(Shape(*shape) for shape in shapes.tolist()) for key, shapes in read_entry(entry).items()
    }


def write_found_buckets(root: Path, found: Mapping[str, Sequence[Shape]]) -> None:
    """Keeps shapes for training, beside those of other curricula that are there."""
    known = read_found_buckets(root)
    if found and any(known.get(key) != shapes for key, shapes in found.items()):
        tensors = {key: torch.tensor(shapes) for key, shapes in {**known, **found}.items()}
        write_entry(root / FOUND_BUCKETS, tensors, {})


def require_inside(clip: str) -> None:
    """Checks that a clip's path names a file inside the folder that it is relative to.

    Raises:
        DataError: If it is absolute or climbs out; names no file.
    """
    path = PurePosixPath(clip)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            "its path must be relative and lead into the manifest's folder. Move the file or the manifest"
        )


def write_entry(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file so that `path` is either absent, the old file or the whole new one, also after a crash of
    the machine.

    A killed process leaves at most a file that ends in `.part`, which nothing reads and `remove_parts`
    deletes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with temporary.open("wb") as file:
            file.write(save(contiguous, metadata=dict(metadata)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what ended the write is to be told
            temporary.unlink(missing_ok=True)
        raise


def remove_parts(root: Path) -> None:
    """Deletes what killed processes were writing; call it while no other process writes into `root`."""
    for part in root.rglob(f"*{TEMPORARY_SUFFIX}"):
        part.unlink(missing_ok=True)


def read_header(path: EntryFile) -> Header:
    """Returns metadata and shapes of an entry. Of ours, the tensors are not read; in shards, the index says
    all.

    Raises:
        DataError: If the file is missing, damaged or no dictionary of tensors.
    """
    if isinstance(path, PackedEntry):
        return Header.of_facts(path.known, where=str(path))
    if path.suffix == FOREIGN_SUFFIX:
        values = _read_foreign(path)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        metadata = {name: f"{float(value):.17g}" for name, value in values.items() if _is_number(value)}
        return Header(
            metadata=metadata, shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()}
        )
    try:
        with TensorFile(path) as file:
            return Header(
                metadata=file.metadata, shapes={name: spec.shape for name, spec in file.specs.items()}
            )
    except TensorFileError as error:
        raise _damaged(path, error) from error


def read_entry(path: EntryFile) -> dict[str, Tensor]:
    """Returns the tensors of an entry, in the types they were stored in.

    Raises:
        DataError: If the file is missing, damaged or no dictionary of tensors.
    """
    if isinstance(path, Path) and path.suffix == FOREIGN_SUFFIX:
        return {name: value for name, value in _read_foreign(path).items() if isinstance(value, Tensor)}
    try:
        with _opened(path) as file:
            return dict(file)
    except TensorFileError as error:
        raise _damaged(path, error) from error


def read_caption(path: EntryFile, choose: Callable[[int], int]) -> dict[str, Tensor]:
    """Returns the tensors of one caption of an entry of conditions, under the names of the first.

    Args:
        choose: Called with the number of captions where there are several; returns the index of one.

    Raises:
        DataError: As `read_entry`.
    """
    if path.suffix == FOREIGN_SUFFIX:
        return read_entry(path)
    try:
        with _opened(path) as file:
            names = [name for name in file if _MORE.search(name) is None]
            count = 1 + sum(name.startswith(f"{_PROMPT}.") for name in file)
            index = 0 if count == 1 else choose(count)
            return {name: file[numbered(name, index)] for name in names if numbered(name, index) in file}
    except TensorFileError as error:
        raise _damaged(path, error) from error


def _opened(path: EntryFile) -> AbstractContextManager[Mapping[str, Tensor]]:
    return nullcontext(tensors_in(path.read())) if isinstance(path, PackedEntry) else TensorFile(path)


def _read_foreign(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # torch's first line advises to load it nevertheless; why it did not is further below.
        raise _damaged(
            path, next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        ) from None
    if not isinstance(values, dict):
        raise _damaged(path, f"a {type(values).__name__}")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _damaged(path: EntryFile, got: object) -> DataError:
    return DataError(f"{path}: must be a whole file of tensors, got: {got}. Delete it and encode again.")
