"""Names of published single files: exact inverses of diffusers' own conversion, which is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from aiprod_ds.convert.single_file import names_for_single_file, names_in_single_file
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.tensor_file import TensorSpec
from aiprod_ds.testing.families import tiny_transformer

each_published = pytest.mark.parametrize(
    "family_type", [family for family in FAMILIES if family.published], ids=lambda family: family.name
)
# One name of every publication, from its code, so that both directions cannot be wrong together.
PUBLISHED = {
    "ltx": {
        "model.diffusion_model.patchify_proj.weight": "proj_in.weight",
        "model.diffusion_model.adaln_single.linear.weight": "time_embed.linear.weight",
        "model.diffusion_model.transformer_blocks.0.attn1.q_norm.weight": "transformer_blocks.0.attn1.norm_q.weight",  # noqa: E501
    },
    "ltx2": {
        "model.diffusion_model.audio_patchify_proj.weight": "audio_proj_in.weight",
        "model.diffusion_model.audio_adaln_single.linear.weight": "audio_time_embed.linear.weight",
        "model.diffusion_model.av_ca_a2v_gate_adaln_single.linear.bias": "av_cross_attn_video_a2v_gate.linear.bias",  # noqa: E501
        "model.diffusion_model.transformer_blocks.1.scale_shift_table_a2v_ca_audio": "transformer_blocks.1."
        "audio_a2v_cross_attn_scale_shift_table",
    },
    "wan": {
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "blocks.0.self_attn.q.weight": "blocks.0.attn1.to_q.weight",
        "blocks.0.cross_attn.o.bias": "blocks.0.attn2.to_out.0.bias",
        "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
        "blocks.0.norm3.weight": "blocks.0.norm2.weight",
        "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
        "time_projection.1.bias": "condition_embedder.time_proj.bias",
    },
}


def _specs(module: Any) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(value) for name, value in module.state_dict().items()}


@each_published
def test_what_is_written_is_what_diffusers_converts_back_to_the_bit(family_type: type[Family]) -> None:
    state = tiny_transformer(family_type).state_dict()
    specs = {name: TensorSpec.of(value) for name, value in state.items()}
    written = names_for_single_file(specs, family_type.transformer_class)
    assert PUBLISHED[family_type.name].items() <= written.items()
    convert = SINGLE_FILE_LOADABLE_CLASSES[family_type.transformer_class]["checkpoint_mapping_fn"]
    back = convert(checkpoint={there: state[name].clone() for there, name in written.items()}, config={})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@each_published
def test_names_are_found_in_both_forms_and_beside_others(family_type: type[Family]) -> None:
    specs = _specs(tiny_transformer(family_type))
    written = names_for_single_file(specs, family_type.transformer_class)
    file = {there: specs[name] for there, name in written.items()}
    expected = {name: there for there, name in written.items()}
    name = family_type.transformer_class
    assert names_in_single_file(file, name, list(specs)) == expected
    assert names_in_single_file(specs, name, list(specs)) == {own: own for own in specs}
    if family_type.published.prefix:  # otherwise the publication has the transformer alone
        beside = {**file, "vae.decoder.conv_in.weight": TensorSpec(dtype=torch.float32, shape=(1,))}
        assert names_in_single_file(beside, name, list(specs)) == expected


def test_wans_image_to_video_names_lead_back() -> None:
    import diffusers

    config = {
        **Wan.tiny_config(),
        "image_dim": 8,
        "added_kv_proj_dim": 24,
        "pos_embed_seq_len": None,
    }
    with torch.device("meta"):
        specs = _specs(diffusers.WanTransformer3DModel(**config))
    written = names_for_single_file(specs, "WanTransformer3DModel")
    assert written["blocks.0.cross_attn.k_img.weight"] == "blocks.0.attn2.add_k_proj.weight"
    assert written["img_emb.proj.4.weight"] == "condition_embedder.image_embedder.norm2.weight"


def test_a_vae_is_read_by_diffusers_names_and_not_written() -> None:
    import diffusers

    with torch.device("meta"):
        specs = _specs(diffusers.AutoencoderKLLTXVideo())
    name = next(name for name in specs if name.startswith("decoder.up_blocks.1.resnets"))
    assert names_in_single_file(specs, "AutoencoderKLLTXVideo", list(specs))[name] == name
    with pytest.raises(
        CheckpointError, match=r"must be one of LTXVideoTransformer3DModel, .*got AutoencoderKLLTXVideo"
    ):
        names_for_single_file(specs, "AutoencoderKLLTXVideo")


def test_a_file_of_another_model_is_refused() -> None:
    specs = _specs(tiny_transformer(FAMILIES[0]))
    other = {"head.modulation": TensorSpec(dtype=torch.float32, shape=(1,))}
    with pytest.raises(CheckpointError, match="must hold all of LTXVideoTransformer3DModel, got nothing for"):
        names_in_single_file(other, "LTXVideoTransformer3DModel", list(specs))
    with pytest.raises(
        CheckpointError, match="must have the names of the publication of AutoencoderKLLTXVideo, got KeyError"
    ):
        names_in_single_file(other, "AutoencoderKLLTXVideo", ["x"])
    with pytest.raises(CheckpointError, match="diffusers must know the publication of AutoencoderOobleck"):
        names_in_single_file(other, "AutoencoderOobleck", ["x"])
