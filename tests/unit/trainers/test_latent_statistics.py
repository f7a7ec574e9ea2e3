"""Statistics of latents: worked numbers, merging, and where an export puts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.evaluation import HeldOutClip
from aiprod_ds.trainers.vae_export import LatentStatistics, export_vae

LATENTS_BCT = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 6.0], [5.0, 5.0]]])
MEAN, STD = [3.0, 2.5], [1.8708286933869707, 2.5]  # by hand: sqrt(50/4 - 9); half of 5


def test_the_worked_number() -> None:
    statistics = LatentStatistics()
    statistics.update(LATENTS_BCT)
    found = statistics.compute()
    assert found["latents_mean"] == pytest.approx(MEAN)
    assert found["latents_std"] == pytest.approx(STD)


def test_parts_add_up_to_the_whole() -> None:
    latents = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    together = LatentStatistics()
    for part in latents.split(2):
        own = LatentStatistics()
        own.update(part)
        together.merge(own)
    together.merge(LatentStatistics())
    assert together.num_clips == 5
    # Oracle: torch in fp64.
    wide = latents.double()
    assert together.compute()["latents_mean"] == pytest.approx(wide.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
    assert together.compute()["latents_std"] == pytest.approx(
        wide.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-12
    )


def test_nothing_seen_is_no_statistics() -> None:
    assert LatentStatistics().compute() == {"latents_mean": [], "latents_std": []}


class _WithStatistics(nn.Module):
    """Holds them in the configuration, as diffusers' AutoencoderKLWan, and in buffers, as
    AutoencoderKLLTXVideo."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))

    def save_config(self, folder: Path) -> None:
        (folder / "config.json").write_text(
            json.dumps({"latents_mean": [0.0], "latents_std": None, "other": 1})
        )


class _Module(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae


def _export(vae: nn.Module, folder: Path) -> dict[str, Tensor]:
    module = _Module(vae)
    settings = parse_deepspeed_settings({}, where="test")
    optimizer = OptimizerConfig()
    batch = {"micro_batch_size": 1, "accumulation": 1}
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=optimizer,
        settings=settings,
        device=torch.device("cpu"),
        **batch,
    )
    clips = [
        HeldOutClip(place=place, original=torch.zeros(1), output=torch.zeros(1), mean=mean[None])
        for place, mean in enumerate(LATENTS_BCT)
    ]
    export_vae(engine, vae, clips, folder)
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_an_export_fills_configuration_and_buffers(tmp_path: Path) -> None:
    tensors = _export(_WithStatistics(channels=2), tmp_path / "export")
    assert tensors["latents_mean"].tolist() == pytest.approx(MEAN)
    assert tensors["latents_std"].tolist() == pytest.approx(STD)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["latents_mean"], config["other"]) == (pytest.approx(MEAN), 1)
    assert config["latents_std"] == pytest.approx(STD)
    statistics = json.loads((tmp_path / "export" / "latent_statistics.json").read_text())
    assert statistics == {"clips": 2, "latents_mean": pytest.approx(MEAN), "latents_std": pytest.approx(STD)}


def test_buffers_of_another_size_stay(tmp_path: Path) -> None:
    tensors = _export(_WithStatistics(channels=7), tmp_path / "export")
    assert tensors["latents_mean"].tolist() == [0.0] * 7


def test_vectors_of_any_shape_are_not_decayed() -> None:
    module = nn.Module()
    shapes = {
        "kernel": (4, 2, 3),
        "matrix": (4, 2),
        "bias": (4,),
        "gain": (4, 1, 1),
        "slope": (1, 4, 1),
        "scalar": (),
    }
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    module.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    decayed, plain = decay_groups(module)
    assert (decayed.names, decayed.is_decayed) == (("kernel", "matrix"), True)
    assert (plain.names, plain.is_decayed) == (("bias", "gain", "slope", "scalar"), False)
