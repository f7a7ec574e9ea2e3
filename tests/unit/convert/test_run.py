"""`aiprod-ds convert` and `inspect` on real runs and tiny models; oracles are the run's own export, diffusers
and the source."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint

from aiprod_ds.checkpoint import manifest
from aiprod_ds.cli import BAD_CONFIGURATION, DONE, FAILED, OLDER, main
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.load import load_config
from aiprod_ds.convert.lora import Extraction
from aiprod_ds.files import file_sha256
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.testing.families import pipeline_around, tiny_transformer
from aiprod_ds.trainers.diffusion import DiffusionTrainer

pytestmark = pytest.mark.slow

VAE = {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "temporal_stride": 8}
LORA = {"training_mode": "lora", "lora": {"rank": 4, "alpha": 6.0, "targets": ["*"]}}
WEIGHTS = "diffusion_pytorch_model.safetensors"
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)
each_published = pytest.mark.parametrize(
    "family_type", [family for family in FAMILIES if family.published], ids=lambda family: family.name
)


def _train(folder: Path, family: type[Family], stride: int, **sections: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 2, 4, 4), "prompt_embeds": (3, 16)}
    clips = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(8)
    ]
    phase = {
        "name": "only",
        "resolution": f"{4 * stride}x{4 * stride}",
        "duration": {"frames": 9},
        "updates": 2,
    }
    config = DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": family.transformer_class, "config": family.tiny_config()},
            "vae": {**VAE, "spatial_stride": stride},
            "data": {"train": "given_in_code", "num_workers": 0},
            "curriculum": {"phases": [{**phase, "learning_rate": 3e-3, "global_batch_size": 4}]},
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 2, "num_pictures": 0, "noise_levels": [0.5]},
            "checkpoint": {"every_updates": 1},
            **sections,
        }
    )
    DiffusionTrainer(config, source="test.yaml", dataset=clips[:6], validation=clips[6:]).train()
    assert load_config(folder / "config.yaml").trainer == "diffusion"
    return folder


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("full") / "run", LTXVideo, 32, ema={"half_life_samples": 4})


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters on a folder's weights, to which its checkpoints refer."""
    folder = tmp_path_factory.mktemp("lora")
    model = {"source": "WanTransformer3DModel", "pretrained": str(_folder(Wan, folder / "base"))}
    return _train(folder / "run", Wan, 16, model=model, **LORA)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], value) for name, value in second.items()
    )


def _folder(family: type[Family], folder: Path, *, seed: int = 0) -> Path:
    """A transformer in diffusers' layout."""
    tiny_transformer(family, seed=seed).save_pretrained(folder)
    return folder


def _loaded(family: type[Family], folder: Path) -> dict[str, Tensor]:
    model, info = getattr(diffusers, family.transformer_class).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    state: dict[str, Tensor] = model.state_dict()
    return state


