"""One conversion from its request to a verified result: what `aiprod-ds convert` does, whatever the pair.

Plain weights become a folder of diffusers, a single file as the publication has it, or safetensors as they
are named; adapters become PEFT's folder or one file. Weights pass through memory one tensor at a time. A
result is whole or absent, and absent where the manifest's hashes are not those of the files, which are
compared while tensors are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from aiprod_ds.checkpoint.manifest import HashCheck
from aiprod_ds.convert.derived import Cast, Confirmed, Joined, Renamed
from aiprod_ds.convert.diffusers_config import DiffusersModel, family_of, read_diffusers_config
from aiprod_ds.convert.identify import IN_WORDS
from aiprod_ds.convert.lora import Extraction
from aiprod_ds.convert.request import LORA_FORMS, Adapters, Form, Opened, Request, shown
from aiprod_ds.convert.single_file import names_for_single_file, names_in_single_file, other_tensors
from aiprod_ds.convert.sources import open_parts, open_source
from aiprod_ds.convert.weights_folder import (
    CONFIG,
    DIFFUSERS_STEM,
    PLAIN_STEM,
    WeightsFolder,
    new_file,
    new_folder,
    open_tensors,
    require_absent,
    require_equal,
    require_shapes,
    write_one_file,
    write_weights,
)
from aiprod_ds.errors import AiprodError, CheckpointError
from aiprod_ds.models.lora_files import read_lora
from aiprod_ds.tensor_file import TensorSource

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion did, for people: lines in order.

    Attributes:
        is_older: Whether it is of an older checkpoint than the newest, which is not whole.
    """

    lines: tuple[str, ...]
    is_older: bool = False


def convert(request: Request, *, verify: bool = False, console: Console | None = None) -> Converted:
    """Does what the request asks for.

    Args:
        request: Checked against the source here; options without effect are refused.
        verify: Whether the result is read again and compared with a second conversion, bit by bit.
        console: Shows progress; None shows nothing.

    Raises:
        CheckpointError: If the source cannot be read, the pair is not possible, the result exists, or it
            differs.
        ConfigError: If a model's configuration is not usable.
    """
    require_absent(request.out)
    if request.rank is not None:
        return _extract(request, verify=verify, console=console)
    with HashCheck(spared_cores=1) as hashes:
        try:
            return _convert(request, hashes, verify=verify, console=console)
        except AiprodError:
            if _is_confirmed(hashes):
                raise
    return _convert(
        request, None, verify=verify, console=console
    )  # says what is damaged, or takes an older checkpoint


def _convert(
    request: Request, hashes: HashCheck | None, *, verify: bool, console: Console | None
) -> Converted:
    opened = open_source(request, hashes)
    form = request.form or usual_form(opened)
    _require_name(request.out, form)
    if form in LORA_FORMS:
        line = _write_adapters(request, opened, form, verify=verify)
    else:
        line = _write_plain(request, opened, form, hashes, verify=verify, console=console)
    checked = (_compare(request, opened, form),) if verify else ()
    return Converted(lines=(*opened.told, line, *checked), is_older=bool(opened.passed_over))


def _compare(request: Request, opened: Opened, form: Form) -> str:
    """Compares the result, which has been compared with a second conversion, with the reading of others;
    returns what was compared.

    Raises:
        CheckpointError: If they read something else.
    """
    from aiprod_ds.convert import independent  # imports safetensors and, later, diffusers

    begin, model, lora = "verified: read again, every tensor is equal", opened.model, opened.lora
    family = None if model is None or lora is None else family_of(model, where=str(request.source))
    differences = None
    if model is not None and lora is not None and family is not None:
        differences = independent.differences_of(lora.source, model.module, family)
        begin += f"; of the LoRA {independent.compare_lora(lora, differences).in_words('layers')}"
    if form in LORA_FORMS:
        assert model is not None
        return begin + _compare_adapters(request.out, model)
    if opened.raw is None:
        return f"{begin} to a second conversion; nobody else reads a {IN_WORDS[opened.found.kind]}"
    out = (request.out,) if request.out.is_file() else WeightsFolder(request.out).paths()
    names = None if model is None or form == "safetensors" else (model.class_name, list(model.shapes))
    compared = independent.compare_plain(opened.raw, out, names, lora=lora, differences=differences)
    return f"{begin}; {compared.in_words('tensors')}"


