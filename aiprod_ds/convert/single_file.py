"""Names of tensors in a model's first publication, in one file as ComfyUI and others read it, and in
diffusers; and what else is in such a file.

A transformer's family has the table of its names (`Family.published`), for reading and writing, with any
prefix that tools put before them. Other classes are read by diffusers' own conversion functions, which are
asked with tensors without data, so that weights can be read one at a time; they also check every use of the
table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch

from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.facts import PIPELINE_PREFIX, PublishedNames
from aiprod_ds.models.lora_opened import listed
from aiprod_ds.tensor_file import TensorSpec

_PREFIXES = ("", PIPELINE_PREFIX, "diffusion_model.", "transformer.", "model.", "module.", "_orig_mod.")
_PARTS = (
    (
        "text connectors",
        r"(?:model\.diffusion_model\.|diffusion_model\.)?(?:video_|audio_)?embeddings_connector\.",
    ),
    ("text connectors", r"text_embedding_projection\.|connectors\."),
    ("average of the weights", r"model_ema\."),
    ("transformer", r"(?:model\.)?diffusion_model\."),
    ("audio VAE", r"audio_vae\."),
    ("vocoder", r"vocoder\."),
    ("VAE", r"vae\.|first_stage_model\."),
    ("text encoder", r"text_encoders?(?:_\d)?\.|cond_stage_model\.|conditioner\."),
    ("image encoder", r"clip_vision\.|image_encoder\."),
)
_STATISTICS = re.compile(
    r"per_channel_statistics\.(?:channel|mean-of-stds)"
)  # no class of diffusers has them


def names_in_single_file(
    specs: Mapping[str, TensorSpec], class_name: str, wanted: Collection[str]
) -> dict[str, str]:
    """Returns the file's name of every tensor of a model, by its name in diffusers.

    Args:
        specs: Of the file's tensors, by the names of the publication or those of diffusers; others beside
            them, as of a VAE in the same file, are for `other_tensors`.
        class_name: As diffusers calls the model's class.
        wanted: Names of the model's tensors in diffusers.

    Raises:
        CheckpointError: If tensors are missing, are cut or joined on the way, or nobody knows the
            publication's names.
    """
    own = {name: name for name in wanted}
    published = published_names(class_name)
    forms = [own]
    if published is not None:
        forms.append({name: published.name_of(name).removeprefix(published.prefix) for name in wanted})
    for form in forms:
        for prefix in _PREFIXES:
            if all(prefix + there in specs for there in form.values()):
                return {name: prefix + there for name, there in form.items()}
    return names_by_diffusers(specs, class_name, wanted)


def names_by_diffusers(
    specs: Mapping[str, TensorSpec], class_name: str, wanted: Collection[str]
) -> dict[str, str]:
    """As `names_in_single_file`, of the publication's names and by diffusers' own function alone: another
    reading of the same file.

    Raises:
        CheckpointError: If tensors are missing, are cut or joined on the way, or diffusers does not know the
            publication's names.
    """
    if set(wanted) <= specs.keys():
        return {name: name for name in wanted}
    origins = _origins(specs, class_name)
    missing = [name for name in wanted if name not in origins]
    if missing:
        raise CheckpointError(
            f"single file: must hold all of {class_name}, got nothing for {listed(sorted(missing))}. Take "
            "the file of this model."
        )
    names = {name: there for name in wanted if (there := origins[name]) is not None}
    changed = [name for name in wanted if name not in names]
    if changed:
        raise CheckpointError(
            f"single file: {listed(changed)} must be renamed only, got a tensor that is cut or joined."
        )
    return names


def names_for_single_file(specs: Mapping[str, TensorSpec], class_name: str) -> dict[str, str]:
    """Returns the name in diffusers of every tensor, by the name that the publication has for it.

    Args:
        specs: Those of all tensors of the model, by their names in diffusers.
        class_name: As diffusers calls the model's class.

    Raises:
        CheckpointError: If nobody knows the class's names, or diffusers' own function leads to another
            tensor.
    """
    published = published_names(class_name)
    if published is None:
        known = ", ".join(family.transformer_class for family in registry.FAMILIES if family.published)
        raise CheckpointError(
            f"single file: must be one of {known}, got {class_name}. Write it as diffusers."
        )
    written = {published.name_of(name): name for name in specs}
    origins = _origins({there: specs[name] for there, name in written.items()}, class_name)
    # A name that diffusers' function does not know (0.42.1: prompt_adaln_single of LTX-2.3) it leaves as
    # it is.
    back = {name: there for name, there in origins.items() if name in specs}
    wrong = [name for name, there in back.items() if there is None or written[there] != name]
    if wrong or len(written) != len(specs):
        raise CheckpointError(
            f"single file: diffusers must read back {listed(wrong) or 'every name'} of {class_name}, got "
            "others."
        )
    return written


def published_names(class_name: str) -> PublishedNames | None:
    """Returns the table of a transformer's publication; None where nobody has written it."""
    return next(
        (family.published for family in registry.FAMILIES if family.transformer_class == class_name), None
    )


