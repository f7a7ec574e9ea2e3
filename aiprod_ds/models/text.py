"""Captions to embeddings by any text encoder of transformers: T5, UMT5, Gemma, CLIP and others.

Owns tokens, padding and which hidden states count. Knows nothing of files; called by encoding and by samplers
of prompts. Shape suffixes: B captions, S tokens, D width, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds import progress
from aiprod_ds.config.encode import TextEncoderConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.models.fingerprint import module_fingerprint
from aiprod_ds.models.registry import build_model
from aiprod_ds.rng import stream_seed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptEmbeds:
    """What a transformer gets of some captions.

    Attributes:
        prompt_embeds: [B,S,D] fp32; zeros where the mask is False.
        prompt_attention_mask: [B,S] bool, True at tokens of the caption.
        audio_prompt_embeds: [B,S,D'] fp32 where connectors make them, else None.
    """

    prompt_embeds: Tensor
    prompt_attention_mask: Tensor
    audio_prompt_embeds: Tensor | None = None

    def tensors(self, caption: int) -> dict[str, Tensor]:
        """Returns the tensors of one caption by name, without the axis B."""
        named = {"prompt_embeds": self.prompt_embeds, "prompt_attention_mask": self.prompt_attention_mask}
        if self.audio_prompt_embeds is not None:
            named["audio_prompt_embeds"] = self.audio_prompt_embeds
        return {name: tensor[caption] for name, tensor in named.items()}


class TextEncoder:
    """A tokenizer and a frozen model.

    Args:
        tokenizer: As transformers makes it; its padding is set here.
        model: Takes `input_ids`, `attention_mask` and `output_hidden_states`.
        connectors: diffusers' LTX2TextConnectors, or None.
    """

    def __init__(
        self, tokenizer: Any, model: nn.Module, connectors: nn.Module | None, config: TextEncoderConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)
        self._connectors = None if connectors is None else connectors.eval().requires_grad_(False)
        self._config = config
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if connectors is not None:
            tokenizer.padding_side = "left"  # as the LTX-2 pipeline of diffusers 0.42.1 does
        positions = getattr(model.config, "max_position_embeddings", None)  # CLIP has a table of 77
        if positions is not None and config.max_tokens > positions:
            raise ConfigError(
                f"text.max_tokens: must be at most what {type(model).__name__} takes ({positions}), got "
                f"{config.max_tokens}."
            )

    def to(self, device: torch.device) -> TextEncoder:
        """Moves the networks to `device` and returns this encoder."""
        self._model.to(device)
        if self._connectors is not None:
            self._connectors.to(device)
        return self

    def fingerprint(self) -> str:
        """Returns the hash of everything that decides the embeddings: networks, vocabulary, tokens and
        padding."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        kind = type(self._tokenizer).__name__
        settings = [kind, vocabulary, self._config.max_tokens, self._config.mask_padding]
        if self._connectors is not None:
            settings.append(module_fingerprint(self._connectors))
        return module_fingerprint(self._model, *settings)

    def num_tokens(self, caption: str) -> int:
        """Returns how many tokens a caption has, end token included, however many are allowed."""
        return len(self._tokenizer(caption, verbose=False).input_ids)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> PromptEmbeds:
        """Returns the embeddings of some captions, on the CPU.

        Raises:
            DataError: If a caption has too many tokens and `long_captions` is `fail`.
        """
        for caption in captions:
            self._check_length(caption)
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._config.max_tokens,
            return_tensors="pt",
        )
        device = next(self._model.parameters()).device
        ids_BS, mask_BS = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        seen_BS = mask_BS if self._config.mask_padding else None
        output = self._model(
            input_ids=ids_BS, attention_mask=seen_BS, output_hidden_states=self._connectors is not None
        )
        if self._connectors is not None:
            return self._connected(torch.stack(output.hidden_states, dim=-1), mask_BS)
        return PromptEmbeds(
            prompt_embeds=_kept(output.last_hidden_state, mask_BS), prompt_attention_mask=mask_BS.bool().cpu()
        )

    def _connected(self, hidden_BSDK: Tensor, mask_BS: Tensor) -> PromptEmbeds:
        assert self._connectors is not None, "called where there are connectors"
        video_BSD, audio_BSD, mask_BS = self._connectors(hidden_BSDK.flatten(2, 3), mask_BS)
        return PromptEmbeds(
            prompt_embeds=_kept(video_BSD, mask_BS),
            prompt_attention_mask=mask_BS.bool().cpu(),
            audio_prompt_embeds=_kept(audio_BSD, mask_BS),
        )

    def _check_length(self, caption: str) -> None:
        limit, count = self._config.max_tokens, self.num_tokens(caption)
        if self._config.long_captions == "fail" and count > limit:
            raise DataError(
                f"caption: must have at most {limit} tokens (text.max_tokens), got {count}: "
                f"{caption[:60]!r}. "
                "Shorten it, raise text.max_tokens or set text.long_captions to truncate."
            )


