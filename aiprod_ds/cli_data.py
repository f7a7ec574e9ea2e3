"""The command `data`: its arguments, what a configuration asks of the media, and where results go. Called by
cli.py, which prints."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from aiprod_ds.bad_disk import disk_required
from aiprod_ds.config.load import config_kind, load_config, load_encode_config, read_curriculum
from aiprod_ds.curriculum.phase import AutoPlan
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import folder_problem, replacing

if TYPE_CHECKING:
    from aiprod_ds.config.encode import EncodeConfig
    from aiprod_ds.survey.demands import Demands, Phase
    from aiprod_ds.survey.run import Survey, Writer
    from aiprod_ds.survey.view import SurveyView

_TABLE = "files.csv"
_TILES = 120
_EXAMPLES = """\
examples:
  aiprod-ds data clips
  aiprod-ds data clips.csv --config configs/video_vae/tiny.yaml --output clips_survey
  aiprod-ds data clips --json - | jq '.files[] | select(.level == "left_out") | .path'
"""


def add_data(commands: Any) -> argparse.ArgumentParser:
    """Adds `data` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "data",
        help="say what is in a folder or table of media, what is wrong with it and what becomes of it",
        description="Looks into every file of a folder, or every row of a table (CSV, JSON, JSONL): facts, "
        "problems, what the trainer does with each, duplicates, a contact sheet. What was found is "
        "remembered, so that training need not look again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="PATH", help="folder, or CSV, JSON or JSONL table")
    parser.add_argument(
        "--config", type=Path, help="of train or encode: what it asks for, and the shapes of its phases"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="of --config"
    )
    parser.add_argument(
        "--trust-code", action="store_true", help="let the configuration name classes of your own"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - prints it and, without --output, no page"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the page and the table; by default, named after PATH with _survey, in this folder "
        "and never inside PATH",
    )
    parser.add_argument("--verbose", action="store_true", help="show what libraries log, too")
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What `data` found.

    Attributes:
        view: What to print; None if the JSON document was printed.
    """

    survey: Survey
    view: SurveyView | None


def look(arguments: argparse.Namespace) -> Looked:
    """Looks into everything and writes what was asked for.

    Raises:
        ConfigError: If a result cannot be written, or an option has no effect.
    """
    from aiprod_ds.survey.document import CsvWriter, JsonWriter
    from aiprod_ds.survey.page import PageRows, write_survey_page
    from aiprod_ds.survey.run import survey
    from aiprod_ds.survey.view import SurveyView

    demands = demands_of(arguments)
    folder = _folder(arguments)
    rows = PageRows()
    writers: list[Writer] = [rows]
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(disk_required(folder, "the survey"))
            folder.mkdir(parents=True, exist_ok=True)
            table = stack.enter_context(replacing(folder / _TABLE)).open("w", encoding="utf-8", newline="")
            writers.append(CsvWriter(stack.enter_context(table)))
        document: JsonWriter | None = None
        if arguments.json is not None:
            document = JsonWriter(_json_file(arguments.json, stack), _temporary(stack))
            writers.append(document)
        found = survey(
            arguments.source,
            demands,
            spool=_temporary(stack),
            writers=tuple(writers),
            num_tiles=0 if folder is None else _TILES,
        )
        if document is not None:
            document.finish(found)
    command = demands.command
    page = None
    if folder is not None:
        with disk_required(folder, "the survey"):
            page = write_survey_page(found, rows, folder, command=command, table=_TABLE)
    is_printed = arguments.json == "-"
    view = SurveyView(
        survey=found, page=page, table=None if folder is None else folder / _TABLE, command=command
    )
    return Looked(survey=found, view=None if is_printed else view)


def demands_of(arguments: argparse.Namespace) -> Demands:
    """Returns what the configuration asks for; without one, that nobody has said.

    Raises:
        ConfigError: If it cannot be read, or is one of `sample`.
    """
    from aiprod_ds.survey.demands import Demands

    path, source = arguments.config, shlex.quote(str(arguments.source))
    if path is None:
        for option, value in (("--set", arguments.overrides), ("--trust-code", arguments.trust_code)):
            if value:
                raise ConfigError(f"{option}: has no effect without --config, got it. Add --config.")
        return Demands(command=f"aiprod-ds data {source} --config CONFIG")
    kind = config_kind(path, arguments.overrides)
    if kind == "sample":
        raise ConfigError(
            f"{path}: must be a configuration of train or encode, got one of sample. Name another."
        )
    return _of_encode(arguments) if kind == "encode" else _of_trainer(arguments)


def _of_trainer(arguments: argparse.Namespace) -> Demands:
    from aiprod_ds.config.data import AudioDataConfig, PictureConfig
    from aiprod_ds.config.trainers import trainer_class  # loads torch and diffusers, which takes seconds
    from aiprod_ds.survey.demands import Demands, Phase

    path, source = arguments.config, shlex.quote(str(arguments.source))
    config = load_config(path, arguments.overrides, trust_code=arguments.trust_code)
    plan = trainer_class(config.trainer)(config=config, source=str(path)).plan(world_size=1)
    phases = tuple(Phase(name=phase.name, buckets=phase.buckets, auto=phase.auto) for phase in plan.phases)
    data: Any = getattr(config, "data", None)
    check = f"aiprod-ds check {shlex.quote(str(path))} --set {shlex.quote(f'data.train={arguments.source}')}"
    if isinstance(data, AudioDataConfig):
        return Demands(
            configuration=path,
            wanted="sound",
            phases=phases,
            sounds=data,
            sample_rate_hz=data.sample_rate_hz,
            channels=data.channels,
            needs_captions=False,
            command=check,
        )
    is_latents = not isinstance(data, PictureConfig)
    return Demands(
        configuration=path,
        wanted="video",
        pictures=PictureConfig() if is_latents else data,
        phases=phases,
        # Of a diffusion model the media are what is encoded before.
        needs_captions=is_latents,
        command=f"aiprod-ds encode ENCODE.yaml --set data.media={source}" if is_latents else check,
    )


def _of_encode(arguments: argparse.Namespace) -> Demands:
    from aiprod_ds.survey.demands import Demands

    path = arguments.config
    config = load_encode_config(path, arguments.overrides, trust_code=arguments.trust_code)
    media = shlex.quote(f"data.media={arguments.source}")
    return Demands(
        configuration=path,
        wanted="video",
        pictures=config.data,
        phases=tuple(_encoded_shapes(config)),
        needs_captions=config.text is not None and config.text.default_caption is None,
        captions_per_line=config.data.captions_per_line,
        command=f"aiprod-ds encode {shlex.quote(str(path))} --set {media}",
    )


def _encoded_shapes(config: EncodeConfig) -> Iterator[Phase]:
    from aiprod_ds.encode.shapes import shape_groups  # loads torch and diffusers, which takes seconds
    from aiprod_ds.models.registry import build_model
    from aiprod_ds.models.video_vae import video_strides
    from aiprod_ds.survey.demands import Phase

    strides = video_strides(build_model(config.video.model, seed=0, device="meta"), config.video.model)
    groups = shape_groups(config, strides).shapes
    # Phases for themselves, since shapes that are to be found from the clips are not known yet.
    phases = () if config.curriculum is None else read_curriculum(Path(config.curriculum)).phases
    for index, buckets in enumerate(groups):
        phase = phases[index - len(groups)] if phases else None
        rule = None if phase is None or config.data.held_out else phase.auto_buckets
        yield Phase(
            name=f"shapes[{index}]" if phase is None else phase.name,
            buckets=buckets,
            auto=None
            if rule is None
            else AutoPlan(rule=rule, largest=buckets[0], batch_step=1, strides=strides),
        )


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Returns the folder of the page; None if only JSON is printed."""
    if arguments.output is None and arguments.json == "-":
        return None
    source: Path = arguments.source
    folder: Path = arguments.output or _default_folder(source.resolve())
    problem = folder_problem(folder)
    if problem is not None:
        raise ConfigError(
            f"--output: must be a folder that can be made and written into, got {str(folder)[:100]!r} "
            f"({problem}). Name another."
        )
    return folder


def _default_folder(source: Path) -> Path:
    name = f"{(source.name if source.is_dir() else source.stem) or 'data'}_survey"
    # Not among the files that are looked at, as in a folder that is surveyed from inside.
    return source.parent / name if Path.cwd().is_relative_to(source) else Path(name)


def _json_file(name: str, stack: ExitStack) -> TextIO:
    if name == "-":
        return sys.stdout
    try:
        stack.enter_context(disk_required(Path(name), "the document"))
        written = stack.enter_context(replacing(Path(name))) if _is_replaceable(Path(name)) else Path(name)
        return stack.enter_context(written.open("w", encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--json: must be a file that can be written, got {reason}. Name another."
        ) from error


def _is_replaceable(path: Path) -> bool:
    """Whether another file may take its place: not that of a device or a pipe."""
    return path.is_file() or not path.exists()


def _temporary(stack: ExitStack) -> Any:
    return stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
