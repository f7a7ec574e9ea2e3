"""No input yields a traceback: configurations, `--set`, tables, hostfiles, run folders and command lines that
are not what the program expects, in this process. Each ends with exit code 0, 1 or 2 (of `convert` also 3)
within 20 s.

`make test` runs 2,000 cases, `make test-all` 3,000 others beside them. What was found once stands as an
example.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, seed
from hypothesis import strategies as st

from aiprod_ds import crash
from aiprod_ds.checkpoint.manifest import write_manifest
from aiprod_ds.cli import main
from aiprod_ds.testing.fuzz import NUMBERS, ODD, TEXTS, cases, damaged, mutated, paths_of, text_of, written
from aiprod_ds.testing.tiny import tiny_ltx_vae, tiny_oobleck

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 20
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "DeepSpeed", "deepspeed", "httpx", "huggingface_hub", "matplotlib", "PIL", "aiprod_ds")


def _more(count: int, more: int) -> Any:
    """Cases of `make test`, and others of `make test-all`."""
    return pytest.mark.parametrize("count", [count, pytest.param(more, marks=pytest.mark.exhaustive)])


def _fuzz(count: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    return lambda test: seed(count)(cases(count)(given(*strategies)(test)))()


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with what the shipped configurations name; no hub is asked."""
    import huggingface_hub.constants

    from aiprod_ds.models import registry, text  # noqa: F401  what they import takes no command's time

    for source in ("AutoencoderKLLTXVideo", "AutoencoderOobleck", "LTXVideoTransformer3DModel"):
        registry.resolve(source)
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("samples", "ds_configs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("AIPROD_DS_CACHE_DIR", str(folder / "probes"))
        os.chdir(folder)
        yield folder
        os.chdir(before)


def _ends_well(*arguments: str, may_be: Collection[int] = (0, 1, 2)) -> int:
    """Runs a command and returns its exit code; nothing may be unforeseen, hang or warn."""
    unforeseen: list[str] = []

    def told(error: Exception, program: str, *, is_verbose: bool) -> None:
        unforeseen.append("".join(traceback.format_exception(error)))

    with pytest.MonkeyPatch.context() as patch, _limited(), _quiet():
        patch.setattr(crash, "_tell", told)
        try:
            code: Any = main(list(arguments))
        except SystemExit as end:  # argparse
            code = end.code
    assert not unforeseen, f"{arguments}: {unforeseen[0]}"
    assert code in may_be
    return int(code)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"over {LIMIT_SECONDS} s in\n" + "".join(traceback.format_stack(frame)[-8:]))

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, value in levels.items():
            logging.getLogger(name).setLevel(value)


def _shipped(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / name).read_text())
    return values


def _documents() -> list[dict[str, Any]]:
    """The shipped configurations that are small enough to build, those of encode and sample with random
    weights, so that models are built of them as well."""
    encode, sample = _shipped("encode/tiny.yaml"), _shipped("sample/tiny.yaml")
    video = {"source": "AutoencoderKLLTXVideo", "config": tiny_ltx_vae()}
    audio = {"source": "AutoencoderOobleck", "config": tiny_oobleck()}
    encode["video"]["model"], encode["audio"]["model"] = video, audio
    sample["vae"], sample["audio_vae"] = video, audio
    names = ("video_vae/tiny.yaml", "audio_vae/tiny.yaml", "diffusion/tiny.yaml")
    return [*map(_shipped, names), encode, sample]


def _large() -> list[dict[str, Any]]:
    """The other shipped configurations."""
    return [
        _shipped(str(path.relative_to(ROOT / "configs")))
        for path in sorted(ROOT.glob("configs/*/*_[hv]*.yaml"))
    ]


# Each of these ended with a traceback, hung or ran something before.
FOUND = [
    ("check", ["model.source=subprocess:getoutput", "model.config={cmd: touch bad}"]),
    ("check", ["model.source=os:abort", "model.config={}"]),
    ("check", ["model.source=sys:exit", "model.config={}"]),
    ("check", ["model.source=DDPMScheduler", "model.config={}"]),
    ("check", ["model.source=UNet2DModel", "model.config={}"]),
    ("check", ["seed=0x" + "f" * 20_000]),
    ("check", ["curriculum.phases[0].global_batch_size=100000000000000000000"]),
    ("check", ["curriculum.phases[0].learning_rate=1e300"]),
    ("check", ["output_dir=/dev/null"]),
    ("check", ["output_dir=/proc/nothing/here"]),
    ("check", ["output_dir=" + "n" * 300]),
    ("check", ['output_dir="a\\0b"']),
    ("check", ['output_dir="\\ud800"']),
    ("check", ["data.train=/dev/zero"]),
    ("check", ["engine.deepspeed_config=/dev/zero"]),
    ("check", ["base=/dev/zero"]),
    ("check", ["model.config.spatio_temporal_scaling[0]=-1075"]),
]