def part_of(name: str, class_name: str) -> str | None:
    """Returns which other model in a merged file a tensor is of; None for the model itself and for what is
    not known."""
    own = "transformer" if "Transformer" in class_name else "VAE" if "Autoencoder" in class_name else None
    if class_name == "AutoencoderKLLTX2Audio":
        own = "audio VAE"
    part = next((part for part, pattern in _PARTS if re.match(pattern, name)), None)
    return None if part == own else part


def other_tensors(
    specs: Mapping[str, TensorSpec],
    used: Collection[str],
    class_name: str,
    *,
    where: str,
    allow_unknown: bool = False,
) -> dict[str, int]:
    """Returns what a file holds beside a model, as counts by the names of the parts.

    Args:
        specs: Of all tensors of the file.
        used: Names in the file of those of the model.
        class_name: As diffusers calls the model's class.
        where: How messages name the file.
        allow_unknown: Whether tensors of no known part may be left out.

    Raises:
        CheckpointError: If a tensor belongs to a layer of the model, or to nothing that is known.
    """
    layers = {name.removesuffix(".weight") for name in used}
    counts: Counter[str] = Counter()
    unknown = []
    for name in specs.keys() - set(used):
        if (part := part_of(name, class_name)) is not None:
            counts[part] += 1
        elif _STATISTICS.search(name):
            counts["statistics that diffusers does not keep"] += 1
        elif any(name.startswith(f"{layer}.") for layer in _above(name) if layer in layers):
            raise CheckpointError(
                f"{where}: must hold nothing beside a weight of {class_name} that the model has not, got "
                f"{name}. It would be lost, and the weight may mean nothing without it. Take another file of "
                "this model."
            )
        else:
            unknown.append(name)
    if unknown and not allow_unknown:
        raise CheckpointError(
            f"{where}: must hold {class_name} and known parts alone, got {listed(sorted(unknown))}. If it "
            "is of no use, leave it out with --allow-unknown; otherwise take the config.json of this model."
        )
    if unknown:
        counts["of no known part"] = len(unknown)
    return dict(sorted(counts.items()))


def _above(name: str) -> list[str]:
    """Returns the modules that a name lies in. Worked value: `a.b.c` lies in `a` and `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _origins(specs: Mapping[str, TensorSpec], class_name: str) -> dict[str, str | None]:
    """Returns the file's name of every tensor that diffusers' function makes, by its name there; None for one
    that is cut or joined."""
    convert = _converter(class_name)
    is_whole_pipeline = (
        any(name.startswith(PIPELINE_PREFIX) for name in specs) and "Transformer" in class_name
    )
    given = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in specs.items()
        if not is_whole_pipeline or name.startswith(PIPELINE_PREFIX)
    }
    names = {id(value): name for name, value in given.items()}
    kept = list(given.values())  # their ids stay theirs
    try:
        converted = convert(checkpoint=given, config={})
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"single file: must have the names of the publication of {class_name}, got "
            f"{type(error).__name__}: {error}."
        ) from error
    assert len(kept) == len(names)
    return {name: names.get(id(value)) for name, value in converted.items()}


def _converter(class_name: str) -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES  # takes seconds to import

    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    if class_name not in known:
        raise CheckpointError(
            f"single file: diffusers must know the publication of {class_name}, got no such class."
        )
    return known[class_name]["checkpoint_mapping_fn"]
