"""What `inspect` says that `convert` and `train` would do with files of others, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aiprod_ds.convert.inspect import inspect_path

Q, K = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.self_attn.k"


def _pair(layer: str, rank: int = 4) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": torch.ones(rank, 8),
        f"{layer}.lora_B.weight": torch.ones(8, rank),
    }


@pytest.mark.parametrize(
    ("tensors", "metadata", "convert", "train"),
    [
        (
            _pair(Q),
            {"alpha": "4"},
            "to peft, comfyui, diffusers-lora with --to and --config, or merged with --base",
            "as model.lora_init or model.lora_checkpoint of a diffusion run whose layers they fit",
        ),
        (
            {**_pair(Q), **_pair("text_embedding_projection.aggregate_embed")},
            {},
            "or merged with --base; it does not say alpha: --alpha rank is what others take; left out: text",
            "whose layers they fit; it does not say alpha: alpha: rank is what others take; left out: text",
        ),
        (
            {**_pair(Q), **_pair(K, 2), f"{K}.diff_b": torch.ones(8)},
            {"alpha": "4"},
            "merged with --base alone, because its ranks differ (2, 4) and it has differences of whole",
            "as model.lora_checkpoint alone of a diffusion run whose layers they fit, because its ranks",
        ),
        (
            {**_pair(Q), f"{Q}.lora_magnitude_vector": torch.ones(8), "x.strange": torch.ones(1)},
            {"alpha": "4"},
            "merged with --base alone, because it is DoRA; only with --allow-unknown: x.strange",
            "keys that are no LoRA: x.strange. `convert --allow-unknown` leaves them out",
        ),
        (
            {f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(2, 2)},
            {},
            f"must be a LoRA, got LoKr ({Q}.lokr_w1)",
            "must be a LoRA, got LoKr",
        ),
    ],
    ids=["plain", "connectors", "ranks", "dora", "lokr"],
)
def test_a_lora_is_told_what_becomes_of_it(
    tensors: dict[str, Tensor], metadata: dict[str, str], convert: str, train: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    found = inspect_path(tmp_path / "x.safetensors")
    assert found.kind == "LoRA"
    assert convert in found.uses["convert"].how
    assert train in found.uses["train"].how
    is_refused = any("lokr" in name for name in tensors)
    assert found.uses["convert"].is_read is not is_refused
    assert found.uses["train"].is_read is not (is_refused or "x.strange" in tensors)


def test_scaled_weights_are_told_and_refused_ones_named(tmp_path: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.scale_weight": torch.ones(1)}, tmp_path / "x.safetensors")
    how = inspect_path(tmp_path / "x.safetensors").uses["convert"].how
    assert (
        how
        == "to safetensors (with --config also to diffusers); dequantised to fp32: 1 weights of scaled fp8"
    )
    save_file({"a.weight": weight, "a.weight_scale_2": torch.ones(1)}, tmp_path / "y.safetensors")
    use = inspect_path(tmp_path / "y.safetensors").uses["convert"]
    assert not use.is_read
    assert "got a part of nvfp4" in use.how