@pytest.mark.parametrize(("command", "overrides"), FOUND)
def test_what_was_found_once(place: Path, command: str, overrides: list[str]) -> None:
    options = [part for override in overrides for part in ("--set", override)]
    assert _ends_well(command, "configs/video_vae/tiny.yaml", *options) == 2
    assert not (place / "bad").exists()


@pytest.mark.parametrize(
    "options", [["--world-size", "0"], ["--world-size", "-1"], ["--world-size", "1" * 30]]
)
def test_numbers_of_ranks_that_cannot_be_are_refused(options: list[str]) -> None:
    for command in ("check", "plan"):
        assert _ends_well(command, "configs/video_vae/tiny.yaml", *options) == 2


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "1e300"])
def test_prices_that_cannot_be_are_refused(price: str) -> None:
    options = ("--machine", "h100-80gb", f"--price-per-gpu-hour={price}")
    assert _ends_well("plan", "configs/video_vae/tiny.yaml", *options) == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "deep"])
def test_a_base_that_is_no_file_of_settings_is_refused_at_once(place: Path, kind: str) -> None:
    base = place / f"base_{kind}"
    if kind == "pipe":
        os.mkfifo(base)
    elif kind == "device":
        base.symlink_to("/dev/zero")
    else:
        base.write_text("a: " + "[" * 100_000)
    (place / "over.yaml").write_text(f"base: {base}\nseed: 1\n")
    assert _ends_well("check", "over.yaml") == 2


@_more(300, 450)
def test_configurations(place: Path, count: int) -> None:
    def one(data: bytes, command: str) -> None:
        (place / "fuzz.yaml").write_bytes(data)
        _ends_well(command, "fuzz.yaml")

    _fuzz(count, written(_documents()), st.sampled_from(("check", "check", "plan")))(one)


@_more(100, 150)
def test_configurations_that_are_too_large_to_build_here(place: Path, count: int) -> None:
    def one(data: bytes) -> None:
        (place / "fuzz.yaml").write_bytes(data)
        assert _ends_well("check", "fuzz.yaml", "--set", "seed=-1") == 2

    _fuzz(count, written(_large()))(one)


@_more(450, 675)
def test_overrides(place: Path, count: int) -> None:
    document = _shipped("video_vae/tiny.yaml")
    names = [_dotted(path) for path in paths_of(document)]
    value = ODD.map(text_of) | st.sampled_from(TEXTS)
    override = st.tuples(st.sampled_from(names) | st.text(max_size=8), value).map(
        lambda pair: f"{pair[0]}={pair[1]}"
    )

    def one(overrides: list[str], command: str) -> None:
        _ends_well(command, "configs/video_vae/tiny.yaml", *(f"--set={each}" for each in overrides))

    _fuzz(
        count,
        st.lists(override | st.text(max_size=10), min_size=1, max_size=2),
        st.sampled_from(("check", "plan")),
    )(one)


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/zero", "a\0b", "\ud800", "x/" * 3000])
def test_what_is_no_file_of_weights_is_told(path: str) -> None:
    assert _ends_well("inspect", path) == 1


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


@_more(480, 720)
def test_hostfiles_and_files_of_the_environment(place: Path, count: int) -> None:
    line = st.sampled_from(
        (
            "node-a slots=2",
            "node-b slots=99999999999999999999",
            "h;touch x slots=1",
            "a slots=-1",
            "# c",
            "\0",
            "x" * 999,
        )
    ) | st.text(max_size=20)
    lines = st.lists(line, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "replace"))

    def one(hosts: bytes, environment: bytes, include: str) -> None:
        (place / "hosts").write_bytes(hosts)
        (place / "environment").write_bytes(environment)
        options = (
            "--hostfile",
            "hosts",
            "--env-file",
            "environment",
            f"--include={include}",
            "--dry-run",
            "--no-ssh",
        )
        assert _ends_well("launch", "missing.yaml", "run", *options) == 2

    include = st.sampled_from(("", "node-a", "node-a:0,1", "node-a:x@", "@", ":", "a:-1")) | st.text(
        max_size=8
    )
    _fuzz(count, lines.flatmap(damaged), lines.flatmap(damaged), include)(one)


@pytest.mark.parametrize(
    "row",
    [{"video": "a\0b"}, {"video": "\ud800"}, {"video": "a", "audio": 5}, {"video": "a", "caption": ["b"]}],
)
def test_cells_that_are_no_names(place: Path, row: dict[str, Any]) -> None:
    (place / "cells.json").write_text(json.dumps([row]))
    assert _ends_well("check", "configs/video_vae/tiny.yaml", "--set", "data.train=cells.json") == 2


