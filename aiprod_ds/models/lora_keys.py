"""Keys of LoRA files: which layer and which part of its adapter each writer means, and whatever is none of
it.

A key is `<prefixes><layer>.<part>`. Prefixes are those of ComfyUI, diffusers, PEFT, torch.compile and
wrappers around a model, in any order. The layer has its name in diffusers or in the model's publication,
which is the table of its single file, or either with `_` for every dot after one of `FLAT`. Knows names,
no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aiprod_ds.models.families.facts import PublishedNames

Part = Literal["down", "up", "bias", "alpha", "magnitude", "diff", "diff_b"]
"""Of a layer: A, B, what B's side adds to the bias, alpha, DoRA's magnitudes, differences of weight and
bias."""

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "_orig_mod.",
    "module.",
    "model.",
)
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_ENDINGS: tuple[tuple[Part, str], ...] = (
    ("down", r"lora_A\.(?:(?P<adapter>[^.]+)\.)?weight|lora_down\.weight|lora\.down\.weight"),
    ("down", r"lora_linear_layer\.down\.weight"),
    ("up", r"lora_B\.(?:(?P<adapter>[^.]+)\.)?weight|lora_up\.weight|lora\.up\.weight"),
    ("up", r"lora_linear_layer\.up\.weight"),
    ("bias", r"lora_B\.(?:(?P<adapter>[^.]+)\.)?bias"),
    ("magnitude", r"lora_magnitude_vector(?:\.(?P<adapter>[^.]+))??(?:\.weight)?"),
    ("alpha", r"alpha"),
    ("diff_b", r"diff_b|b_norm"),
    ("diff", r"diff|w_norm"),
)
_PARTS = tuple((part, re.compile(rf"^(?P<module>.+?)\.(?:{ending})$")) for part, ending in _ENDINGS)
_KINDS = (
    ("DoRA of LyCORIS", r"\.dora_scale$"),
    ("LoHa", r"\.hada_"),
    ("LoKr", r"\.lokr_"),
    ("LoCon with a middle matrix", r"\.lora_mid\."),
    ("OFT or BOFT", r"\.(?:oft_|boft_)"),
    ("GLoRA", r"\.(?:a1|a2|b1|b2)\.weight$"),
    ("(IA)^3", r"\.(?:ia3_l|on_input)"),
    ("VeRA", r"\.vera_"),
    ("adapters of an embedding", r"\.lora_embedding_"),
    ("a weight in place of the model's", r"\.(?:set_weight|reshape_weight|modules_to_save\..+)$"),
)
_OTHER_MODELS = (
    (
        "text connectors",
        r"(?:video_|audio_)?embeddings_connector[._]|text_embedding_projection[._]|connectors[._]",
    ),
    ("text encoder", r"(?:lora_)?te\d?_|text_encoders?(?:_\d)?[._]|(?:lora_)?text_encoder"),
    ("VAE", r"vae[._]"),
)
_IMAGE_INPUTS = re.compile(r"k_img|v_img|add_[kv]_proj|img_emb|image_embedder")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraKey:
    """What a key of a file means.

    Attributes:
        module: Without prefixes, as the writer calls it; flat names begin with the first of `FLAT`.
        adapter: PEFT's name of the adapter; "" where the key has none.
    """

    module: str
    part: Part
    adapter: str


def parse_key(key: str) -> LoraKey | None:
    """Returns what a key means; None where it is no part of a LoRA."""
    for part, pattern in _PARTS:
        if (match := pattern.match(key)) is not None:
            adapter = match.groupdict().get("adapter") or ""
            return LoraKey(module=_without_prefixes(match["module"]), part=part, adapter=adapter)
    return None


def other_kind(key: str) -> str | None:
    """Returns which adapter that is no LoRA has such keys; None for none that is known."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, key)), None)


def other_model(key: str) -> str | None:
    """Returns the model beside the transformer that a key belongs to; None for the transformer."""
    name = _without_prefixes(key)
    for prefix in FLAT:
        name = name.removeprefix(prefix)
    return next((model for model, pattern in _OTHER_MODELS if re.match(pattern, name)), None)


def is_image_input(module: str) -> bool:
    """Whether a layer is one that an image-to-video model has beside those of text to video."""
    return _IMAGE_INPUTS.search(module) is not None


def names_in_files(modules: Mapping[str, str], published: PublishedNames | None) -> dict[str, str]:
    """Returns the modules' names by every name that a file may have for them, without prefixes.

    Args:
        modules: The parameter of each that is its weight, by their names in diffusers.
        published: The table of the publication; None where nobody has written it.
    """
    pairs = []
    if published is not None:
        for name, parameter in modules.items():
            written = published.name_of(parameter).removeprefix(published.prefix)
            pairs.append((written.removesuffix(".weight"), name))
    found = {}
    for written, name in (*pairs, *((name, name) for name in modules)):  # diffusers' layer where both have it
        found[FLAT[0] + written.replace(".", "_")] = name
        found[written] = name
    return found


def _without_prefixes(name: str) -> str:
    name = name.replace("._orig_mod.", ".")  # of blocks that were compiled on their own
    while (prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)) is not None:
        name = name.removeprefix(prefix)
    flat = next((prefix for prefix in FLAT if name.startswith(prefix)), None)
    return name if flat is None else FLAT[0] + name.removeprefix(flat)