def _compare_adapters(out: Path, model: DiffusersModel) -> str:
    from aiprod_ds.convert import independent  # as above

    family = family_of(model, where=str(out))
    written = read_lora(out, model.module, family)
    theirs = independent.differences_of(out, model.module, family)
    return f"; of the result {independent.compare_lora(written, theirs).in_words('layers')}"


def _is_confirmed(hashes: HashCheck) -> bool:
    try:
        hashes.confirm()
    except CheckpointError:
        return False
    return True


def usual_form(opened: Opened) -> Form:
    """Returns the form that weights become where none is asked for.

    Raises:
        CheckpointError: If they are adapters without their model.
    """
    if opened.weights is None:
        raise CheckpointError(
            f"{opened.found.path}: a LoRA needs --to with {', '.join(LORA_FORMS)}, or --base to be merged "
            "into, got neither."
        )
    return "safetensors" if opened.model is None else "diffusers"


def _require_name(out: Path, form: Form) -> None:
    is_file = out.name.endswith(_SUFFIX)
    if is_file != (form in ("single-file", "comfyui", "diffusers-lora")) and form != "safetensors":
        kind = "a folder" if is_file else f"a file that ends in {_SUFFIX}"
        raise CheckpointError(f"{out}: must be {kind} for --to {form}, got {out.name!r}. Name another.")


def _write_plain(
    request: Request,
    opened: Opened,
    form: Form,
    hashes: HashCheck | None,
    *,
    verify: bool,
    console: Console | None,
) -> str:
    if opened.weights is None:
        raise CheckpointError(
            f"{request.source}: a LoRA becomes --to {form} only inside its model, got no --base. Name it."
        )
    named, left = named_for(opened, form, allow_unknown=request.allow_unknown)
    tensors: TensorSource = Cast(named, request.dtype)
    metadata: Mapping[str, str] = {}
    if request.parts_from is not None:
        parts = open_parts(request.parts_from, opened.model, form)
        tensors, metadata = Joined(tensors, parts.tensors), parts.metadata
    with shown(
        tensors if hashes is None else Confirmed(tensors, hashes.confirm), "converting", console
    ) as read:
        _write(read, request, form, opened.model, metadata)
    if verify:
        with shown(tensors, "verifying", console) as read:
            _verify(read, request.out, form)
    num_bytes = sum(spec.nbytes for spec in tensors.specs.values())
    types = sorted({str(spec.dtype).removeprefix("torch.") for spec in tensors.specs.values()})
    what = f"{IN_WORDS[opened.found.kind]} to {form}"
    counts = ", ".join(f"{part} {count} tensors" for part, count in left.items())
    text = f"{request.out}: {what}, {len(tensors)} tensors, {num_bytes:,} bytes, {', '.join(types)}"
    return f"{text}; left out: {counts}" if counts else text


def named_for(
    opened: Opened, form: Form, *, allow_unknown: bool = False
) -> tuple[TensorSource, dict[str, int]]:
    """Returns the weights by the names that the form has, and counts of what is left out by what it is of.

    Args:
        opened: What there is.
        form: What it becomes.
        allow_unknown: Whether tensors that belong to nothing that is known may be left out.

    Raises:
        CheckpointError: If the model's class is not known or they are not of it.
    """
    weights = opened.weights
    assert weights is not None
    if form == "safetensors":
        return weights, {}
    model = opened.model
    if model is None:
        raise CheckpointError(
            f"{opened.found.path}: --to {form} needs the model's class, got no {CONFIG}. Name one with "
            "--config, or write "
            "--to safetensors."
        )
    shapes, where = model.shapes, str(opened.found.path)
    names = names_in_single_file(weights.specs, model.class_name, list(shapes))
    left = other_tensors(
        weights.specs, names.values(), model.class_name, where=where, allow_unknown=allow_unknown
    )
    named = Renamed(weights, names)
    require_shapes(named, shapes, where=where)
    if form == "single-file":
        return Renamed(named, names_for_single_file(named.specs, model.class_name)), left
    return named, left


def _write(
    tensors: TensorSource,
    request: Request,
    form: Form,
    model: DiffusersModel | None,
    metadata: Mapping[str, str],
) -> None:
    if request.out.name.endswith(_SUFFIX):
        write_one_file(tensors, request.out, metadata=metadata)
    elif form == "diffusers" and model is not None:
        write_weights(
            tensors, request.out, stem=DIFFUSERS_STEM, shard_bytes=request.shard_bytes, config=model.config
        )
    else:
        write_weights(tensors, request.out, stem=PLAIN_STEM, shard_bytes=request.shard_bytes)