@_more(200, 300)
def test_tables(place: Path, count: int) -> None:
    # a model that costs no time to build
    model = {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "spatial_stride": 4, "temporal_stride": 2}
    (place / "tables.yaml").write_text(json.dumps(_shipped("video_vae/tiny.yaml") | {"model": model}))
    media = str(ROOT / "samples" / "nothing.mp4")
    rows = [[{"video": media, "caption": "a"}, {"media_path": "b.mp4", "audio": "c.wav"}]]
    cell = st.sampled_from((*map(str, NUMBERS[:8]), *TEXTS)).map(lambda text: text.replace('"', '""'))
    csv = st.lists(
        st.lists(cell, min_size=1, max_size=3).map(lambda row: '"' + '","'.join(row) + '"'), max_size=3
    )
    tables = (
        st.tuples(st.just("json"), written(rows))
        | st.tuples(st.just("jsonl"), mutated(rows).map(_lines).flatmap(damaged))
        | st.tuples(st.just("csv"), csv.map(_csv).flatmap(damaged))
    )

    def one(table: tuple[str, bytes]) -> None:
        name = f"table.{table[0]}"
        (place / name).write_bytes(table[1])
        _ends_well("check", "tables.yaml", "--set", f"data.train={name}")

    _fuzz(count, tables)(one)


def _lines(rows: Any) -> bytes:
    return "\n".join(map(text_of, rows if isinstance(rows, list) else [rows])).encode()


def _csv(rows: list[str]) -> bytes:
    return "\n".join(["video,caption,audio", *rows]).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The folder of a run with checkpoints."""
    document = _shipped("video_vae/tiny.yaml")
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "updates": 1,
        "learning_rate": 1e-3,
    }
    document |= {
        "model": {"source": "AutoencoderKLLTXVideo", "config": tiny_ltx_vae()},
        "output_dir": str(place / "run"),
        "curriculum": {"phases": [{**phase, "global_batch_size": 1}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 0}}},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        "loss": {"perceptual_weight": 0.0},
    }
    document["data"]["num_workers"] = 0
    (place / "run.yaml").write_text(json.dumps(document))
    from aiprod_ds.testing.runs import without_plots

    with without_plots():
        assert _ends_well("train", "run.yaml") == 0
    return place / "run"


@_more(120, 180)
def test_run_folders(place: Path, run: Path, count: int) -> None:
    """Damaged ones, and forged ones, whose manifests are right."""
    names = sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.suffix in {".json", ".jsonl", ".yaml"} and path.is_file()
    )
    kept = {name: (run / name).read_bytes() for name in names}
    documents = {name: _parsed(name, kept[name]) for name in names}
    contents = st.sampled_from(names).flatmap(
        lambda name: st.tuples(
            st.just(name),
            mutated([documents[name]]).map(_lines).flatmap(damaged)
            if name.endswith(".jsonl")
            else written([documents[name]]),
        )
    )
    folder, out = place / "damaged", place / "converted"

    def one(content: tuple[str, bytes], command: str, is_forged: bool) -> None:
        name, data = content
        for old in (folder, out):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(run, folder)
        (folder / name).write_bytes(data)
        if is_forged and name.startswith("checkpoints/") and not name.endswith("manifest.json"):
            write_manifest(folder / "/".join(Path(name).parts[:2]))
        options = {
            "convert": [str(folder), str(out)],
            "report": [str(folder), "--output", str(place / "page.html")],
            "train": ["run.yaml", "--output-dir", str(folder)],
        }
        _ends_well(command, *options.get(command, [str(folder)]), may_be={0, 1, 2, 3})

    from aiprod_ds.testing.runs import without_plots

    commands = st.sampled_from(("inspect", "convert", "report", "train"))
    with without_plots():
        _fuzz(count, contents, commands, st.booleans())(one)


def _parsed(name: str, data: bytes) -> Any:
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in data.splitlines()]
    return yaml.safe_load(data)


@_more(350, 525)
def test_command_lines(place: Path, run: Path, count: int) -> None:
    harmless = ("check", "plan", "inspect", "convert", "nothing", "--help", "")
    options = (
        *(
            "--set",
            "--output-dir",
            "--verbose",
            "--trust-code",
            "--machine",
            "h100-80gb",
            "--gpus",
            "--json",
            "--plot",
        ),
        *(
            "--price-per-gpu-hour",
            "--to",
            "diffusers",
            "--rank",
            "--alpha",
            "--shard-gb",
            "--prefix",
            "--all",
            "--ema",
        ),
        *("seed=1", "configs/video_vae/tiny.yaml", "run", "missing", "0", "-1", "nan", "1e300", "-", "--"),
    )
    part = st.sampled_from(options) | st.sampled_from(TEXTS) | st.text(max_size=6)

    def one(command: str, parts: list[str]) -> None:
        _ends_well(command, *parts)

    _fuzz(count, st.sampled_from(harmless), st.lists(part, max_size=6))(one)
