"""A second reading of what was converted, by the libraries of others: what `--verify` compares with.

Plain weights: files are read by the safetensors library, names found by diffusers' own function, and scales
multiplied in fp64. LoRA: diffusers loads the file into the transformer without weights, and PEFT computes the
difference of each layer. Neither shares code with the conversion. Memory holds one tensor, or the LoRA.

What they cannot read is counted, and told: it has then been compared with a second conversion alone.
Called by `run`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from aiprod_ds.convert.single_file import names_by_diffusers
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.lora_files import LoraWeights
from aiprod_ds.models.lora_opened import CONFIG_FILE, SETTINGS, WEIGHTS_FILE
from aiprod_ds.tensor_file import TensorSpec

_SCALES = (".scale_weight", ".weight_scale")
_PEFT_PREFIX = "base_model.model."
_PEFT_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_bias",
)
_TOLERANCE = 1e-5  # (scale A), B against scale (B A): roundings of fp32, over the largest difference
_CANNOT = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    AssertionError,
    OSError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What was compared with another reading.

    Attributes:
        count: Of tensors, or layers of a LoRA.
        total: That there are.
        why: Why not all, in words.
    """

    count: int
    total: int
    why: str = ""

    def in_words(self, what: str) -> str:
        """Returns the end of a line for people."""
        if self.count == self.total:
            return f"{self.count} {what} as diffusers reads them"
        return f"{self.count} of {self.total} {what} as diffusers reads them ({self.why})"


