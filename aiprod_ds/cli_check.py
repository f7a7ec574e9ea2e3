"""What `check` does with a trainer's configuration: all that can be found wrong without training is told in
one pass, and with `--read-all` every clip is read to its end before a run meets it.

Owns the order of what is looked at and which sections each step needs; the steps are the trainer's. Called by
`cli.py`, which prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.load import Reading, read_config
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.trainers import trainer_class
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.planner.hardware import MACHINES

Result = TypeVar("Result")

# Sections of which a plan knows nothing.
_NOT_PLANNED = {"output_dir", "report", "ema", "spikes", "performance"}


def check_trainer(
    arguments: argparse.Namespace, file: dict[str, Any], require_folder: Callable[[str | None], None]
) -> Iterator[str]:
    """Looks at the file, its folder, settings, model, plan and data, and yields notes on what is no problem.

    What needs the model or the data is done for sections that are sound, whatever is wrong with others.

    Args:
        arguments: Of `check`.
        file: How the configuration is loaded.
        require_folder: Raises ConfigError if a folder cannot be made and written into.

    Raises:
        ConfigError: With all problems.
    """
    reading = read_config(**file)
    steps = _Steps(str(arguments.config), reading)
    config = reading.record
    if config is None or not reading.is_sound("trainer"):
        raise ConfigError(reading.problems)
    made = steps.take(lambda: trainer_class(config.trainer)(config=config, source=steps.source))
    if made is None:
        steps.end()
    trainer: Any = made  # its class has loaded torch and diffusers
    steps.take(lambda: require_folder(config.output_dir), "output_dir")
    settings = steps.take(lambda: read_settings(config, source=steps.source), "engine")
    models = ("model", "vae", "audio_vae", "seed")
    has_models = steps.take(lambda: (trainer.strides, trainer.shapes), *models) is not None
    planned = [key for key in type(config).model_fields if key not in _NOT_PLANNED]
    plan = steps.take(lambda: trainer.plan(world_size=arguments.world_size), *planned) if has_models else None
    data = steps.take(trainer.open_data, "data", "seed", "evaluation")
    if has_models and settings is not None and arguments.machine is not None:
        steps.take(lambda: _require_machine(trainer, plan, settings, arguments.machine))
    found = None
    if plan is not None and data is not None:
        found = steps.take(lambda: _with_data(trainer, plan, data))
    steps.end()
    assert found is not None, "whatever is not done left a problem"
    plan, notes = found
    yield from notes
    if (warning := trainer.evaluation_cost(plan).warning) is not None:
        yield f"warning: {warning}"
    if (change := trainer.data_change(data)) is not None:
        yield f"warning: {change}. `train` goes on with it only if --accept-changed-data is given"
    if arguments.read_all:
        limit = config.data.max_unreadable_fraction
        yield from read_all(data, plan, max_fraction=limit, source=steps.source)


class _Steps:
    """What was found wrong so far."""

    def __init__(self, source: str, reading: Reading[RunConfig]) -> None:
        self.source, self._reading = source, reading
        self._problems = list(reading.problems)

    def take(self, step: Callable[[], Result], *sections: str) -> Result | None:
        """Returns what `step` does; None if it finds problems, or if one of `sections`, which it needs, has
        some."""
        if not self._reading.is_sound(*sections):
            return None
        try:
            return step()
        except ConfigError as error:
            self._problems += [self._in_file(problem) for problem in error.problems]
        return None

    def end(self) -> None:
        """Raises a ConfigError with all problems, if there are any."""
        if self._problems:
            raise ConfigError(list(dict.fromkeys(self._problems)))

    def _in_file(self, problem: str) -> str:
        section = problem.partition(":")[0].partition(".")[0]
        return f"{self.source}: {problem}" if hasattr(self._reading.record, section) else problem


def _require_machine(trainer: Any, plan: Any, settings: Any, name: str) -> None:
    from aiprod_ds.train.planning.capacity import require_capacity
    from aiprod_ds.train.planning.gpu_rules import require_runnable
    from aiprod_ds.train.planning.previews import require_fitting_previews

    machine = MACHINES[name]
    require_runnable(trainer.shapes, settings, machine, where=trainer.source)
    if plan is not None:
        require_capacity(trainer, plan, settings, machine)
        require_fitting_previews(trainer, plan, settings, machine)


def _with_data(trainer: Any, plan: Any, data: Any) -> tuple[Any, list[str]]:
    """Returns the plan with its buckets and lengths on the data, and what is to be said of it."""
    plan = data.with_buckets(plan, trainer.source)
    too_short = data.check(plan, trainer.source)
    plan = data.with_lengths(plan, trainer.source)
    return plan, [
        *(
            f"phase {entry.phase}: not used, because they have under {entry.length}: {', '.join(entry.names)}"
            for entry in too_short
        ),
        *data.replacements(plan),
        *trainer.measure_notes(plan, data),
    ]


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
