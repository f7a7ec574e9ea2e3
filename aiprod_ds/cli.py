"""The command line: all commands, of which some have their arguments in `cli_*.py`. The only module that
prints.

Exit codes: 0 done, 1 failure, 2 bad configuration (nothing was written), 3 converted, but an older checkpoint
than the newest, 70 an error that nobody foresaw (`crash` tells it), 75 the run was asked to stop and has
saved: the same command goes on, 76 it did not come on, 77 its ranks hold different weights,
78 training went wrong more often than it may go back. A second signal ends with 128 + its number.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aiprod_ds.bad_disk import disk_error, is_disk_fault
from aiprod_ds.cli_check import add_read_all, check_trainer, require_clips_of_training
from aiprod_ds.cli_convert import add_convert, add_inspect, count, number, request_of
from aiprod_ds.cli_data import add_data, look
from aiprod_ds.cli_shard import add_shard, run_shard
from aiprod_ds.cli_start import (
    add_examples,
    add_init,
    add_program,
    add_validate,
    begun,
    list_or_copy,
    validated,
    validation_table,
)
from aiprod_ds.cluster.options import add_doctor_options, add_launch_options, launch_request
from aiprod_ds.config.load import config_kind, load_config, load_encode_config, load_sample_config
from aiprod_ds.config.trainers import trainer_class
from aiprod_ds.crash import guarded, silence
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.errors import (
    AiprodError,
    ConfigError,
    DivergenceError,
    HangError,
    NonFiniteError,
    PlanError,
    SpikeError,
)
from aiprod_ds.files import folder_problem
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.report.output import log_handler, open_console
from aiprod_ds.report.progress_line import shown_on

DONE, FAILED, BAD_CONFIGURATION = 0, 1, 2
OLDER = 3
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to try again"
HUNG = 76  # as `train.watchdog` ends a process, too
DIVERGED = 77
SPIKED = 78
_CODES: tuple[tuple[type[AiprodError], int], ...] = (
    (ConfigError, BAD_CONFIGURATION),
    (HangError, HUNG),
    (DivergenceError, DIVERGED),
    (SpikeError, SPIKED),
    (NonFiniteError, SPIKED),
)
_MOST_RANKS = 1_000_000  # ten times the largest machines of today
_CURVE_POINTS = 500  # of the whole run; more than a terminal has columns of dots


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _main(argv), program="aiprod-ds", is_verbose="--verbose" in given)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv, argparse.Namespace(console=open_console(stderr=True)))
    is_main = os.environ.get("RANK", "0") == "0"
    _set_up_logging(arguments.console, is_main=is_main, is_verbose=getattr(arguments, "verbose", False))
    try:
        with shown_on(arguments.console if is_main else None):
            code: int = arguments.command(arguments)
        sys.stdout.flush()
    except AiprodError as error:
        return _explain(error, next((code for kind, code in _CODES if isinstance(error, kind)), FAILED))
    except Exception as error:
        if not is_disk_fault(error):
            raise
        if getattr(error, "filename", None) is None:
            with suppress(OSError):  # it is no file, as in a test
                silence(sys.stdout.fileno())
        return _explain(disk_error(error), FAILED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiprod-ds", description="Trains video and audio VAEs and latent diffusion models on DeepSpeed."
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    add_program(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_validate(commands).set_defaults(command=_validate)
    add_init(commands).set_defaults(command=_init)
    add_examples(commands).set_defaults(command=_examples)
    check = _configured(
        commands,
        "check",
        _check,
        "check a configuration (of train, encode or sample) and print every problem",
    )
    plan = _configured(commands, "plan", _plan, "print the phases with every derived number; needs no GPU")
    add_read_all(check)
    for command in (check, plan):
        command.add_argument(
            "--world-size",
            "--gpus",
            type=partial(count, most=_MOST_RANKS),
            default=1,
            metavar="N",
            help="ranks to plan for (default 1)",
        )
        command.add_argument("--machine", choices=sorted(MACHINES), help="the GPU that it will run on")
    plan.add_argument(
        "--price-per-gpu-hour",
        type=partial(number, most=1e6),
        metavar="DOLLARS",
        help="in place of the machine's; needs --machine",
    )
    plan.add_argument(
        "--plot", type=Path, metavar="FILE", help="write memory and GPU-hours as a PNG; needs --machine"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    _configured(
        commands,
        "encode",
        _encode,
        "write latents and prompt embeddings of clips and captions, or go on with what is left",
        output_dir="folder of the latents, in place of data.output_dir",
        example="data.media=samples/validation.csv",
    )
    train = _configured(commands, "train", _train, "train, or go on with what is left")
    train.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    train.add_argument(
        "--accept-changed-data", action="store_true", help="go on with other data than the run had"
    )
    evaluate = _configured(commands, "eval", _eval, "measure held-out clips with the newest checkpoint")
    evaluate.add_argument(
        "--resume", default="auto", help="auto (default: the newest) or a checkpoint folder"
    )
    report = commands.add_parser(
        "report", help="write the page of a run anew, also of one that was killed, or compare runs"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; several are compared")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page; by default report.html in the run folder, of a comparison comparison.html here",
    )
    report.set_defaults(command=_report)
    _configured(
        commands,
        "sample",
        _sample,
        "make clips from prompts with an exported diffusion model",
        output_dir="folder of the clips, in place of the configuration's",
        example="seed=4",
    )
    add_data(commands).set_defaults(command=_data)
    add_shard(commands).set_defaults(command=_shard)
    add_convert(commands).set_defaults(command=_convert)
    add_inspect(commands).set_defaults(command=_inspect)
    launch = commands.add_parser(
        "launch", help="train on every accelerator of this machine, or on the hosts of a hostfile"
    )
    add_launch_options(launch)
    launch.set_defaults(command=_launch)
    doctor = commands.add_parser(
        "doctor", help="examine this machine, or the hosts of a hostfile, before a run"
    )
    add_doctor_options(doctor)
    doctor.set_defaults(command=_doctor)
    return parser


def _configured(
    commands: Any,
    name: str,
    command: Any,
    text: str,
    *,
    output_dir: str = "run folder, in place of the configuration's",
    example: str = "curriculum.phases[0].updates=5",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=f"e.g. {example}"
    )
    parser.add_argument("--output-dir", help=output_dir)
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="let the file name classes of your own; their modules are imported, which runs them",
    )
    parser.add_argument("--verbose", action="store_true", help="show what libraries log, too")
    parser.set_defaults(command=command)
    return parser


def _file(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "path": arguments.config,
        "overrides": arguments.overrides,
        "output_dir": arguments.output_dir,
        "trust_code": arguments.trust_code,
    }


def _require_folder(arguments: argparse.Namespace, key: str, folder: str | None) -> None:
    problem = None if folder is None else folder_problem(Path(folder))
    if problem is not None and os.environ.get("RANK", "0") == "0":
        raise ConfigError(
            f"{arguments.config}: {key}: must be a folder that can be made and written into, got "
            f"{str(folder)[:100]!r} ({problem}). Name another."
        )


def _trainer(arguments: argparse.Namespace) -> Any:
    config = load_config(**_file(arguments))
    trainer = trainer_class(config.trainer)  # loads torch and diffusers, which takes seconds
    return trainer(config=config, source=str(arguments.config))


def _check(arguments: argparse.Namespace) -> int:
    kind = config_kind(arguments.config, arguments.overrides)
    require_clips_of_training(arguments, kind)
    check = {"trainer": _check_trainer, "encode": _check_encode, "sample": _check_sample}[kind]
    note = check(arguments)
    print(f"{arguments.config}: good{note}")
    return DONE


def _check_encode(arguments: argparse.Namespace) -> str:
    config = load_encode_config(**_file(arguments))
    _require_folder(arguments, "data.output_dir", config.data.output_dir)
    from aiprod_ds.encode.work import check_encoding  # loads torch and diffusers, which takes seconds

    return f", for encode: {check_encoding(config, source=str(arguments.config))}"


def _check_sample(arguments: argparse.Namespace) -> str:
    config = load_sample_config(**_file(arguments))
    _require_folder(arguments, "output_dir", config.output_dir)
    from aiprod_ds.encode.sample import check_sampling  # loads torch and diffusers, which takes seconds

    return f", for sample: {check_sampling(config, source=str(arguments.config))}"


def _check_trainer(arguments: argparse.Namespace) -> str:
    require_folder = partial(_require_folder, arguments, "output_dir")
    for note in check_trainer(arguments, _file(arguments), require_folder):
        arguments.console.print(note, markup=False, highlight=False)
    return ""


def _plan(arguments: argparse.Namespace) -> int:
    from aiprod_ds.curriculum.describe import describe, learning_rate_curve, totals
    from aiprod_ds.report.plan_view import PlanView

    _require_machine_for_estimates(arguments)
    trainer = _trainer(arguments)
    plan = trainer.plan(world_size=arguments.world_size)
    plan, data, data_problem = _with_data(trainer, plan)
    clips = None if data is None else data.clip_counts(plan)
    page = PlanView(
        source=trainer.source,
        model=trainer.config.model.source,
        parameters=trainer.num_parameters(),
        world_size=plan.world_size,
        data_problem=data_problem,
        rows=describe(plan, config=trainer.config, strides=trainer.strides, clips=clips),
        totals=totals(plan, clips=clips),
        curve=learning_rate_curve(plan, _CURVE_POINTS),
        evaluation=_evaluation(trainer, plan),
        found=() if data is None else data.found_buckets(plan),
    )
    estimate = _estimate(arguments, trainer, plan)
    if arguments.json:
        print(json.dumps(page.document() | estimate, indent=1))
    else:
        open_console().print(page)
        if estimate:
            from aiprod_ds.report.cost_view import CostView

            open_console().print(
                CostView(document=estimate["estimate"], memory_bytes=MACHINES[arguments.machine].memory_bytes)
            )
    return DONE


def _evaluation(trainer: Any, plan: RunPlan) -> dict[str, Any]:
    cost = trainer.evaluation_cost(plan)
    return {**cost.to_dict(), "text": cost.text, "warning": cost.warning}


def _require_machine_for_estimates(arguments: argparse.Namespace) -> None:
    for option, value in (("--plot", arguments.plot), ("--price-per-gpu-hour", arguments.price_per_gpu_hour)):
        if value is not None and arguments.machine is None:
            raise ConfigError(f"{option}: has no effect without --machine, got {value}. Add --machine.")


def _estimate(arguments: argparse.Namespace, trainer: Any, plan: RunPlan) -> dict[str, Any]:
    """Returns what the run needs and costs under the key `estimate`; nothing without --machine."""
    if arguments.machine is None:
        return {}
    from aiprod_ds.train.planning.estimate import estimate_run

    machine = MACHINES[arguments.machine]
    found = estimate_run(trainer, plan, machine, dollars_per_gpu_hour=arguments.price_per_gpu_hour).document()
    if arguments.plot is not None:
        from aiprod_ds.report.cost_plot import save_cost_plot  # loads matplotlib, which takes seconds

        save_cost_plot(found, machine.memory_bytes, arguments.plot)
    return {"estimate": found}


def _with_data(trainer: Any, plan: RunPlan) -> tuple[RunPlan, Any, str | None]:
    """Returns the plan with its buckets and lengths on the data and the data, or why that cannot be read.

    Raises:
        PlanError: If the data can be read and does not do.
    """
    try:
        data = trainer.open_data()
    except PlanError as error:
        return plan, None, str(error)
    plan = data.with_buckets(plan, trainer.source)
    data.check(plan, trainer.source)
    return data.with_lengths(plan, trainer.source), data, None


def _encode(arguments: argparse.Namespace) -> int:
    config = load_encode_config(**_file(arguments))
    _require_folder(arguments, "data.output_dir", config.data.output_dir)
    from aiprod_ds.encode.run import (
        GROUP_TIMEOUT_SECONDS,
        run_encoding,
    )  # loads torch and diffusers, which takes seconds
    from aiprod_ds.encode.summary import summary_text
    from aiprod_ds.engine import dist

    with dist.process_group(timeout_seconds=GROUP_TIMEOUT_SECONDS):
        summary = run_encoding(config, source=str(arguments.config), console=arguments.console)
        if dist.is_main():
            print(summary_text(summary))
    return DONE


def _train(arguments: argparse.Namespace) -> int:
    from aiprod_ds.engine import dist
    from aiprod_ds.report.summary import RunStatus

    trainer = _trainer(arguments)
    _require_folder(arguments, "output_dir", trainer.config.output_dir)
    with dist.process_group(lost_rank_seconds=trainer.config.engine.lost_rank_seconds):
        summary = trainer.train(
            resume=arguments.resume,
            accept_changed_data=arguments.accept_changed_data,
            console=arguments.console,
        )
    return DONE if summary.status is RunStatus.COMPLETED else INTERRUPTED


def _eval(arguments: argparse.Namespace) -> int:
    from aiprod_ds.engine import dist

    trainer = _trainer(arguments)
    with dist.process_group(lost_rank_seconds=trainer.config.engine.lost_rank_seconds):
        found = trainer.evaluation(resume=arguments.resume)
        if dist.is_main():
            print(json.dumps(_found(found), indent=1, allow_nan=False))
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from aiprod_ds.report.page.compare_page import PAGE, write_comparison
    from aiprod_ds.report.page.run_page import write_page
    from aiprod_ds.train.resume.folder_lock import is_in_use

    runs, output = arguments.runs, arguments.output
    try:
        if len(runs) == 1:
            print(write_page(runs[0], output=output, is_running=is_in_use(runs[0])))
        else:
            print(write_comparison(runs, output or Path(PAGE), is_running=is_in_use))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--output: must be a file that can be written, got {reason}. Name another."
        ) from error
    return DONE


def _found(evaluation: Any) -> dict[str, Any]:
    """Returns the measures, on which clips they were taken, and which of these some measure leaves out."""
    # JSON has no NaN: in words, as in metrics.jsonl.
    measures = {
        name: value if math.isfinite(value) else str(value) for name, value in evaluation.metrics.items()
    }
    left_out = [asdict(entry) for entry in evaluation.not_judged]
    return {**measures, "clips": list(evaluation.clips), "not_judged": left_out}


def _sample(arguments: argparse.Namespace) -> int:
    config = load_sample_config(**_file(arguments))
    _require_folder(arguments, "output_dir", config.output_dir)
    from aiprod_ds.encode.sample import run_sampling  # loads torch and diffusers, which takes seconds

    samples = run_sampling(config, source=str(arguments.config), console=arguments.console)
    for path in (*samples.clips, samples.contact_sheet, samples.record):
        print(path)
    return DONE


def _shard(arguments: argparse.Namespace) -> int:
    for line in run_shard(arguments):
        print(line)
    return DONE


def _data(arguments: argparse.Namespace) -> int:
    found = look(arguments)
    if found.view is not None:
        open_console().print(found.view)
    return DONE if found.survey.tally.num_used else FAILED


def _convert(arguments: argparse.Namespace) -> int:
    from aiprod_ds.convert.run import convert  # loads torch and diffusers, which takes seconds

    converted = convert(request_of(arguments), verify=arguments.verify, console=arguments.console)
    for line in converted.lines:
        print(line)
    return OLDER if converted.is_older else DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from aiprod_ds.convert.inspect import inspect_path  # loads torch and diffusers, which takes seconds

    page = replace(
        inspect_path(arguments.path, is_trusted=arguments.trust_checkpoint), all_tensors=arguments.all
    )
    if arguments.json:
        print(json.dumps(page.document(), indent=1))
    else:
        open_console().print(page, crop=False)
    return FAILED if page.problem else DONE


def _validate(arguments: argparse.Namespace) -> int:
    found = validated(arguments)
    if arguments.json:
        print(json.dumps(found.document(), indent=1))
    else:
        open_console().print(validation_table(found))
    return DONE if found.is_passed else FAILED


def _init(arguments: argparse.Namespace) -> int:
    made = begun(arguments)
    for path in made.files:
        print(path)
    for note in made.notes:
        arguments.console.print(note, markup=False, highlight=False)
    code = _main(["check", str(made.checked), *made.options])
    if code == DONE:
        print("Next:", *made.commands, sep="\n  ")
    return code


def _examples(arguments: argparse.Namespace) -> int:
    found = list_or_copy(arguments)
    if isinstance(found, Table):
        open_console().print(found)
    else:
        for line in found:
            print(line)
    return DONE


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.hostfile is None:
        from aiprod_ds.cluster.local import become, command_here

        command = command_here(arguments)
        if arguments.dry_run:
            print(shlex.join(command))
            return DONE
        become(command)
    from aiprod_ds.cluster.start import start

    return start(launch_request(arguments), arguments.console)


def _doctor(arguments: argparse.Namespace) -> int:
    from aiprod_ds.cluster.doctor import visit

    page = visit(arguments)
    if arguments.json:
        print(json.dumps(page.document(), indent=1))
    else:
        open_console().print(page)
    return FAILED if page.has_errors else DONE


def _set_up_logging(console: Console, *, is_main: bool, is_verbose: bool) -> None:
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, handlers=[log_handler(console)], force=True)
    for noisy in ("torch", "DeepSpeed", "deepspeed", "httpx", "huggingface_hub", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(level if is_verbose else logging.WARNING)
    logging.getLogger("aiprod_ds").setLevel(logging.DEBUG if is_verbose and is_main else logging.NOTSET)
    if not (is_main and console.is_terminal):
        # Bars in a file are thousands of lines; `aiprod_ds.progress` says there what takes long.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _explain(error: AiprodError, code: int) -> int:
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    with suppress(OSError):  # standard error may be a file, on a disk that is full
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return code
