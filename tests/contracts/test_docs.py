"""The documentation says what the code does: tables made from it are current, keys are complete, links and
examples work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.cli import main
from aiprod_ds.clock import Clock
from aiprod_ds.config.curriculum import default_phases
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.load import load_config, load_encode_config
from aiprod_ds.config.losses import FlowConfig, NoiseLevelConfig
from aiprod_ds.config.model import LoraConfig, ModelConfig
from aiprod_ds.config.optim import AdaptiveClipConfig, EmaConfig, OptimizerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import describe
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.errors import ConfigError
from aiprod_ds.losses.noise_level import noise_level_shift
from aiprod_ds.metrics.metric_names import table_markdown
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.lora import add_lora
from aiprod_ds.models.sampling import noise_levels
from aiprod_ds.optim.adaptive_clip import NormStatistics
from aiprod_ds.optim.ema import ema_decay
from aiprod_ds.report.summary import DataSummary, PhaseSummary, Picture, RunSummary
from aiprod_ds.testing.families import tiny_batch, tiny_transformer, velocities
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.phase_change import Retraining
from aiprod_ds.trainers.diffusion_export import export_transformer

_ROOT = Path(__file__).resolve().parents[2]
_PAGES = [_ROOT / "README.md", _ROOT / "ds_configs" / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_STRIDES = ModelStrides(spatial=32, temporal=8)
_CONFIGURATIONS = sorted((_ROOT / "configs").rglob("*.yaml"))
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def _name(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def _blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _FENCED.findall(page.read_text(encoding="utf-8")) if found == language]


def _yaml_examples() -> list[Any]:
    return [
        pytest.param(text, id=f"{_name(page)}-{number}")
        for page in _PAGES
        for number, text in enumerate(_blocks(page, "yaml"))
    ]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    anchors: set[str] = set()
    for heading in headings:
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        taken = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in anchors)
        anchors.add(f"{anchor}-{taken}" if taken else anchor)  # as GitHub numbers equal ones
    return anchors


def _code_words(page: str) -> set[str]:
    text = (_ROOT / "docs" / page).read_text(encoding="utf-8")
    return set(re.findall(r"`([\w.]+)`", text))


@pytest.mark.parametrize("tool", ["config_reference", "performance_tables"])
def test_tables_made_from_the_code_are_current(tool: str) -> None:
    command = [sys.executable, str(_ROOT / "tools" / f"{tool}.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["config_reference", "performance_tables"])
def test_a_stale_table_is_found_and_put_right(tool: str, tmp_path: Path) -> None:
    for name in ("tools", "docs", "benchmarks"):
        (tmp_path / name).mkdir()
    script, page = (
        tmp_path / "tools" / f"{tool}.py",
        {"config_reference": "configuration", "performance_tables": "performance"},
    )
    script.write_text((_ROOT / "tools" / f"{tool}.py").read_text())
    copy = tmp_path / "docs" / f"{page[tool]}.md"
    whole = (_ROOT / "docs" / copy.name).read_text()
    (tmp_path / "benchmarks").rmdir()
    (tmp_path / "benchmarks").symlink_to(_ROOT / "benchmarks")
    copy.write_text(whole.replace("| value |", "| other |").replace("| meaning |", "| other |"))

    def run(*options: str) -> int:
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        return subprocess.run(
            [sys.executable, str(script), *options], env=environment, timeout=60, check=False
        ).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0


@pytest.mark.parametrize("page", _PAGES, ids=_name)
def test_tests_that_pages_name_exist(page: Path) -> None:
    missing = []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        path = _ROOT / file
        if not path.is_file() or f"def {name}(" not in path.read_text(encoding="utf-8") + "def (":
            missing.append(f"{file}::{name}")
    assert missing == []


@pytest.mark.parametrize("page", _PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("text", _yaml_examples())
def test_yaml_examples_load(text: str, tmp_path: Path) -> None:
    """A whole configuration on its own; a part of one over the quickstart's, so that its keys and values are
    checked too."""
    values = yaml.safe_load(text)
    base = (
        ""
        if "base" in values or {"output_dir", "model", "data"} <= set(values)
        else "base: ../configs/video_vae/tiny.yaml\n"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(_ROOT / "configs")
    example = tmp_path / "docs" / "example.yaml"
    if "media" in values.get("data", {}):  # of encode
        example.write_text(text)
        assert load_encode_config(example).data.media
        return
    example.write_text(base + text)
    assert load_config(example).curriculum.phases


def test_there_are_examples_to_load() -> None:
    found = [text for page in _PAGES for text in _blocks(page, "yaml") if "output_dir:" in text]
    assert len(found) >= 2


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(_python_example("class PatchVAE"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-W", "error", "example.py"]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    measures = re.fullmatch(r"PSNR ([\d.]+) -> ([\d.]+) dB", finished.stdout.strip())
    assert measures is not None, finished.stdout
    assert float(measures[2]) > float(measures[1]) + 1  # it learns; measured: 8.8 -> 22.7
    assert (tmp_path / "runs" / "patch_vae" / "report.json").is_file()


def _python_example(part: str) -> str:
    (found,) = (text for text in _blocks(_ROOT / "docs" / "guide.md", "python") if part in text)
    return found


def test_the_example_of_loading_exports_predicts_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, adapted = (_export_tiny(tmp_path, lora=lora) for lora in (None, LoraConfig(rank=4, alpha=6.0)))
    assert float((full - adapted).abs().max()) > 1e-2, "otherwise the comparisons show nothing"
    monkeypatch.chdir(tmp_path)
    imports, *ways = _python_example("load_lora_adapter").split("\n\n")
    found: list[Tensor] = []
    for way in ways:
        names: dict[str, Any] = {}
        exec(f"{imports}\n{way}", names)
        found.append(_answer(names["transformer"]))
    by_diffusers, by_diffusers_lora, by_peft, by_pipeline = found
    assert torch.equal(by_diffusers, full)
    assert torch.equal(by_diffusers_lora, adapted)
    assert torch.equal(by_peft, adapted)
    # Outputs of order 1; the scale inside B and the scale after B A x round differently in fp32.
    torch.testing.assert_close(by_pipeline, adapted, rtol=1e-6, atol=2e-6)


def _export_tiny(folder: Path, *, lora: LoraConfig | None) -> Tensor:
    """Exports a tiny trained model to FULL_RUN, or its adapters to LORA_RUN and its base to BASE; returns its
    answer."""
    transformer = tiny_transformer(LTXVideo)
    family = find_family(transformer, _STRIDES)
    if lora is not None:
        transformer.save_pretrained(folder / "BASE")
        add_lora(transformer, lora, allowed=family.lora_targets, seed=0)
    module = DiffusionModule(transformer, family)
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings({"zero_optimization": {"stage": 1}}, where="test"),
        micro_batch_size=2,
        accumulation=1,
    )
    engine.set_learning_rate(0.03)
    for seed in (1, 2):  # the second update is the first that moves every adapter
        engine.backward(velocities(engine, family, tiny_batch(seed=seed)).float().square().mean())
        engine.step()
    run = folder / ("FULL_RUN" if lora is None else "LORA_RUN")
    run.mkdir()
    export_transformer(engine, module, run / "export", lora=lora)
    return _answer(transformer)


def _answer(transformer: nn.Module) -> Tensor:
    family = find_family(transformer, _STRIDES)
    with torch.no_grad():
        return velocities(DiffusionModule(transformer.eval(), family), family, tiny_batch())


def test_the_example_of_a_family_stands_in_the_code() -> None:
    page = (_ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("\n## Adding a family\n")
    section, _, _ = rest.partition("\n## ")
    parts = [text for _, text in _FENCED.findall(section)]
    source = (_ROOT / "aiprod_ds" / "models" / "families" / "ltx.py").read_text(encoding="utf-8")
    assert len(parts) == 4
    for part in parts:
        assert any(indent(part, " " * depth) in source for depth in (4, 8)), part


def test_worked_numbers_of_diffusion_are_those_of_the_code() -> None:
    page = (_ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    levels = NoiseLevelConfig()
    shifts = [noise_level_shift(tokens, levels) for tokens in (512, 1024, 2560, 4096, 6750)]
    assert "| mu | " + " | ".join(f"{shift:.3g}" for shift in shifts) + " |" in page
    middles = [float(torch.tensor(shift).sigmoid()) for shift in shifts]
    assert "| middle level, sigmoid(mu) | " + " | ".join(f"{middle:.3f}" for middle in middles) + " |" in page
    weights = FlowConfig().weights()
    assert (
        f"{weights['video_weight'] * 1.1473 + weights['audio_weight'] * 0.7801:.4f} in all"
        in page.replace("\n", " ")
    )
    assert ", ".join(f"{level:.3g}" for level in noise_levels(4, shift=3.0).tolist()) in page
    decays = [ema_decay(EmaConfig(), samples_before=n, samples_after=n + 32) for n in (320, 4_000_000)]
    assert f"decay {decays[0]:.6f} from 320 to 352 samples, {decays[1]:.8f} from 4,000,000 on" in page
    clip = AdaptiveClipConfig(smoothing=0.5, warmup_updates=1)
    assert f"{NormStatistics().observe(1.0, clip).observe(4.0, clip).limit(clip, None):.5f}" in page


def _plan_commands() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in (*_PAGES, *_CONFIGURATIONS)]
    found = {
        match
        for text in texts
        for match in re.findall(r"^(?:#\s+)?aiprod-ds (plan configs/.*?)(?:\s+#.*)?$", text, re.M)
    }
    return sorted(found)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if "ltx2" in command else ())  # of 19 billion parameters
        for command in _plan_commands()
    ],
)
def test_plan_commands_work(
    command: str, in_repository_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shlex.split(command), *_without_download(command)]) == 0, capsys.readouterr().err


def _without_download(command: str) -> list[str]:
    """Plans models of the hub from their classes' defaults, which are the published sizes."""
    config = load_config(_ROOT / shlex.split(command)[1])
    found = {name: getattr(config, name, None) for name in ("model", "vae", "audio_vae")}
    of_the_hub = [
        name
        for name, model in found.items()
        if isinstance(model, ModelConfig) and model.subfolder is not None
    ]
    keys = [f"{name}.{key}" for name in of_the_hub for key in ("pretrained", "subfolder")]
    return [part for key in keys for part in ("--set", f"{key}=null")]