def test_a_run_becomes_what_it_exported(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export of a run with `ema` is the average, gathered from the live engine; here it comes from the
    files."""
    assert _convert(full_run, tmp_path / "average", "--ema", "--verify") == DONE
    shown = capsys.readouterr().out
    assert "update 2 (update_000002), average" in shown
    assert "run folder to diffusers" in shown
    assert "verified" in shown
    assert _same(_loaded(LTXVideo, tmp_path / "average"), load_file(full_run / "export" / WEIGHTS))
    assert _convert(full_run, tmp_path / "last") == DONE
    last = load_file(tmp_path / "last" / WEIGHTS)
    assert not _same(last, load_file(full_run / "export" / WEIGHTS))
    assert (
        json.loads((tmp_path / "last" / "config.json").read_text())["_class_name"]
        == "LTXVideoTransformer3DModel"
    )
    assert _convert(full_run / "checkpoints" / "update_000001", tmp_path / "first") == DONE
    assert (
        _convert(
            full_run,
            tmp_path / "named",
            "--checkpoint",
            "update_000001",
            "--dtype",
            "bf16",
            "--shard-gb",
            1e-5,
        )
        == DONE
    )
    first = load_file(tmp_path / "first" / WEIGHTS)
    assert not _same(first, last)
    assert len(list((tmp_path / "named").glob("*.safetensors"))) > 2
    rounded = diffusers.LTXVideoTransformer3DModel.from_pretrained(
        tmp_path / "named", torch_dtype=torch.bfloat16
    ).state_dict()
    assert _same(rounded, {name: value.bfloat16() for name, value in first.items()})


def test_a_run_starts_from_what_was_converted(full_run: Path, tmp_path: Path) -> None:
    assert _convert(full_run, tmp_path / "model") == DONE
    model = {"source": "LTXVideoTransformer3DModel", "pretrained": str(tmp_path / "model")}
    run = _train(tmp_path / "next", LTXVideo, 32, model=model)
    assert _convert(run, tmp_path / "trained", "--verify") == DONE
    assert load_file(tmp_path / "trained" / WEIGHTS).keys() == load_file(tmp_path / "model" / WEIGHTS).keys()


def test_adapters_of_a_run_become_what_it_exported(lora_run: Path, tmp_path: Path) -> None:
    export = lora_run / "export"
    assert _convert(lora_run, tmp_path / "peft", "--to", "peft", "--verify") == DONE
    weights = "adapter_model.safetensors"
    assert _same(load_file(tmp_path / "peft" / weights), load_file(export / "peft" / weights))
    assert _convert(lora_run, tmp_path / "comfyui.safetensors", "--to", "comfyui", "--verify") == DONE
    assert _same(load_file(tmp_path / "comfyui.safetensors"), load_file(export / "comfyui.safetensors"))
    assert (
        _convert(
            lora_run, tmp_path / "lora.safetensors", "--to", "diffusers-lora", "--dtype", "bf16", "--verify"
        )
        == DONE
    )


def test_adapters_of_a_trainer_that_is_not_here_become_what_it_exported(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    text = (run / "config.yaml").read_text()
    assert "trainer: diffusion\n" in text
    own = text.replace("trainer: diffusion\n", "trainer: not_here.at_all:Own\n")
    (run / "config.yaml").write_text("key_of_its_own: 1\n" + own)
    assert _convert(run, tmp_path / "peft", "--to", "peft", "--verify") == DONE
    weights = "adapter_model.safetensors"
    assert _same(load_file(tmp_path / "peft" / weights), load_file(run / "export" / "peft" / weights))
    assert _convert(run, tmp_path / "merged", "--verify") == DONE
    (run / "config.yaml").write_text(own.replace("learning_rate: ", "learning_rat: "))
    assert _convert(run, tmp_path / "out") == BAD_CONFIGURATION
    assert "learning_rat: is not a known key" in capsys.readouterr().err


def test_adapters_of_a_run_are_merged_as_those_of_a_file(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, export = lora_run.parent / "base", lora_run / "export"
    assert _convert(export, tmp_path / "again", "--to", "diffusers", "--base", base, "--verify") == DONE
    expected = _loaded(Wan, tmp_path / "again")
    assert not _same(expected, _loaded(Wan, base))
    assert _convert(lora_run, tmp_path / "merged", "--verify") == DONE
    assert _same(_loaded(Wan, tmp_path / "merged"), expected)
    moved = tmp_path / "moved"
    base.rename(moved)
    try:
        assert _convert(lora_run, tmp_path / "out", "--to", "safetensors") == FAILED
        config = moved / "config.json"
        assert _convert(lora_run, tmp_path / "named", "--base", moved, "--config", config, "--verify") == DONE
        assert _same(_loaded(Wan, tmp_path / "named"), expected)
        other = _folder(Wan, tmp_path / "other", seed=1)
        assert _convert(lora_run, tmp_path / "out", "--base", other, "--config", config) == FAILED
        assert "must be the weights that the adapters were trained on" in capsys.readouterr().err
    finally:
        moved.rename(base)


def test_a_checkpoint_that_holds_its_base_needs_nothing_else(tmp_path: Path) -> None:
    run = _train(tmp_path / "run", Wan, 16, **LORA, checkpoint={"every_updates": 1, "self_contained": True})
    assert _convert(run, tmp_path / "merged", "--verify") == DONE
    config = tmp_path / "merged" / "config.json"
    base = load_config(run / "config.yaml")
    from aiprod_ds.models.registry import build_model

    start: Any = build_model(base.model, seed=base.seed)
    start.save_pretrained(tmp_path / "start")
    assert (
        _convert(run / "export", tmp_path / "again", "--base", tmp_path / "start", "--config", config) == DONE
    )
    assert _same(_loaded(Wan, tmp_path / "merged"), _loaded(Wan, tmp_path / "again"))


@each_published
def test_a_single_file_and_back_is_the_same_to_the_bit(family_type: type[Family], tmp_path: Path) -> None:
    source = _folder(family_type, tmp_path / "source")
    assert _convert(source, tmp_path / "x.safetensors", "--to", "single-file", "--verify") == DONE
    back = tmp_path / "back"
    assert _convert(tmp_path / "x.safetensors", back, "--config", source, "--verify") == DONE
    assert _same(_loaded(family_type, back), _loaded(family_type, source))
    loader = getattr(
        diffusers, family_type.transformer_class
    )  # diffusers' own reader, with the folder's configuration
    single = loader.from_single_file(str(tmp_path / "x.safetensors"), config=str(source)).state_dict()
    assert _same(single, _loaded(family_type, source))


def test_a_file_of_diffusers_names_starts_a_run_once_it_has_its_configuration(tmp_path: Path) -> None:
    source = _folder(LTXVideo, tmp_path / "source")
    beside = {**load_file(source / WEIGHTS), "other": torch.ones(1)}
    save_file(beside, tmp_path / "x.safetensors")
    options = ("--config", source / "config.json", "--verify")
    assert _convert(tmp_path / "x.safetensors", tmp_path / "out", *options) == FAILED
    assert _convert(tmp_path / "x.safetensors", tmp_path / "out", *options, "--allow-unknown") == DONE
    assert _same(_loaded(LTXVideo, tmp_path / "out"), _loaded(LTXVideo, source))


@each_family
def test_every_form_of_a_lora_becomes_every_other(family_type: type[Family], tmp_path: Path) -> None:
    base, tuned = _folder(family_type, tmp_path / "base"), _folder(family_type, tmp_path / "tuned", seed=1)
    assert _convert(tuned, tmp_path / "peft", "--base", base, "--rank", 2, "--to", "peft", "--verify") == DONE
    forms = {"peft": "peft", "diffusers-lora": "d.safetensors"}
    if family_type.published is not None:
        forms["comfyui"] = "c.safetensors"
    merged: dict[str, dict[str, Tensor]] = {}
    for first, source in forms.items():
        if first != "peft":
            assert (
                _convert(tmp_path / "peft", tmp_path / source, "--to", first, "--base", base, "--verify")
                == DONE
            )
        for second, out in forms.items():
            target = tmp_path / f"{first}_{out}"
            assert _convert(tmp_path / source, target, "--to", second, "--config", base, "--verify") == DONE
        assert _convert(tmp_path / source, tmp_path / f"{first}_merged", "--base", base, "--verify") == DONE
        merged[first] = _loaded(family_type, tmp_path / f"{first}_merged")
    assert all(_same(merged["peft"], other) for other in merged.values())
    assert not _same(merged["peft"], _loaded(family_type, base))
    pipeline = pipeline_around(
        tiny_transformer(family_type), family_type.of(tiny_transformer(family_type), _strides(family_type))
    )
    pipeline.load_lora_weights(str(tmp_path / "d.safetensors"))  # diffusers' own reader knows every key
    adapted = [name for name, _ in pipeline.transformer.named_parameters() if ".lora_A." in name]
    assert len(adapted) == len(load_file(tmp_path / "d.safetensors")) // 2


class Unpublished(Wan):
    """A family whose publication has names that nobody wrote down."""

    published: ClassVar[None] = None


def test_a_family_without_a_publication_has_no_lora_for_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (Unpublished,))
    base, tuned = _folder(Wan, tmp_path / "base"), _folder(Wan, tmp_path / "tuned", seed=1)
    extracted = ("--base", base, "--rank", 2)
    assert _convert(tuned, tmp_path / "x.safetensors", *extracted, "--to", "comfyui") == FAILED
    assert "must be of a family whose published names are known, got 'wan'" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert _convert(tuned, tmp_path / "d.safetensors", *extracted, "--to", "diffusers-lora") == DONE
    extraction = Extraction.of(base, tuned, rank=2)
    extraction.write(tmp_path / "out", extraction.parts())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["peft"]


def test_a_lora_of_several_ranks_is_merged_and_one_of_several_scales_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _folder(Wan, tmp_path / "base")
    layers = {"blocks.0.self_attn.q": (1, 2.0), "blocks.1.self_attn.k": (2, -1.0)}

    def write(*, own_ranks: bool) -> None:
        tensors = {}
        for key, (own, alpha) in layers.items():
            rank, name = own if own_ranks else 2, f"diffusion_model.{key}"
            tensors |= {
                f"{name}.lora_A.weight": torch.ones(rank, 24),
                f"{name}.lora_B.weight": torch.ones(24, rank),
            }
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / "x.safetensors")

    write(own_ranks=True)
    assert _convert(tmp_path / "x.safetensors", tmp_path / "merged", "--base", base, "--verify") == DONE
    merged, before = _loaded(Wan, tmp_path / "merged"), _loaded(Wan, base)
    for name, expected in (
        ("blocks.0.attn1.to_q.weight", 2.0),
        ("blocks.1.attn1.to_k.weight", -1.0),
    ):  # alpha / rank * rank
        torch.testing.assert_close(
            merged[name] - before[name], torch.full((24, 24), expected), rtol=1e-5, atol=1e-5
        )
    assert _convert(tmp_path / "x.safetensors", tmp_path / "peft", "--to", "peft", "--base", base) == FAILED
    assert "must have one rank in all layers to be written, got 1, 2. Merge it" in capsys.readouterr().err
    write(own_ranks=False)
    assert (
        _convert(tmp_path / "x.safetensors", tmp_path / "peft", "--to", "peft", "--base", base, "--verify")
        == DONE
    )
    assert _convert(tmp_path / "peft", tmp_path / "again", "--base", base) == DONE
    assert torch.equal(
        _loaded(Wan, tmp_path / "again")["blocks.1.attn1.to_k.weight"], merged["blocks.1.attn1.to_k.weight"]
    )


def _strides(family_type: type[Family]) -> Any:
    from aiprod_ds.curriculum.strides import ModelStrides

    return ModelStrides(spatial=32, temporal=8)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_becomes_a_model_only_when_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _folder(LTXVideo, tmp_path / "source")
    state = tiny_transformer(LTXVideo).state_dict()
    checkpoint.save(
        {"model": state, "optimizer": {"a": torch.ones(1)}}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True
    )
    assert _convert(tmp_path / "dcp", tmp_path / "out") == FAILED
    assert "If it is your own, give --trust-checkpoint." in capsys.readouterr().err
    trusted = (tmp_path / "dcp", tmp_path / "out", "--trust-checkpoint")
    assert _convert(*trusted) == FAILED
    assert "must hold one model, got model, optimizer. Choose one with --prefix" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert _convert(*trusted, "--prefix", "model", "--config", source, "--verify") == DONE
    assert _same(_loaded(LTXVideo, tmp_path / "out"), state)
    assert (
        _convert(tmp_path / "dcp", tmp_path / "plain", "--trust-checkpoint", "--prefix", "model", "--verify")
        == DONE
    )
    assert _same(load_file(tmp_path / "plain" / "model.safetensors"), state)


REFUSED = {
    "the result exists": (["SOURCE", "SOURCE"], "source: must not exist yet, got a folder"),
    "no class": (
        ["FILE", "OUT", "--to", "diffusers"],
        "needs the model's class, got no config.json. Name one with --config",
    ),
    "a folder for a file": (
        ["SOURCE", "OUT", "--to", "single-file"],
        "must be a file that ends in .safetensors",
    ),
    "a file for a folder": (
        ["SOURCE", "OUT_FILE", "--to", "diffusers"],
        "must be a folder for --to diffusers",
    ),
    "no adapters": (
        ["SOURCE", "OUT", "--to", "peft"],
        "needs adapters, got plain weights. Give --base and --rank",
    ),
    "no average": (["SOURCE", "OUT", "--ema"], "--ema has no effect for a folder of weights"),
    "no base": (["SOURCE", "OUT", "--rank", "2"], "--rank extracts a LoRA: it needs --base"),
    "another model": (
        ["FILE", "OUT", "--config", "OTHER"],
        "must hold all of WanTransformer3DModel, got nothing for",
    ),
    "a pickle": (["BAD", "OUT"], "must be a safetensors file, got .pt, which is usually a pickle"),
    "nothing": (["NOWHERE", "OUT"], "must exist, got no such file or folder"),
    "a prefix of nothing": (
        ["FILE", "OUT", "--prefix", "x"],
        "--prefix must begin a name, got 'x.'; names begin with",
    ),
    "a class that is none": (
        ["SOURCE", "OUT", "--config", "EVIL"],
        "must be a model class of diffusers, got 'os:system'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_explained_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, other = _folder(LTXVideo, tmp_path / "source"), _folder(Wan, tmp_path / "other")
    (tmp_path / "bad.pt").write_bytes(b"")
    (tmp_path / "evil.json").write_text('{"_class_name": "os:system"}')
    places = {
        "SOURCE": source,
        "OUT": tmp_path / "out",
        "FILE": source / WEIGHTS,
        "OTHER": other,
        "BAD": tmp_path / "bad.pt",
    }
    places |= {
        "NOWHERE": tmp_path / "nowhere",
        "EVIL": tmp_path / "evil.json",
        "OUT_FILE": tmp_path / "out.safetensors",
    }
    arguments, message = REFUSED[name]
    before = sorted(tmp_path.rglob("*"))
    given = [str(places.get(part, part)) for part in arguments]
    assert _convert(*given) == FAILED
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_refused_what_it_has_not(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(lora_run, tmp_path / "out", "--ema") == FAILED
    assert "must hold an average of the weights for --ema, got none" in capsys.readouterr().err
    assert _convert(lora_run, tmp_path / "out", "--checkpoint", "../../x") == FAILED
    assert (
        "--checkpoint must be one of update_000002, update_000001, got '../../x'" in capsys.readouterr().err
    )


def test_verification_finds_a_disk_that_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    source, rename = _folder(LTXVideo, tmp_path / "source"), os.rename

    def spoil(first: Any, second: Any, **rest: Any) -> None:
        rename(first, second, **rest)
        path = Path(second) / WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    monkeypatch.setattr(os, "rename", spoil)
    assert _convert(source, tmp_path / "out", "--verify") == FAILED
    assert "must be what was computed, got other values in the file" in capsys.readouterr().err


def _inspected(
    capsys: pytest.CaptureFixture[str], path: Path, *options: str, code: int = DONE
) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", *options]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_inspect_says_what_everything_is(
    full_run: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _inspected(capsys, full_run)
    assert (run["kind"], [row["name"] for row in run["checkpoints"]]) == (
        "run folder",
        ["update_000002", "update_000001"],
    )
    saved = _inspected(capsys, full_run / "checkpoints" / "update_000002")
    assert (saved["kind"], saved["facts"]["updates"], saved["facts"]["zero_stage"]) == (
        "checkpoint of a run",
        2,
        0,
    )
    assert saved["facts"]["averaged"] == saved["facts"]["trained"] == len(saved["tensors"])
    export = _inspected(capsys, full_run / "export")
    assert (export["kind"], export["facts"]["class"]) == ("folder of weights", "LTXVideoTransformer3DModel")
    assert len(export["tensors"]) == len(saved["tensors"])
    assert {row["dtype"] for row in export["tensors"]} == {"float32"}
    assert _inspected(capsys, full_run / "export" / WEIGHTS)["kind"] == "safetensors file"
    lora = _inspected(capsys, lora_run / "export")
    assert (lora["kind"], lora["facts"]["rank"], lora["facts"]["alpha"]) == ("LoRA", 4, 6.0)
    assert (
        _inspected(capsys, lora_run / "export" / "comfyui.safetensors")["facts"]["metadata"]["alpha"] == "6.0"
    )
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(b"not opened")
    (tmp_path / "latest").write_text("global_step1")
    foreign = _inspected(capsys, tmp_path)
    assert (foreign["kind"], foreign["facts"]["bytes"]) == ("checkpoint of DeepSpeed", 10)
    assert "give --trust-checkpoint" in foreign["facts"]["tensors"]
    assert "must hold tensors" in _inspected(capsys, tmp_path, "--trust-checkpoint", code=FAILED)["problem"]


def _uses(found: dict[str, Any]) -> tuple[bool, str, bool, str]:
    convert, train = found["uses"]["convert"], found["uses"]["train"]
    return convert["is_read"], convert["how"], train["is_read"], train["how"]


def test_inspect_says_what_a_run_is_good_for(
    full_run: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going_on = "goes on from update_000002 with its configuration and"
    assert _uses(_inspected(capsys, full_run)) == (
        True,
        "update_000002 to diffusers",
        True,
        f"{going_on} --output-dir {full_run}",
    )
    saved = full_run / "checkpoints" / "update_000002"
    assert _uses(_inspected(capsys, saved)) == (True, "to diffusers", True, f"{going_on} --resume {saved}")
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    engine = run / "checkpoints" / "update_000002" / "engine"
    _damage(engine / "rank_00000_of_00001.moments.safetensors")
    older = f"goes on from update_000001 with its configuration and --output-dir {run}"
    assert _uses(_inspected(capsys, run, code=FAILED)) == (True, "update_000002 to diffusers", True, older)
    _damage(engine / "rank_00000_of_00001.safetensors")
    assert _uses(_inspected(capsys, run, code=FAILED)) == (True, "update_000001 to diffusers", True, older)
    reads, reason, goes_on, _ = _uses(_inspected(capsys, engine.parent, code=FAILED))
    assert (reads, goes_on) == (False, False)
    assert "content differs from the manifest's sha256" in reason
    shutil.rmtree(run / "checkpoints" / "update_000001")
    found = _uses(_inspected(capsys, run, code=FAILED))
    assert (found[0], found[2]) == (False, False)
    adapters = _uses(_inspected(capsys, lora_run))
    assert adapters[:3] == (True, "update_000002 to diffusers", True)  # its base's folder is there
    shutil.copytree(lora_run, tmp_path / "elsewhere")
    config = tmp_path / "elsewhere" / "config.yaml"
    config.write_text(config.read_text().replace(str(lora_run.parent / "base"), "/nowhere/at/all"))
    adapters = _uses(_inspected(capsys, tmp_path / "elsewhere"))
    assert adapters[:2] == (
        True,
        "update_000002 to peft, comfyui, diffusers-lora with --to, or merged with --base",
    )


def test_inspect_says_what_weights_are_good_for(
    full_run: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _uses(_inspected(capsys, full_run / "export")) == (
        True,
        "to diffusers",
        True,
        "as model.pretrained of LTXVideoTransformer3DModel",
    )
    only_convert = "it takes folders of diffusers as model.pretrained: `convert` makes one"
    assert _uses(_inspected(capsys, full_run / "export" / WEIGHTS)) == (
        True,
        "to safetensors (with --config also to diffusers)",
        False,
        only_convert,
    )
    lora = _uses(_inspected(capsys, lora_run / "export"))
    assert (lora[0], lora[2]) == (True, True)
    assert "with --to and --config" in lora[1]
    assert "model.lora_init or model.lora_checkpoint" in lora[3]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(full_run / "export" / WEIGHTS, bare)
    found = _uses(_inspected(capsys, bare))
    assert found[:3] == (True, "to safetensors (with --config also to diffusers)", False)
    assert "no config.json says its class" in found[3]
    (bare / WEIGHTS).rename(bare / "model.safetensors")
    shutil.copy(full_run / "export" / "config.json", bare)
    found = _uses(_inspected(capsys, bare))
    assert found[0] is True
    assert found[2] is False
    assert "files must be called diffusion_pytorch_model" in found[3]
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(b"not opened")
    foreign = _uses(_inspected(capsys, tmp_path / "global_step1"))
    assert foreign == (
        True,
        "only with --trust-checkpoint, because its files are pickles",
        False,
        only_convert,
    )
    assert main(["inspect", str(full_run / "export")]) == DONE
    shown = capsys.readouterr().out
    assert "convert: reads it: to diffusers" in shown
    assert "train: reads it: as model.pretrained of LTXVideoTransformer3DModel" in shown


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_conversion_compares_the_hashes_of_what_it_reads(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(full_run, run)
    engine = run / "checkpoints" / "update_000002" / "engine"
    assert _convert(run, out, "--checkpoint", "update_000002") == DONE
    whole = load_file(out / WEIGHTS)
    shutil.rmtree(out)
    _damage(engine / "rank_00000_of_00001.moments.safetensors")
    assert _convert(run, out, "--checkpoint", "update_000002") == DONE
    assert _same(load_file(out / WEIGHTS), whole)
    shutil.rmtree(out)
    assert "moments.safetensors: content differs" in _inspected(capsys, engine.parent, code=FAILED)["problem"]
    _damage(engine / "rank_00000_of_00001.safetensors")
    assert _convert(run, out, "--checkpoint", "update_000002") == FAILED
    assert (
        "rank_00000_of_00001.safetensors: content differs from the manifest's sha256"
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert _convert(run, out) == OLDER
    told = capsys.readouterr().out
    assert "update 1 (update_000001)" in told
    assert "older than the newest: update_000002 cannot be read; `inspect` says why" in told


def test_nothing_stands_before_the_hashes_are_compared(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared while tensors are written: hashing waits here until the unfinished result is
    there."""
    seen: list[tuple[str, bool]] = []
    out = tmp_path / "out"

    def late_sha256(path: Path) -> str:
        if path.suffix == ".safetensors":
            deadline = time.monotonic() + 60
            while not (tmp_path / "out.pending" / WEIGHTS).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            seen.append((path.name, out.exists()))
        return file_sha256(path)

    monkeypatch.setattr(manifest, "file_sha256", late_sha256)
    began = time.monotonic()
    assert _convert(full_run, out) == DONE
    assert time.monotonic() - began < 60
    assert seen == [("rank_00000_of_00001.safetensors", False)]


def test_inspect_shows_a_table_and_finds_damage(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(full_run / "export")]) == DONE
    shown = capsys.readouterr().out
    assert "tensors: " in shown
    assert "more (--all)" in shown
    assert main(["inspect", str(full_run / "export"), "--all"]) == DONE
    assert "more (--all)" not in capsys.readouterr().out
    path = tmp_path / WEIGHTS
    path.write_bytes((full_run / "export" / WEIGHTS).read_bytes()[:-1])
    assert "bytes of data where the header tells of" in _inspected(capsys, tmp_path, code=FAILED)["problem"]