def _verify(expected: TensorSource, out: Path, form: Form) -> None:
    written = open_tensors(out) if out.is_file() else WeightsFolder(out)
    shapes = (
        read_diffusers_config(out).shapes
        if form == "diffusers"
        else {name: spec.shape for name, spec in expected.specs.items()}
    )
    require_shapes(written, shapes, where=str(out))
    require_equal(written, expected.items())


def _write_adapters(request: Request, opened: Opened, form: Form, *, verify: bool) -> str:
    adapters, model = opened.adapters, opened.model
    if adapters is None or model is None:
        raise CheckpointError(
            f"{request.source}: --to {form} needs adapters, got plain weights. Give --base and --rank to "
            "extract a LoRA."
        )
    if request.dtype is not None:
        cast = {name: value.to(request.dtype) for name, value in adapters.tensors.items()}
        adapters = Adapters(tensors=cast, config=adapters.config)
    with _pending(request.out, form) as pending:
        _save_adapters(adapters, model, form, pending)
    if verify:
        _verify_adapters(adapters, model, request.out, form)
    return (
        f"{request.out}: {len(adapters.tensors) // 2} layers, rank {adapters.config.rank}, scale "
        f"{adapters.config.scale:g}"
    )


@contextmanager
def _pending(out: Path, form: Form) -> Iterator[Path]:
    with new_folder(out) if form == "peft" else new_file(out) as pending:
        yield pending


def _save_adapters(adapters: Adapters, model: DiffusersModel, form: Form, path: Path) -> None:
    from aiprod_ds.models.lora import (
        save_comfyui,
        save_diffusers,
        save_peft,
    )  # imports peft, which takes seconds

    if form == "peft":
        save_peft(adapters.tensors, adapters.config, path)
    elif form == "comfyui":
        family = family_of(model, where=str(path))
        if family.published is None:
            raise CheckpointError(
                f"--to comfyui: must be of a family whose published names are known, got {family.name!r}. "
                "Write it as peft or diffusers-lora."
            )
        save_comfyui(adapters.tensors, adapters.config, path, original_name=family.published.layer_of)
    else:
        save_diffusers(adapters.tensors, adapters.config, path)


def _verify_adapters(adapters: Adapters, model: DiffusersModel, out: Path, form: Form) -> None:
    """Reads the result again: A and scale * B must be those that were written, to the bit."""
    read = read_lora(out, model.module, family_of(model, where=str(out)))
    scale, scales = adapters.config.scale, read.scales()
    # In one file the scale is multiplied into B and rounded to its type.
    expected = {
        name: value.float()
        if ".lora_A." in name
        else value.float() * scale
        if form == "peft"
        else (value * scale).float()
        for name, value in adapters.tensors.items()
    }
    written = {
        name: value if ".lora_A." in name else value * scales[name.removesuffix(".lora_B.weight")]
        for name, value in read.tensors().items()
    }
    if expected.keys() != written.keys():
        raise CheckpointError(f"{out}: must hold the layers that were converted, got others. Write it again.")
    require_equal(written, expected.items())


def _extract(request: Request, *, verify: bool, console: Console | None) -> Converted:
    if request.base is None or request.rank is None or request.form not in (None, *LORA_FORMS):
        raise CheckpointError(
            f"{request.source}: --rank extracts a LoRA: it needs --base, and --to "
            f"{', '.join(LORA_FORMS)}, got others."
        )
    form = request.form or "peft"
    _require_name(request.out, form)
    extraction = Extraction.of(request.base, request.source, rank=request.rank, targets=request.targets)
    parts = extraction.parts(console=console)
    tensors = {}
    for part in parts:
        tensors[f"{part.layer}.lora_A.weight"], tensors[f"{part.layer}.lora_B.weight"] = part.down, part.up
    from aiprod_ds.config.model import LoraConfig
    from aiprod_ds.convert.weights import total_error

    config = LoraConfig(rank=request.rank, targets=tuple(part.layer for part in parts))
    adapters, model = Adapters(tensors=tensors, config=config), read_diffusers_config(request.base)
    with _pending(request.out, form) as pending:
        _save_adapters(adapters, model, form, pending)
    checked: tuple[str, ...] = ()
    if verify:
        _verify_adapters(adapters, model, request.out, form)
        checked = (f"verified: read again, every tensor is equal{_compare_adapters(request.out, model)}",)
    whole = total_error(parts, extraction.lost().values())
    line = (
        f"{request.out}: {len(parts)} layers, rank {request.rank}, of the whole model: relative error "
        f"{whole:.3g}"
    )
    return Converted(lines=(line, *checked))