def build_text_encoder(config: TextEncoderConfig, *, seed: int) -> TextEncoder:
    """Returns the encoder that `config` names, on the CPU in its precision; random weights depend on `seed`
    alone.

    Raises:
        ConfigError: If a name does not resolve or is no model's, a constructor refuses its arguments or files
            cannot be loaded.
    """
    dtype = _DTYPES[config.precision]
    try:
        model = _random(config, seed).to(dtype) if config.pretrained is None else _pretrained(config, dtype)
        tokenizer = _tokenizer(config)
    except ConfigError:
        raise
    except Exception as error:  # what is given what it does not expect may fail in any way
        got = config.pretrained or config.source
        raise ConfigError(
            f"text: must name a text encoder of transformers and its tokenizer, got {got!r} ({error})."
        ) from error
    connectors = None if config.connectors is None else build_model(config.connectors, seed=seed).to(dtype)
    return TextEncoder(tokenizer, model, connectors, config)


def _random(config: TextEncoderConfig, seed: int) -> nn.Module:
    factory = _class(config.source or "", is_pretrained=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "text weights"))
        model: nn.Module = factory(factory.config_class(**config.config))
    return model


def _pretrained(config: TextEncoderConfig, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel

    assert config.pretrained is not None, "see build_text_encoder"
    found = AutoConfig.from_pretrained(config.pretrained, subfolder=config.subfolder)
    if config.source is not None:
        factory: Any = _class(config.source, is_pretrained=True)
    elif found.model_type == "clip":  # both towers; the auto classes know the text tower alone
        factory = CLIPTextModel
    else:
        is_encoder = type(found) in AutoModelForTextEncoding._model_mapping
        factory = AutoModelForTextEncoding if is_encoder else AutoModel
    with progress.working(f"loading {config.pretrained}", has_own_bar=True):
        model: nn.Module = factory.from_pretrained(config.pretrained, subfolder=config.subfolder, dtype=dtype)
    return model


def _class(name: str, *, is_pretrained: bool) -> Any:
    """Returns the class of a model, judged before it is called; an automatic one needs files to find its
    own."""
    import transformers  # takes seconds to import; needed only here
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = getattr(transformers, name, None)
    kinds = (
        (transformers.PreTrainedModel, _BaseAutoModelClass)
        if is_pretrained
        else (transformers.PreTrainedModel,)
    )
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ConfigError(
            f"text.source: must name a text model of transformers, got {name[:80]!r}, which is none. Write "
            "for example T5EncoderModel."
        )
    return found


def _tokenizer(config: TextEncoderConfig) -> Any:
    from transformers import AutoTokenizer, ByT5Tokenizer

    name = config.tokenizer or config.pretrained
    if name is None:
        return ByT5Tokenizer(extra_ids=0)  # bytes as tokens: needs no files
    subfolder = config.tokenizer_subfolder or ("" if config.tokenizer else config.subfolder)
    return AutoTokenizer.from_pretrained(name, subfolder=subfolder)


def _kept(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    # Zeros, as Wan's pipeline has them; models that get the mask do not look there.
    return (hidden_BSD * mask_BS[..., None].to(hidden_BSD.dtype)).float().cpu()