class OthersFiles:
    """Tensors of safetensors files, read by the safetensors library.

    Args:
        paths: Their names differ.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in files for name in list(file.keys())}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes by name; types are left at fp32, as nobody asks for them here."""
        return {
            name: TensorSpec(dtype=torch.float32, shape=tuple(file.get_slice(name).get_shape()))
            for name, file in self._file_of.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = self._file_of[name].get_tensor(name)
        return value

    def number(self, name: str) -> Tensor | None:
        """Returns what a weight stands for: itself, or its scaled value; None where it is in a form that only
        this project reads."""
        value, layer = self[name], name.removesuffix(".weight")
        for ending in _SCALES:
            if layer + ending in self._file_of:
                return _by_rows(value.double(), self[layer + ending].double())
        if f"{layer}.SCB" in self._file_of:
            return _by_rows(value.double(), self[f"{layer}.SCB"].double()) / 127
        return None if value.dtype in (torch.uint8, torch.int8) else value


class Differences(Mapping[str, Tensor]):
    """scale * B A of a transformer's layers as PEFT computes it, when it is asked for; fp32.

    Args:
        wrapped: A transformer into which diffusers loaded adapters.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        self._layers: dict[str, Any] = {}
        for name, layer in wrapped.named_modules():
            if getattr(layer, "lora_A", None):
                self._layers[name] = layer

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers[name]
        difference: Tensor = layer.get_delta_weight(next(iter(layer.lora_A)))
        return difference.detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def compare_plain(
    source: tuple[Path, ...],
    out: tuple[Path, ...],
    names: tuple[str, list[str]] | None,
    *,
    lora: LoraWeights | None = None,
    differences: Differences | None = None,
) -> Compared:
    """Compares written weights with the source as others read both.

    Args:
        source: Files of the source; of a merge, those of its base.
        out: Files of the result.
        names: The model's class, and the names of its tensors, as diffusers has them; None: names are kept.
        lora: What was merged.
        differences: Of layers' weights, from `differences_of`.

    Raises:
        CheckpointError: If a tensor differs.
    """
    theirs, written = OthersFiles(source), OthersFiles(out)
    class_name, wanted = names or ("", list(written.specs))
    try:
        origin = names_by_diffusers(theirs.specs, class_name, wanted)
        place = names_by_diffusers(written.specs, class_name, wanted)
    except CheckpointError as error:
        return Compared(count=0, total=len(wanted), why=f"diffusers cannot name them ({error})")
    count = 0
    changed, patched = (set(), set()) if lora is None else (lora.parameters(), set(lora.patches))
    for name in wanted:
        layer, value = name.removesuffix(".weight"), theirs.number(origin[name])
        is_known = differences is not None and layer in differences and name not in patched
        if value is None or (name in changed and not is_known):
            continue
        difference = differences[layer] if name in changed and differences is not None else None
        if not _is_same(written[place[name]], value, difference):
            raise CheckpointError(
                f"{name}: must be what diffusers reads from {source[0]}, got other values. Report it, with "
                "the names of the file's tensors."
            )
        count += 1
    why = "the others are in a form, or have differences, that it does not read"
    return Compared(count=count, total=len(wanted), why=why)


def _is_same(written: Tensor, value: Tensor, difference: Tensor | None) -> bool:
    if difference is None:
        expected = value.float().to(written.dtype)
        return torch.equal(expected.flatten().view(torch.uint8), written.flatten().view(torch.uint8))
    merged = value.float() + difference
    step = torch.finfo(written.dtype).eps * merged.abs()  # the sum may be rounded to the neighbour
    return bool(((written.float() - merged).abs() <= step + _TOLERANCE * difference.abs().max()).all())


def compare_lora(lora: LoraWeights, differences: Differences | None) -> Compared:
    """Compares what was read of a LoRA with the differences that PEFT computes.

    Args:
        lora: As it is read here.
        differences: From `differences_of`; None: diffusers does not read the file.

    Raises:
        CheckpointError: If a layer's difference is another.
    """
    total = len(lora.layers)
    if differences is None:
        return Compared(count=0, total=total, why="it refuses the file")
    unread = sorted(set(differences) - set(lora.layers))
    if unread:
        raise CheckpointError(
            f"{lora.source}: must be read as diffusers reads it, got nothing for {unread[0]}. Report it."
        )
    for name, theirs in differences.items():
        layer = lora.layers[name]
        # An alpha that only this project finds is no part of their difference.
        ours = (1.0 if name in lora.assumed else layer.scale) * (layer.up @ layer.down)
        if float((ours - theirs).abs().max()) > _TOLERANCE * float(theirs.abs().max()):
            raise CheckpointError(
                f"{lora.source}: the difference of {name} must be what diffusers and PEFT make of it, got "
                "another. Report it, with the file's keys and metadata."
            )
    return Compared(count=len(differences), total=total, why="it has no name for them")


def differences_of(path: Path, module: nn.Module, family: type[Family]) -> Differences | None:
    """Returns scale * B A of every layer that diffusers finds in a LoRA, fp32; None if it refuses the file.

    Args:
        path: A PEFT folder or a file.
        module: The transformer on the meta device; it is copied.
        family: Of the transformer.
    """
    wrapped: Any = _without_memory(module)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).float() for name in list(opened.keys())}
        metadata = dict(opened.metadata() or {})
    if any(name.endswith(".alpha") and float(value.max()) <= 0 for name, value in tensors.items()):
        return None  # diffusers 0.42.1 halves such a factor for ever (lora_conversion_utils.py:1861)
    try:
        settings = json.loads(metadata[SETTINGS]) if SETTINGS in metadata else None
        prefix, state = _PEFT_PREFIX, tensors
        if not all(name.startswith(_PEFT_PREFIX) for name in tensors):
            prefix, state = "transformer.", _by_pipeline(tensors, family)
        if path.is_dir():
            told = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
            settings = {f"{prefix}{key}": told[key] for key in _PEFT_SETTINGS if told.get(key) is not None}
        wrapped.load_lora_adapter(state, prefix=prefix.removesuffix("."), metadata=settings)
        return Differences(wrapped)
    except _CANNOT:  # it has no error of its own for a file that it does not read
        return None


def _without_memory(module: nn.Module) -> nn.Module:
    """Returns the same with zeros for weights, which take no memory: PEFT gives adapters the device of their
    layer, and on the meta device they would have no numbers."""
    copied = copy.deepcopy(module)
    for owner in list(copied.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            owner.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return copied


def _by_pipeline(tensors: dict[str, Tensor], family: type[Family]) -> dict[str, Tensor]:
    import diffusers  # takes seconds to import

    pipeline: Any = getattr(diffusers, family.pipeline_class)
    state: dict[str, Tensor] = pipeline.lora_state_dict(dict(tensors))
    if not all("lora" in name for name in state):  # as its load_lora_weights has it
        raise ValueError("keys that are no LoRA")
    return state


def _by_rows(value: Tensor, scale: Tensor) -> Tensor:
    if scale.numel() == 1:
        return value * scale.reshape(())
    return value * scale.reshape(-1, *(1 for _ in value.shape[1:]))