@pytest.mark.parametrize("path", [path for path in _CONFIGURATIONS if path.name != "tiny.yaml"], ids=_name)
def test_large_configurations_say_how_to_use_them_and_that_they_were_not_run(path: Path) -> None:
    text = path.read_text()
    use = (
        f"encode_local.sh {_name(path)}"
        if path.parent.name == "encode"
        else f"plan {_name(path)} --world-size"
    )
    assert use in text
    assert "NOT RUN YET" in text


def test_every_metric_is_documented() -> None:
    assert table_markdown() in (_ROOT / "docs" / "file_formats.md").read_text(), (
        "Replace the table in docs/file_formats.md by what aiprod_ds.metrics.metric_names.table_markdown() "
        "returns."
    )


@pytest.mark.parametrize("record", [RunSummary, PhaseSummary, DataSummary, Picture, RunState, Retraining])
def test_every_key_of_the_report_and_the_state_is_documented(record: type) -> None:
    assert {field.name for field in fields(record)} - _code_words("file_formats.md") - {"clock"} == set()


def test_every_key_of_the_clock_is_documented() -> None:
    assert {f"clock.{name}" for name in Clock().to_dict()} - _code_words("file_formats.md") == set()


def test_every_key_of_the_plan_is_documented() -> None:
    config = load_config(_ROOT / "configs" / "video_vae" / "tiny.yaml")
    rows = describe(plan_run(config, world_size=1, strides=_STRIDES))
    keys = {re.sub(r"^(min|max)_", "", key) for row in rows for key in row}
    assert keys - _code_words("file_formats.md") == set()


