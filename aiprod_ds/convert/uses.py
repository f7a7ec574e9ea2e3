"""What a file or folder is good for: whether `convert` would read it, whether a training run would, and how;
or why not.

Nothing is written, and no weights are read: what `inspect` has verified is opened as `convert` opens it, up
to the names and shapes of the model. Called by `inspect`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.checkpoint.consistency import require_layout
from aiprod_ds.checkpoint.manifest import FileRecord, HashCheck
from aiprod_ds.checkpoint.store import Checkpoint
from aiprod_ds.convert.diffusers_config import read_diffusers_config
from aiprod_ds.convert.identify import Found
from aiprod_ds.convert.request import LORA_FORMS, Request
from aiprod_ds.convert.run import named_for, usual_form
from aiprod_ds.convert.sources import open_source
from aiprod_ds.convert.weights_folder import CONFIG, DIFFUSERS_STEM, WeightsFolder
from aiprod_ds.errors import AiprodError, ConfigError
from aiprod_ds.models.lora_keys import other_model, parse_key
from aiprod_ds.models.lora_opened import listed, open_lora, require_lora, says_alpha
from aiprod_ds.report.inspect_view import Use
from aiprod_ds.train.resume.history import History

_PICKLES = ("deepspeed", "distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFacts:
    """What can be said of a LoRA without its transformer.

    Attributes:
        ranks: The different ones, ascending.
        has_alpha: Whether it says alpha for every layer.
        special: What it has beside A and B of one rank, in words; "" for nothing.
        others: Counts of tensors of other models.
        unknown: Keys that are no LoRA.
    """

    ranks: tuple[int, ...]
    has_alpha: bool
    special: str
    others: Mapping[str, int]
    unknown: tuple[str, ...]

    def notes(self, option: str, allow: str) -> tuple[str, ...]:
        """Returns what there is to know before it is used.

        Args:
            option: Says alpha, where the file does not.
            allow: Leaves out what is unknown.
        """
        counts = ", ".join(f"{model} {count} tensors" for model, count in self.others.items())
        return (
            *(() if self.has_alpha else (f"it does not say alpha: {option} is what others take",)),
            *((f"left out: {counts}",) if counts else ()),
            *((f"only with {allow}: {listed(self.unknown)}",) if self.unknown and allow else ()),
        )


def describe_lora(path: Path) -> LoraFacts:
    """Returns what the keys of a LoRA say, whatever it was trained on.

    Raises:
        CheckpointError: If it cannot be read or is an adapter of another kind.
    """
    opened = open_lora(path)
    own = [key for key in opened.tensors if other_model(key) is None]
    require_lora(path, own)
    meant = {key: parsed for key in own if (parsed := parse_key(key)) is not None}
    modules: dict[str, set[str]] = {}
    for parsed in meant.values():
        modules.setdefault(parsed.module, set()).add(parsed.part)
    downs = [opened.tensors[key] for key, parsed in meant.items() if parsed.part == "down"]
    ranks = tuple(sorted({value.shape[0] for value in downs if value.dim()}))
    parts = {parsed.part for parsed in meant.values()}
    special = [f"its ranks differ ({', '.join(map(str, ranks))})"] if len(ranks) > 1 else []
    special += ["it is DoRA"] if "magnitude" in parts else []
    special += ["it has differences of whole parameters"] if parts & {"diff", "diff_b", "bias"} else []
    adapted = [found for found in modules.values() if "down" in found]
    return LoraFacts(
        ranks=ranks,
        has_alpha=says_alpha(opened) or all("alpha" in found for found in adapted),
        special=" and ".join(special),
        others=Counter(other for key in opened.tensors if (other := other_model(key)) is not None),
        unknown=tuple(key for key in own if key not in meant),
    )


def uses_of(
    found: Found, *, is_trusted: bool, newest: Checkpoint | None = None, problem: str | None = None
) -> dict[str, Use]:
    """Returns what `convert` and `train` make of it, by the name of the command.

    Args:
        found: What was inspected.
        is_trusted: Whether folders of pickles may be opened.
        newest: Of a run or a checkpoint: what is whole.
        problem: What is wrong with it, or with the newest checkpoint of a run. `convert` may still read it,
            because it needs no moments.
    """
    return {
        "convert": _convert(found, is_trusted=is_trusted, is_whole=problem is None),
        "train": _train(found, newest, problem),
    }


def _convert(found: Found, *, is_trusted: bool, is_whole: bool) -> Use:
    if found.kind in _PICKLES and not is_trusted:
        return Use(is_read=True, how="only with --trust-checkpoint, because its files are pickles")
    if found.kind == "lora":
        return _tried(lambda: _convert_lora(found.path))
    return _tried(lambda: _convert_weights(found, is_trusted=is_trusted, is_whole=is_whole))


def _convert_lora(path: Path) -> str:
    lora = describe_lora(path)
    merged = "merged with --base"
    how = f"{merged} alone, because {lora.special}" if lora.special else None
    how = how or f"to {', '.join(LORA_FORMS)} with --to and --config, or {merged}"
    return "; ".join((how, *lora.notes("--alpha rank", "--allow-unknown")))


def _convert_weights(found: Found, *, is_trusted: bool, is_whole: bool) -> str:
    request = Request(source=found.path, out=Path(), is_trusted=is_trusted)
    with _Verified() as hashes:
        opened = open_source(request, hashes if is_whole else None)
    name = f"{opened.found.path.name} " if found.kind == "run" else ""
    if opened.weights is None:
        return f"{name}to {', '.join(LORA_FORMS)} with --to, or merged with --base"
    form = usual_form(opened)
    _, left = named_for(opened, form)
    how = f"{name}to {form}" + (" (with --config also to diffusers)" if opened.model is None else "")
    told = [line.partition(": ")[2] for line in opened.told if "dequantised" in line]
    parts = (
        [f"left out: {', '.join(f'{part} {count} tensors' for part, count in left.items())}"] if left else []
    )
    return "; ".join((how, *told, *parts))


def _train(found: Found, newest: Checkpoint | None, problem: str | None) -> Use:
    if newest is not None:
        return _tried(lambda: _go_on(found, newest))
    if problem is not None:
        return Use(is_read=False, how=problem)
    if found.kind == "weights":
        return _tried(lambda: _pretrained(found.path))
    if found.kind == "lora":
        return _tried(lambda: _adapters(found.path))
    return Use(is_read=False, how="it takes folders of diffusers as model.pretrained: `convert` makes one")


def _go_on(found: Found, newest: Checkpoint) -> str:
    state = newest.state
    require_layout(state.layout, where=str(newest.folder))
    History.from_dict(state.history)
    option = f"--output-dir {found.path}" if found.kind == "run" else f"--resume {found.path}"
    return f"goes on from {newest.folder.name} with its configuration and {option}"


def _pretrained(path: Path) -> str:
    if not (path / CONFIG).is_file():
        raise ConfigError(f"no {CONFIG} says its class: `convert` with --config makes a folder with one")
    if WeightsFolder(path).stem != DIFFUSERS_STEM:
        raise ConfigError(f"files must be called {DIFFUSERS_STEM}: `convert` makes a folder of them")
    return f"as model.pretrained of {read_diffusers_config(path).class_name}"


def _adapters(path: Path) -> str:
    lora = describe_lora(path)
    if lora.unknown:
        raise ConfigError(
            f"keys that are no LoRA: {listed(lora.unknown)}. `convert --allow-unknown` leaves them out"
        )
    how = "as model.lora_init or model.lora_checkpoint of a diffusion run whose layers they fit"
    if lora.special:
        how = (
            f"as model.lora_checkpoint alone of a diffusion run whose layers they fit, because {lora.special}"
        )
    return "; ".join((how, *lora.notes("alpha: rank", "")))


def _tried(make: Callable[[], str]) -> Use:
    try:
        return Use(is_read=True, how=make())
    except AiprodError as error:
        return Use(is_read=False, how=str(error))


class _Verified(HashCheck):
    """Compares nothing once more: `inspect` has just read every file."""

    def start(self, path: Path, record: FileRecord) -> None:
        """Does nothing."""

    def confirm(self) -> None:
        """Does nothing."""
