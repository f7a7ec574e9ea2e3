"""tools/merge_lora.py and tools/extract_lora.py, on tiny folders of every family.

Once each as a process of its own; else the script runs in this process, because to start one takes most of
five seconds.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.lora import adapter_tensors, merge_lora, save_comfyui, save_peft
from aiprod_ds.models.lora_files import merge_into, read_lora
from aiprod_ds.testing.families import adapted_transformer, tiny_transformer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STRIDES = ModelStrides(spatial=32, temporal=8)
CONFIG = LoraConfig(rank=4, alpha=6.0, targets=("*",))
WEIGHTS = "diffusion_pytorch_model"
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)


Finished = subprocess.CompletedProcess[str]
Tool = Callable[..., Finished]


@pytest.fixture
def tool(repository_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs a script of tools/ with arguments, in this process."""

    def run(name: str, *arguments: object) -> Finished:
        script = str(repository_root / "tools" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(script, run_name="__main__")
        output = capsys.readouterr()
        return Finished(sys.argv, int(left.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def process(repository_root: Path) -> Tool:
    """Runs a script of tools/ with arguments, as a user does."""

    def run(name: str, *arguments: object) -> Finished:
        command = [sys.executable, str(repository_root / "tools" / f"{name}.py"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=environment
        )

    return run


def _save(transformer: Any, folder: Path, *, shard_bytes: int = 10**9) -> Path:
    folder.mkdir(parents=True)
    transformer.save_config(folder)
    save_torch_state_dict(
        transformer.state_dict(),
        folder,
        filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    return folder


def _lora(family_type: type[Family], folder: Path) -> Any:
    """Writes both forms of a LoRA into `folder` and returns the merged model."""
    wrapped = adapted_transformer(family_type, CONFIG)
    adapters = adapter_tensors(wrapped.state_dict())
    save_peft(adapters, CONFIG, folder / "peft")
    original_name = find_family(wrapped, STRIDES).original_name
    save_comfyui(adapters, CONFIG, folder / "comfyui.safetensors", original_name=original_name)
    merge_lora(wrapped)
    return wrapped


def _load(family_type: type[Family], folder: Path) -> Any:
    loaded, found = getattr(diffusers, family_type.transformer_class).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(found.values())
    return loaded


@each_family
def test_a_lora_is_merged_between_folders(family_type: type[Family], tool: Tool, tmp_path: Path) -> None:
    merged = _lora(family_type, tmp_path)
    base = _save(tiny_transformer(family_type), tmp_path / "base", shard_bytes=30_000)
    finished = tool("merge_lora", base, tmp_path / "peft", tmp_path / "out", "--verify")
    assert finished.returncode == 0, finished.stderr
    files = {path.name for path in base.iterdir()}
    assert len(files) > 4  # several files of weights, their index and the configuration
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    state = _load(family_type, tmp_path / "out").state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in merged.state_dict().items()
    )  # one arithmetic: to the bit
    assert f"verified {len(state)} tensors" in finished.stdout
    assert "rank 4, scale 1.5" in finished.stdout


def test_the_type_of_the_weights_may_change(process: Tool, tmp_path: Path) -> None:
    merged = _lora(LTXVideo, tmp_path).state_dict()
    base = _save(tiny_transformer(LTXVideo), tmp_path / "base")
    arguments = (base, tmp_path / "peft", tmp_path / "out", "--dtype", "bf16", "--verify")
    finished = process("merge_lora", *arguments)
    assert finished.returncode == 0, finished.stderr
    written = load_file(tmp_path / "out" / f"{WEIGHTS}.safetensors")
    assert written.keys() == merged.keys()
    assert all(torch.equal(value, merged[name].bfloat16()) for name, value in written.items())


@each_family
def test_a_merged_lora_is_extracted_again(family_type: type[Family], tool: Tool, tmp_path: Path) -> None:
    merged = _lora(family_type, tmp_path)
    base = _save(tiny_transformer(family_type), tmp_path / "base")
    tuned = _save(merged, tmp_path / "tuned", shard_bytes=30_000)
    finished = tool("extract_lora", base, tuned, tmp_path / "out", "--rank", 4)
    assert finished.returncode == 0, finished.stderr
    assert "without adapter" not in finished.stdout
    assert (
        float(finished.stdout.split()[-1]) < 1e-5
    )  # the difference has rank 4; weights of order 1 round at 6e-8
    for path in (tmp_path / "out" / "peft", tmp_path / "out" / "comfyui.safetensors"):
        again = tiny_transformer(family_type)
        merge_into(again, read_lora(path, again, find_family(again, STRIDES)))
        for name, value in merged.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=2e-6)


def test_what_an_extraction_loses_is_told(process: Tool, tmp_path: Path) -> None:
    transformer = tiny_transformer(LTXVideo)
    base = _save(transformer, tmp_path / "base")
    layer = "transformer_blocks.1.attn1.to_q"
    with torch.no_grad():
        transformer.get_parameter(f"{layer}.weight")[range(3), range(3)] += torch.tensor([3.0, 2.0, 1.0])
        transformer.get_parameter(f"{layer}.bias")[0] += 6.0
    tuned = _save(transformer, tmp_path / "tuned")
    finished = process("extract_lora", base, tuned, tmp_path / "out", "--rank", 1, "--targets", "to_q")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [
        f"{layer}: relative error 0.598",  # sqrt(5 / 14), the worked number of `extract`
        f"without adapter, though different: 1 tensors, most of all {layer}.bias",
        f"{tmp_path}/out: 1 layers, rank 1, relative error 0.598",
        "of the whole model: relative error 0.906",  # sqrt((5 + 36) / (14 + 36))
    ]


def _refused(finished: Finished, code: int, message: str) -> None:
    assert finished.returncode == code
    last = finished.stderr.splitlines()[-1]  # progress may stand before it
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in finished.stderr


def test_what_does_not_fit_is_refused(tool: Tool, tmp_path: Path) -> None:
    _lora(LTXVideo, tmp_path)
    base, out = _save(tiny_transformer(LTXVideo), tmp_path / "base"), tmp_path / "out"
    peft = tmp_path / "peft"
    _refused(tool("merge_lora", base, peft, base), 1, f"{base}: must not exist yet, got a folder")
    _refused(tool("merge_lora", base, peft, out, "--alpha", 2), 1, "alpha must not be given")
    _refused(tool("merge_lora", peft, peft, out), 1, "config.json: must be the JSON of a model of diffusers")
    _refused(tool("extract_lora", base, base, out, "--rank", 4), 1, "must differ from")
    _refused(tool("extract_lora", base, base, out, "--rank", 99), 1, "sides of at least the rank (99)")
    unknown = ("--rank", 4, "--targets", "query")
    _refused(tool("extract_lora", base, base, out, *unknown), 2, "lora.targets[0]: must match a Linear layer")
    config = json.loads((base / "config.json").read_text())
    for changed, code, message in (
        ({"_class_name": "os:system"}, 1, "_class_name must be a model class of diffusers"),
        ({"num_layers": 3}, 1, "base: must hold the weights of its config.json, got transformer_blocks.2."),
        ({"out_channels": 8}, 1, "got proj_out.bias (4,) instead of (8,)"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **changed}))
        _refused(tool("merge_lora", base, peft, out), code, message)
    assert not out.exists()