@pytest.mark.parametrize(
    "section", ["", "zero_optimization", "fp16", "bf16", "activation_checkpointing", "data_types"]
)
def test_every_key_of_a_settings_file_is_documented(section: str) -> None:
    wrong: dict[str, Any] = {"qqqqqqqqqqqq": 1}
    with pytest.raises(ConfigError, match="Valid keys: ") as error:
        parse_deepspeed_settings({section: wrong} if section else wrong, where="test")
    keys = str(error.value).partition("Valid keys: ")[2].rstrip(".").split(", ")
    words = {part for word in _code_words("configuration.md") for part in word.split(".")}
    assert set(keys) - words == set()


def test_the_default_curriculum_is_as_documented() -> None:
    text = (_ROOT / "docs" / "configuration.md").read_text()
    for phase in default_phases():
        assert phase.resolution is not None
        assert phase.duration is not None
        rate = f"{phase.learning_rate:.0e}".replace("e-0", "e-")
        row = (
            f"| {phase.name} | {phase.resolution.height}x{phase.resolution.width} | {phase.duration.frames} "
            "| "
        )
        row += f"{phase.micro_batch_size} | {phase.accumulation} | {rate} | {phase.updates:,} | {phase.warmup_updates:,} |"  # noqa: E501
        assert row in text


def test_defaults_in_the_guide_are_those_of_the_code() -> None:
    text = (_ROOT / "docs" / "guide.md").read_text()
    loss = VAETrainerConfig.model_fields["loss"].default
    assert f"`kl_weight` is {loss.kl_weight:.0e}".replace("e-0", "e-") in text
    assert f"`perceptual_weight` is {loss.perceptual_weight}" in text
    assert f"haar_weight {loss.haar_weight}" in text
