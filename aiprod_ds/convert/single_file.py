"""Names of tensors in a model's first publication, in one file as ComfyUI and others read it, and in
diffusers.

Reading: diffusers' own conversion functions say what becomes of a file's names; they are asked with tensors
without data, so that weights can be read one at a time. Writing: the inverse, which a transformer's family
states (`Family.published`), and every use is checked against the function it inverts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.facts import PIPELINE_PREFIX
from aiprod_ds.models.families.registry import FAMILIES
from aiprod_ds.models.lora_files import listed
from aiprod_ds.tensor_file import TensorSpec


def names_in_single_file(
    specs: Mapping[str, TensorSpec], class_name: str, wanted: Collection[str]
) -> dict[str, str]:
    """Returns the file's name of every tensor of a model, by its name in diffusers.

    Args:
        specs: Of the file's tensors, by the names of the publication or those of diffusers; others beside
            them, as of a VAE in the same file, are left out.
        class_name: As diffusers calls the model's class.
        wanted: Names of the model's tensors in diffusers.

    Raises:
        CheckpointError: If tensors are missing, are cut or joined on the way, or nobody knows the
            publication's names.
    """
    if set(wanted) <= specs.keys():
        return {name: name for name in wanted}
    convert = _converter(class_name)
    is_whole_pipeline = (
        any(name.startswith(PIPELINE_PREFIX) for name in specs) and "Transformer" in class_name
    )
    given = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in specs.items()
        if not is_whole_pipeline or name.startswith(PIPELINE_PREFIX)
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
        specs: Those of all tensors of the model, by their names in diffusers.
        class_name: As diffusers calls the model's class.

    Raises:
        CheckpointError: If nobody knows the class's names, or diffusers' own function does not lead back to
            every tensor.
    """
    known = {family.transformer_class: family.published for family in FAMILIES if family.published}
    if class_name not in known:
        raise CheckpointError(
            f"single file: must be one of {', '.join(known)}, got {class_name}. Write it as diffusers."
        )
    published = known[class_name]
    written = {published.name_of(name): name for name in specs}
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
