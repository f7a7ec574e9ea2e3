"""LoRA files of any common writer, read for one transformer, and their merging into a plain model.

Owns alpha, checks and the sum; keys are `lora_keys.py`, adapters inside a model that trains them `lora.py`.
Forms, all safetensors, never pickle: a PEFT folder (`adapter_config.json` beside
`adapter_model.safetensors`), or one file with the keys of any writer.

    W' = W + scale * B A + difference,   scale = alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA
    DoRA: W' = m * V / |V|,   V = W + scale * B A, norms of the rows

Shapes: A [rank,in], B [out,rank], W [out,in].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.lora_keys import is_image_input, names_in_files, other_model, parse_key
from aiprod_ds.models.lora_opened import Alpha, OpenedLora, layer_scales, listed, open_lora, require_lora

_FIRST_BLOCK = re.compile(r"(blocks[._])(\d+)([._])")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLora:
    """The adapter of one layer.

    Attributes:
        down: A [rank,in] fp32.
        up: B [out,rank] fp32.
        scale: Factor of B A.
        magnitude: DoRA's norms [out] fp32; None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    def added_to(self, weight: Tensor) -> Tensor:
        """Returns the merged weight in fp32, on the weight's device."""
        device = weight.device
        merged = weight.float() + self.scale * (self.up.to(device) @ self.down.to(device))
        if self.magnitude is None:
            return merged
        factors: Tensor = self.magnitude.to(device) / torch.linalg.vector_norm(merged, dim=1)
        return merged * factors[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """A LoRA for one transformer.

    Attributes:
        source: Where it was read, for messages.
        layers: By the layers' names in the plain transformer, in its order.
        patches: Differences of whole parameters, fp32, by the parameters' names.
        others: Counts of tensors that are not of the transformer, by what they are of.
        assumed: Layers whose alpha no other program would find.
    """

    source: Path
    layers: Mapping[str, LayerLora]
    patches: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    assumed: frozenset[str] = frozenset()

    def ranks(self) -> tuple[int, ...]:
        """Returns the different ranks, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))

    def tensors(self) -> dict[str, Tensor]:
        """Returns A and B by the names `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"] = layer.down, layer.up
        return named

    def scales(self) -> dict[str, float]:
        """Returns the factor of B A by layer."""
        return {name: layer.scale for name, layer in self.layers.items()}

    def parameters(self) -> set[str]:
        """Returns the names of the parameters that it changes."""
        return {f"{name}.weight" for name in self.layers} | set(self.patches)

    def applied(self, name: str, value: Tensor) -> Tensor:
        """Returns the parameter `name`, which was `value`, with the LoRA in it, in fp32."""
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        merged = value.float() if layer is None else layer.added_to(value)
        return merged + self.patches[name].to(merged.device) if name in self.patches else merged

    def require_plain(self, purpose: str) -> None:
        """Checks that it is A and B alone.

        Raises:
            CheckpointError: If it has magnitudes or differences of whole parameters, naming `purpose`.
        """
        dora = [name for name, layer in self.layers.items() if layer.magnitude is not None]
        if dora or self.patches:
            what = f"DoRA of {listed(dora)}" if dora else f"differences of {listed(sorted(self.patches))}"
            raise CheckpointError(
                f"{self.source}: must be A and B alone {purpose}, got {what}. Merge it into its base instead "
                "(`convert --base`, `model.lora_checkpoint`)."
            )


def read_lora(
    path: Path,
    transformer: nn.Module,
    family: Family | type[Family],
    *,
    alpha: Alpha = None,
    allow_unknown: bool = False,
) -> LoraWeights:
    """Reads a LoRA of any writer. The scale of a layer is alpha / rank, with its own rank.

    Alpha is, in this order: the layer's `alpha` tensor; `alpha_pattern` and `lora_alpha` of PEFT's
    settings; in the metadata `alpha_is_folded` (the scale is then 1), `alpha` or `ss_network_alpha`; the
    argument.

    Worked number: alpha 6 and A with 4 rows make the scale 1.5; rank-stabilised it is 3.

    Args:
        path: A PEFT folder or a file.
        transformer: The plain model; may be on the meta device.
        family: Of `transformer`; knows what its publication calls the layers.
        alpha: For a file that does not say it, and for no other.
        allow_unknown: Whether keys that belong to nothing that is known are left out.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, has layers or shapes that the
            transformer has not, or alpha is missing or told twice.
    """
    opened = open_lora(path)
    read = _read_parts(opened, transformer, family, allow_unknown=allow_unknown)
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    adapted = {
        name: parts for name, parts in read.parts.items() if parts.keys() & {"down", "up", "magnitude"}
    }
    for name, parts in adapted.items():
        _require_fitting(path, name, parts, linear.get(name))
        if opened.settings.get("use_dora") and "magnitude" not in parts:
            raise CheckpointError(
                f"{path}: must hold the magnitudes of its DoRA, got none for {name}. Load it again."
            )
    scales, assumed = layer_scales(opened, adapted, alpha)
    layers = {
        name: LayerLora(
            down=adapted[name]["down"].float(),
            up=adapted[name]["up"].float(),
            scale=scales[name],
            magnitude=adapted[name]["magnitude"].float().flatten() if "magnitude" in adapted[name] else None,
        )
        for name in linear
        if name in adapted
    }
    patches = _patches(path, read.parts, scales, dict(transformer.named_parameters()))
    return LoraWeights(
        source=path, layers=layers, patches=patches, others=read.others, assumed=frozenset(assumed)
    )


def merge_into(transformer: nn.Module, lora: LoraWeights) -> None:
    """Adds a LoRA to the parameters of a plain transformer, in place; sums are made in fp32 and rounded to
    the parameter's type.

    Weights must be whole: not partitioned by ZeRO-3.
    """
    for name in lora.parameters():
        parameter = transformer.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(lora.applied(name, parameter))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Tensors by module in diffusers' names and part; counts of what is of other models."""

    parts: dict[str, dict[str, Tensor]]
    others: dict[str, int]


def _read_parts(
    opened: OpenedLora, transformer: nn.Module, family: Family | type[Family], *, allow_unknown: bool
) -> _Read:
    """Returns the tensors of the transformer by module and part."""
    known = names_in_files(_modules(transformer), family.published)
    model = type(transformer).__name__
    others = Counter(other for key in opened.tensors if (other := other_model(key)) is not None)
    own = [key for key in opened.tensors if other_model(key) is None]
    require_lora(opened.path, own)
    meant = {key: parsed for key in own if (parsed := parse_key(key)) is not None}
    names = {key: known[parsed.module] for key, parsed in meant.items() if parsed.module in known}
    unknown = [meant[key].module if key in meant else key for key in own if key not in names]
    if unknown and not (allow_unknown and names):
        raise CheckpointError(_unknown(opened.path, unknown, known, model))
    if not names:
        got = ", ".join(f"{count} tensors of {other}" for other, count in others.items()) or "no tensors"
        raise CheckpointError(
            f"{opened.path}: must adapt layers of {model}, got {got}. Load it with the tool that wrote it."
        )
    parts: dict[str, dict[str, Tensor]] = {}
    twice = []
    for key, name in names.items():
        if meant[key].part in parts.setdefault(name, {}):
            twice.append(key)
        parts[name][meant[key].part] = opened.tensors[key]
    adapters = {meant[key].adapter for key in names if meant[key].part not in ("alpha", "diff", "diff_b")}
    if len(adapters) > 1:
        raise CheckpointError(
            f"{opened.path}: must hold one adapter, got {', '.join(sorted(map(repr, adapters)))}. Save one "
            "of them alone."
        )
    if twice:
        raise CheckpointError(
            f"{opened.path}: must name every tensor once, got a second one in {listed(twice)}. Keep one of "
            "them."
        )
    if unknown:
        others["nothing that is known"] = len(unknown)
    return _Read(parts=parts, others=dict(others))


def _modules(transformer: nn.Module) -> dict[str, str]:
    """Returns the modules with a weight, and parameters that stand alone, each with its parameter's name."""
    names = [name for name, _ in transformer.named_parameters() if not name.endswith(".bias")]
    return {name.removesuffix(".weight"): name for name in names}


def _unknown(path: Path, names: list[str], known: Mapping[str, str], model: str) -> str:
    """Returns what to say of keys that mean nothing here: what they are, where that can be seen."""
    shown = listed(sorted(set(names)))
    if any(is_image_input(name) for name in names):
        return (
            f"{path}: must adapt layers of {model}, got those of an image-to-video model ({shown}), and "
            "this one has no image inputs. Take the image-to-video model as the base."
        )
    beyond = [name for name in names if _FIRST_BLOCK.sub(r"\g<1>0\g<3>", name, count=1) in known]
    if beyond:
        return (
            f"{path}: must adapt layers of {model}, got blocks that this one has not ({listed(beyond)}). It "
            "is of a larger variant: take that as the base."
        )
    return (
        f"{path}: must hold keys of LoRA (A and B, or down and up, alpha, differences) for layers of "
        f"{model}, by the names of diffusers or of the publication, got {shown}. They are of "
        "another model, or their writer is not known here; --allow-unknown of `convert` leaves them out if "
        "others are known."
    )


def _require_fitting(path: Path, name: str, parts: Mapping[str, Tensor], module: nn.Linear | None) -> None:
    if module is None:
        raise CheckpointError(
            f"{path}: must adapt Linear layers, got {name}, which is none. Merge it with its own tool."
        )
    if not {"down", "up"} <= parts.keys():
        raise CheckpointError(
            f"{path}: must hold A and B of {name}, got {' and '.join(sorted(parts))} alone. Load it again."
        )
    down, up = list(parts["down"].shape), list(parts["up"].shape)
    rank = down[0] if down else 0
    if rank < 1 or (down, up) != ([rank, module.in_features], [module.out_features, rank]):
        raise CheckpointError(
            f"{path}: A and B of {name} must be [rank, {module.in_features}] and [{module.out_features}, "
            f"rank], got {down} and {up}. It is of another width or variant: take that as the base."
        )
    if "magnitude" in parts and parts["magnitude"].numel() != module.out_features:
        raise CheckpointError(
            f"{path}: the magnitudes of {name} must be {module.out_features}, got "
            f"{list(parts['magnitude'].shape)}. Load it again."
        )
    for part, value in parts.items():
        is_number = value.is_floating_point() or part == "alpha"
        if not is_number or not bool(value.float().isfinite().all()):
            raise CheckpointError(
                f"{path}: must hold finite floating-point numbers, got others for {name}. Load it again."
            )


def _patches(
    path: Path,
    read: Mapping[str, Mapping[str, Tensor]],
    scales: Mapping[str, float],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """Returns the differences of whole parameters, with what B's side adds to biases."""
    patches = {}
    for name, parts in read.items():
        weight = name if name in parameters else f"{name}.weight"
        found = {
            weight: parts.get("diff"),
            f"{name}.bias": parts.get("diff_b"),
        }
        if "bias" in parts and name in scales:
            found[f"{name}.bias"] = scales[name] * parts["bias"].float()
        if name not in scales and not parts.keys() & {"diff", "diff_b"}:
            raise CheckpointError(
                f"{path}: must hold A and B of {name}, got {' and '.join(sorted(parts))} alone. Load it "
                "again."
            )
        for parameter, difference in found.items():
            if difference is None:
                continue
            own = parameters.get(parameter)
            if (
                own is None
                or own.numel() != difference.numel()
                or not bool(difference.float().isfinite().all())
            ):
                shape = "none" if own is None else str(list(own.shape))
                raise CheckpointError(
                    f"{path}: the difference of {parameter} must be finite and of its shape {shape}, got "
                    f"{list(difference.shape)}. It is of another variant: take that as the base."
                )
            patches[parameter] = difference.float().reshape(own.shape)
    return patches
