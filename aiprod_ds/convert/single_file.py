"""Names of tensors in a model's first publication, in one file as ComfyUI and others read it, and in
diffusers.

Reading: diffusers' own conversion functions say what becomes of a file's names; they are asked with tensors
without data, so that weights can be read one at a time. Writing: the inverse, stated here for the
transformers of the known families, and every use is checked against the function it inverts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.lora_files import listed
from aiprod_ds.tensor_file import TensorSpec

_PREFIX = "model.diffusion_model."
_LTX = (
    (r"\bproj_in\b", "patchify_proj"),
    (r"\btime_embed\b", "adaln_single"),
    (r"\bnorm_(q|k)\b", r"\1_norm"),
)
_LTX_2 = (
    (r"\bav_cross_attn_(video|audio)_scale_shift\b", r"av_ca_\1_scale_shift_adaln_single"),
    (r"\bav_cross_attn_(?:video|audio)_(a2v|v2a)_gate\b", r"av_ca_\1_gate_adaln_single"),
    (r"\b(video|audio)_a2v_cross_attn_scale_shift_table\b", r"scale_shift_table_a2v_ca_\1"),
    (r"\b(audio_)?proj_in\b", r"\1patchify_proj"),
    (r"\b(audio_)?time_embed\b", r"\1adaln_single"),
    (r"\bnorm_(q|k)\b", r"\1_norm"),
)
_WAN = (
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.add_(k|v)_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm(2|3)\.", lambda match: f".norm{5 - int(match[1])}."),
)
# Prefix and rules, one after another, by class. Prefixes are those of the files that were published.
_WRITTEN: dict[str, tuple[str, tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]]] = {
    "LTXVideoTransformer3DModel": (_PREFIX, _LTX),
    "LTX2VideoTransformer3DModel": (_PREFIX, _LTX_2),
    "WanTransformer3DModel": ("", _WAN),
}


def names_in_single_file(
    specs: Mapping[str, TensorSpec], class_name: str, wanted: Collection[str]
) -> dict[str, str]:
    """Returns the file's name of every tensor of a model, by its name in diffusers.

    Args:
        specs: Of the file's tensors, by the names of the publication or those of diffusers; others beside
            them, as of a VAE in the same file, are left out.
        class_name: Of diffusers.
        wanted: Names of the model's tensors in diffusers.

    Raises:
        CheckpointError: If tensors are missing, are cut or joined on the way, or nobody knows the
            publication's names.
    """
    if set(wanted) <= specs.keys():
        return {name: name for name in wanted}
    convert = _converter(class_name)
    is_whole_pipeline = any(name.startswith(_PREFIX) for name in specs) and "Transformer" in class_name
    given = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in specs.items()
        if not is_whole_pipeline or name.startswith(_PREFIX)
    }
    origins = {id(value): name for name, value in given.items()}
    kept = list(given.values())  # their ids stay theirs
    try:
        converted = convert(checkpoint=given, config={})
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"single file: must have the names of the publication of {class_name}, got "
            f"{type(error).__name__}: {error}."
        ) from error
    missing = [name for name in wanted if name not in converted]
    if missing:
        raise CheckpointError(
            f"single file: must hold all of {class_name}, got nothing for {listed(sorted(missing))}. Take "
            "the file of this model."
        )
    changed = [name for name in wanted if id(converted[name]) not in origins]
    if changed:
        raise CheckpointError(
            f"single file: {listed(changed)} must be renamed only, got a tensor that is cut or joined."
        )
    assert kept
    return {name: origins[id(converted[name])] for name in wanted}


def names_for_single_file(specs: Mapping[str, TensorSpec], class_name: str) -> dict[str, str]:
    """Returns the name in diffusers of every tensor, by the name that the publication has for it.

    Args:
        specs: Of the model in diffusers.
        class_name: Of diffusers.

    Raises:
        CheckpointError: If nobody knows the class's names, or diffusers' own function does not lead back to
            every tensor.
    """
    if class_name not in _WRITTEN:
        raise CheckpointError(
            f"single file: must be one of {', '.join(_WRITTEN)}, got {class_name}. Write it as diffusers."
        )
    prefix, rules = _WRITTEN[class_name]
    written: dict[str, str] = {}
    for name in specs:
        original = name
        for pattern, replacement in rules:
            original = re.sub(pattern, replacement, original)
        written[prefix + original] = name
    back = names_in_single_file(
        {there: specs[name] for there, name in written.items()}, class_name, list(specs)
    )
    wrong = [name for name, there in back.items() if written[there] != name]
    if wrong or len(written) != len(specs):
        raise CheckpointError(
            f"single file: diffusers must read back {listed(wrong) or 'every name'} of {class_name}, got "
            "others."
        )
    return written


def _converter(class_name: str) -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES  # takes seconds to import

    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    if class_name not in known:
        raise CheckpointError(
            f"single file: diffusers must know the publication of {class_name}, got no such class."
        )
    return known[class_name]["checkpoint_mapping_fn"]
