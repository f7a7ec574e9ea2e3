"""Text encoders: random ones of every kind, a saved one, lengths, padding, fingerprints. The oracle is
transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from aiprod_ds.config.encode import TextEncoderConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.models.text import TextEncoder, build_text_encoder

_T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_ATTENTION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {"vocab_size": 259, **_ATTENTION, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_GEMMA = {"vocab_size": 259, **_ATTENTION, "num_key_value_heads": 1, "head_dim": 8}
_KINDS = {"T5EncoderModel": _T5, "UMT5EncoderModel": _T5, "CLIPTextModel": _CLIP, "Gemma3TextModel": _GEMMA}
_CONNECTORS = {
    "caption_channels": 16,
    "text_proj_in_factor": 3,  # the embedding and two layers
    "video_connector_num_attention_heads": 2,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 1,
    "video_connector_num_learnable_registers": 8,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": 8,
}


def _encoder(source: str = "T5EncoderModel", seed: int = 0, **changes: Any) -> TextEncoder:
    values = {"source": source, "config": _KINDS[source], "precision": "fp32", "max_tokens": 16, **changes}
    return build_text_encoder(TextEncoderConfig.model_validate(values), seed=seed)


@pytest.mark.parametrize("source", _KINDS)
def test_every_kind_of_encoder_gives_embeddings_and_a_mask(source: str) -> None:
    found = _encoder(source).encode(["hello", "ab"])
    assert found.prompt_embeds.shape == (2, 16, 16)
    assert found.prompt_embeds.dtype == torch.float32
    assert found.prompt_attention_mask.dtype == torch.bool
    assert found.prompt_attention_mask.sum(dim=1).tolist() == [6, 3]  # bytes and the end token
    assert found.prompt_embeds[~found.prompt_attention_mask].abs().max() == 0
    assert found.prompt_embeds[found.prompt_attention_mask].abs().min() > 0
    assert found.audio_prompt_embeds is None


def test_the_embeddings_are_those_of_the_model_itself(tmp_path: Path) -> None:
    model = T5EncoderModel(T5Config(**_T5)).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    config = TextEncoderConfig(
        pretrained=str(tmp_path),
        subfolder="text_encoder",
        tokenizer=str(tmp_path),
        tokenizer_subfolder="tokenizer",
        precision="fp32",
        max_tokens=8,
    )
    found = build_text_encoder(config, seed=0).encode(["abc"])
    with torch.inference_mode():
        expected = model(
            input_ids=torch.tensor([[100, 101, 102, 1]])
        ).last_hidden_state  # byte + 3, then the end
    # Padding only adds masked scores, so the sums run over the same numbers in fp32.
    torch.testing.assert_close(found.prompt_embeds[:, :4], expected, rtol=1e-5, atol=1e-6)


def test_both_towers_of_clip_are_read_as_the_text_tower(tmp_path: Path) -> None:
    CLIPTextModel(CLIPTextConfig(**_CLIP)).save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    config = TextEncoderConfig(pretrained=str(tmp_path), precision="fp32", max_tokens=8)
    assert build_text_encoder(config, seed=0).encode(["ab"]).prompt_embeds.shape == (1, 8, 16)


def test_padding_counts_only_where_it_is_not_masked() -> None:
    short, long = (_encoder(max_tokens=size).encode(["abc"]).prompt_embeds[0, :4] for size in (8, 16))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)
    unmasked = _encoder(mask_padding=False).encode(["abc"]).prompt_embeds[0, :4]
    assert (unmasked - long).abs().max() > 1e-3, "otherwise the encoder does not see the padding"


def test_connectors_make_embeddings_for_both_modalities() -> None:
    source = "diffusers.pipelines.ltx2.connectors:LTX2TextConnectors"
    encoder = _encoder("Gemma3TextModel", connectors=ModelConfig(source=source, config=_CONNECTORS))
    found = encoder.encode(["hello", "ab"])
    assert found.audio_prompt_embeds is not None
    assert found.prompt_embeds.shape == found.audio_prompt_embeds.shape == (2, 16, 16)
    assert not torch.equal(found.prompt_embeds, found.audio_prompt_embeds)
    assert set(found.tensors(1)) == {"prompt_embeds", "prompt_attention_mask", "audio_prompt_embeds"}


def test_a_long_caption_is_an_error_or_cut_as_configured() -> None:
    caption = "x" * 16
    message = (
        r"caption: must have at most 16 tokens \(text\.max_tokens\), got 17: 'xxxxxxxxxxxxxxxx'\. Shorten it"
    )
    with pytest.raises(DataError, match=message):
        _encoder().encode(["short", caption])
    assert _encoder().encode(["x" * 15]).prompt_attention_mask.all()
    assert _encoder(long_captions="truncate").encode([caption]).prompt_attention_mask.all()


def test_an_empty_caption_keeps_its_end_token() -> None:
    assert _encoder().encode([""]).prompt_attention_mask.sum() == 1


def test_the_fingerprint_follows_whatever_decides_the_embeddings() -> None:
    same = [_encoder().fingerprint(), _encoder().fingerprint()]
    assert same[0] == same[1]
    others = [
        _encoder(seed=1),
        _encoder(max_tokens=8),
        _encoder(mask_padding=False),
        _encoder(precision="bf16"),
        _encoder("UMT5EncoderModel"),
    ]
    assert len({same[0], *(encoder.fingerprint() for encoder in others)}) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": "T5EncodrModel"},
            r"text\.source: must name a text model of transformers, got 'T5EncodrModel', which is none",
        ),
        *(
            ({"source": name}, r"text\.source: must name a text model of transformers, got")
            for name in (
                "pipeline",
                "AutoConfig",
                "AutoModel",
                "TrainingArguments",
                "T5Config",
                "os",
                "a:b",
                "",
            )
        ),
        ({"config": {"d_model": 10**12}}, "text: must name a text encoder"),
        ({"config": {"num_heads": 0}}, "text: must name a text encoder"),
        ({"config": {"d_model": "wide"}}, "text: must name a text encoder"),
        (
            {"source": "CLIPTextModel", "config": _CLIP, "max_tokens": 78},
            r"text\.max_tokens: must be at most .*\(77\), got 78",
        ),
        ({"source": None, "config": {}, "pretrained": "/nowhere"}, r"text: must name .* got '/nowhere'"),
    ],
)
def test_what_cannot_be_built_is_a_configuration_error(values: dict[str, Any], message: str) -> None:
    full = {"source": "T5EncoderModel", "config": _T5, "precision": "fp32", **values}
    with pytest.raises(ConfigError, match=message):
        build_text_encoder(TextEncoderConfig.model_validate(full), seed=0)
