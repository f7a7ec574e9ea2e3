"""A model by diffusers name or import path: names that do not resolve, arguments that do not fit, weights
from the seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.registry import build_model, resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"
LINEAR = ModelConfig(source="torch.nn:Linear", config={"in_features": 3, "out_features": 2})


def _weights(seed: int) -> torch.Tensor:
    return torch.cat([value.flatten() for value in build_model(LINEAR, seed=seed).state_dict().values()])


def test_an_import_path_is_built_in_training_mode() -> None:
    module = build_model(LINEAR, seed=0)
    assert isinstance(module, nn.Linear)
    assert module.training
    assert module.weight.shape == (2, 3)
    assert module.weight.dtype == torch.float32


def test_a_diffusers_name_is_found() -> None:
    assert resolve("AutoencoderKLLTXVideo").__name__ == "AutoencoderKLLTXVideo"


def test_weights_depend_on_the_seed_alone() -> None:
    first = _weights(seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, _weights(seed=3))
    assert not torch.equal(first, _weights(seed=4))


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_model(LINEAR, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_planning_takes_no_memory() -> None:
    assert all(parameter.is_meta for parameter in build_model(LINEAR, seed=0, device="meta").parameters())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "AutoencoderKLLTXVide",
            (
                r"must name a diffusers class .* got 'AutoencoderKLLTXVide'\. Did you mean "
                r"'AutoencoderKLLTXVideo'\?"
            ),
        ),
        ("torch.nn:Linnear", r"must be importable, got 'torch.nn:Linnear' \(.*Linnear"),
        (
            "no_such_package.models:VAE",
            r"must be importable, got .*No module named 'no_such_package'.*PYTHONPATH",
        ),
        (":VAE", r"must be importable, got ':VAE'"),
    ],
)
def test_a_source_that_does_not_resolve_is_explained(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.source: {message}"):
        resolve(source)


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("torch.nn:Linear", {"in_feature": 3}),
        ("torch.nn:Conv3d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}),
    ],
)
def test_arguments_that_the_constructor_refuses_are_named(source: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model\.config: {source} must accept it, got .*{next(iter(arguments))}"
    ):
        build_model(ModelConfig(source=source, config=arguments), seed=0)


def made() -> nn.Module:
    """Says that it makes a module."""
    return nn.Identity()


def made_otherwise() -> nn.Module:
    """Says so, too, and does not."""
    return "text"  # type: ignore[return-value]


def unmarked():  # type: ignore[no-untyped-def]
    raise AssertionError("called before it was judged")


def misspelt() -> nn.Modul:  # type: ignore[name-defined]
    raise AssertionError("called before it was judged")


class Strange(nn.Module):
    """Fails in a way that no constructor should."""

    def __init__(self, value: int) -> None:
        super().__init__()
        raise KeyError(value)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name by which this very module is imported."""
    monkeypatch.setitem(sys.modules, "registry_cases", sys.modules[__name__])
    return "registry_cases"


def test_a_function_whose_annotation_is_a_module_makes_one(here: str) -> None:
    assert isinstance(build_model(ModelConfig(source=f"{here}:made"), seed=0), nn.Identity)
    with pytest.raises(ConfigError, match="must make a torch module, got str from"):
        build_model(ModelConfig(source=f"{here}:made_otherwise"), seed=0)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("collections:Counter", "the class"),
        ("subprocess:getoutput", "a function"),
        ("os:abort", "a builtin_function_or_method"),
        ("sys:exit", "a (builtin_function_or_method|method)"),  # wandb puts a method in its place
        ("os:path", "a module"),
        ("HERE:unmarked", "a function"),
        ("HERE:misspelt", "a function"),
        # of an installed package a class alone counts: its functions were not made to be named by a file
        ("aiprod_ds.models.registry:build_model", "a function"),
        ("diffusers.utils.import_utils:importlib", "a module"),
    ],
)
def test_what_does_not_say_that_it_makes_a_module_is_never_called(here: str, source: str, kind: str) -> None:
    config = ModelConfig(source=source.replace("HERE", here), config={"cmd": "touch bad"})
    with pytest.raises(ConfigError, match=rf"^model\.source: must make a torch module: be .* got {kind} '"):
        build_model(config, seed=0)


@pytest.mark.parametrize("source", ["DDPMScheduler", "StableDiffusionPipeline", "__version__", "utils"])
def test_what_diffusers_has_beside_models_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.source: must name a model of diffusers, got '"):
        build_model(ModelConfig(source=source), seed=0)


@pytest.mark.parametrize("source", ["a b:C", "json.:dumps", "json:dumps.x", "x\0y:Z", "json:"])
def test_what_is_no_import_path_is_refused_before_any_import(source: str) -> None:
    with pytest.raises(ConfigError, match=r"must be importable, got .*Write package\.module:Name"):
        resolve(source)


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "raise KeyError('x')", "def (", "1/0"])
def test_a_module_that_cannot_be_imported_in_any_way_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "broken_module_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"must be importable, got 'broken_module_of_mine:X' \("):
        resolve("broken_module_of_mine:X")


def test_a_constructor_may_fail_in_any_way(here: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.config: .*:Strange must accept it, got {'value': 3} \(3"):
        build_model(ModelConfig(source=f"{here}:Strange", config={"value": 3}), seed=0)


def test_trained_weights_are_read_back(tiny_vae_folder: Path) -> None:
    module = build_model(ModelConfig(source="AutoencoderKLLTXVideo", pretrained=str(tiny_vae_folder)), seed=0)
    saved = load_file(tiny_vae_folder / WEIGHTS)
    assert module.training
    assert all(
        torch.equal(value, saved[name]) for name, value in module.state_dict().items() if name in saved
    )
    assert set(saved) <= set(module.state_dict())


@pytest.mark.parametrize("kind", ["missing keys", "unexpected keys"])
def test_a_folder_with_other_weights_is_refused_by_name(tiny_vae_folder: Path, kind: str) -> None:
    tensors = load_file(tiny_vae_folder / WEIGHTS)
    if kind == "missing keys":
        name = "decoder.conv_in.conv.weight"
        del tensors[name]
    else:
        name = "surplus.weight"
        tensors[name] = torch.zeros(1)
    save_file(tensors, tiny_vae_folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=rf"^model\.pretrained: must hold exactly the weights of .* {kind}: {name}\. Name the",
    ):
        build_model(ModelConfig(source="AutoencoderKLLTXVideo", pretrained=str(tiny_vae_folder)), seed=0)


@pytest.fixture
def tiny_vae_folder(tmp_path: Path) -> Path:
    config = yaml.safe_load((Path(__file__).parents[3] / "configs" / "video_vae" / "tiny.yaml").read_text())[
        "model"
    ]["config"]
    model: Any = build_model(ModelConfig(source="AutoencoderKLLTXVideo", config=config), seed=1)
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"
