"""The DeepSpeed settings of a run: strict reading of `ds_configs/*.json` and the one place where they are
merged with the YAML.

Owns what may stand in such a file (an allow-list: DeepSpeed itself silently ignores unknown top-level keys)
and the combinations that DeepSpeed 0.19.8 gets wrong. Imports neither torch nor deepspeed, so `check` and
`plan` run anywhere. The engines read the typed settings; only `DeepSpeedEngine` asks for the merged
dictionary.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiprod_ds.config.merge import places_of
from aiprod_ds.config.run import RunConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import read_text
from aiprod_ds.shipped import lookup

Precision = Literal["fp32", "bf16", "fp16"]
Check = Callable[[object], object]  # returns the value to keep or raises ValueError with the rule
_NEVER_PRINT = 10**9
_STAGE_3 = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleSettings:
    """The `fp16` section, with DeepSpeed's names and defaults.

    Attributes:
        loss_scale: A fixed scale, or 0 for the dynamic one that the other fields describe.
        initial_scale_power: The dynamic scale starts at 2 to this power.
        loss_scale_window: Updates without overflow before the scale doubles.
        hysteresis: Overflows that are tolerated before the scale halves.
        consecutive_hysteresis: Whether every update without overflow restores the tolerance.
        min_loss_scale: The scale never falls below this.
    """

    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedSettings:
    """What the engines read of a DeepSpeed settings file.

    Attributes:
        zero_stage: 0 to 3.
        precision: Type of weights and activations in forward and backward; masters and moments are always
            fp32.
        loss_scale: The fp16 section; None in other precisions.
        activation_checkpointing: Whether the trainer applies torch's non-reentrant checkpointing to the
            model.
        optimizer_offload: Whether master weights and moments live in host memory.
        buffer_dtype: Type to which the module's floating-point buffers are cast; None leaves them as they
            are.
        dictionary: The file without what the trainer applies itself; valid DeepSpeed configuration except for
            the batch.
    """

    zero_stage: int
    precision: Precision
    loss_scale: LossScaleSettings | None
    activation_checkpointing: bool
    optimizer_offload: bool
    buffer_dtype: Precision | None
    dictionary: Mapping[str, Any] = field(repr=False)

    @property
    def gradient_precision(self) -> Precision:
        """Type in which the gradients of an update are summed."""
        found: Precision = self.dictionary.get("data_types", {}).get("grad_accum_dtype", self.precision)
        return found

    def zero_setting(self, key: str, *, default: float) -> float:
        """Returns a number of the section `zero_optimization`."""
        return float(self.dictionary.get("zero_optimization", {}).get(key, default))


def read_settings(config: RunConfig, *, source: str) -> DeepSpeedSettings:
    """Returns the engine settings that `engine.deepspeed_config` names: a path, relative to the working
    folder, the folder of the file that says it, of the configuration, or one above them; or the name of
    shipped ones.

    Raises:
        ConfigError: If the file is missing or breaks a rule.
    """
    given = config.engine.deepspeed_config
    if not isinstance(given, str):
        return parse_deepspeed_settings(given, where=f"{source}: engine.deepspeed_config")
    files = places_of(given, ("engine", "deepspeed_config"), source)
    found = lookup.settings(given, lookup.searched(*files))
    if found is None:
        raise ConfigError(
            f"{source}: engine.deepspeed_config: must name a file or shipped settings, got {given!r}, "
            f"which is not in {lookup.in_words(*files)}. Check the path, or take one of "
            f"{', '.join(lookup.shipped_settings())}."
        )
    return parse_deepspeed_settings(found, where=given)


def parse_deepspeed_settings(source: Mapping[str, Any] | Path, where: str) -> DeepSpeedSettings:
    """Reads DeepSpeed settings from a mapping or a JSON file.

    Args:
        source: The settings, or the file that holds them.
        where: How messages name the source, e.g. `ds_configs/zero1_bf16.json`.

    Raises:
        ConfigError: With every problem: unknown or misplaced keys, wrong types, duplicate keys, unusable
            combinations.
    """
    problems: list[str] = []
    values = _read_json(source, where, problems) if isinstance(source, Path) else source
    checked = _check_top_level(values, where, problems)
    if not problems:
        _check_combinations(checked, where, problems)
    if problems:
        raise ConfigError(problems)
    return _settings(checked)


def with_parallel(
    settings: DeepSpeedSettings, *, zero_stage: int, is_offloaded: bool, where: str
) -> DeepSpeedSettings:
    """Returns `settings` with another ZeRO stage and with or without an offloaded optimizer; precision and
    buckets stay.

    16-bit gradients are summed as in the shipped files: in bf16 at stage 1, in fp32 otherwise.
    """
    values = {
        **copy.deepcopy(dict(settings.dictionary)),
        "activation_checkpointing": {"enabled": settings.activation_checkpointing},
    }
    zero = {
        key: value
        for key, value in values.get("zero_optimization", {}).items()
        if key not in {"stage", "offload_optimizer", "overlap_comm"}
        and (zero_stage == _STAGE_3 or not _is_stage_3_key(key))
    }
    zero |= {"stage": zero_stage, "overlap_comm": zero_stage == _STAGE_3}
    if is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    types = {key: value for key, value in values.get("data_types", {}).items() if key != "grad_accum_dtype"}
    if settings.precision == "fp16" or (settings.precision == "bf16" and zero_stage > 1):
        types["grad_accum_dtype"] = "fp32"
    values |= {"zero_optimization": zero, "data_types": types}
    return parse_deepspeed_settings(values, where=where)


def deepspeed_dictionary(
    settings: DeepSpeedSettings,
    *,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    gradient_clip_norm: float | None,
) -> dict[str, Any]:
    """Returns the whole configuration for `deepspeed.initialize`: the only place where file and YAML meet."""
    return {
        **copy.deepcopy(dict(settings.dictionary)),
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clip_norm or 0.0,
        "steps_per_print": _NEVER_PRINT,
        # By default it waits for the device twice in every micro-batch (utils/timer.py:237, 255).
        "timers": {"throughput": {"enabled": False}},
    }


def _read_json(path: Path, where: str, problems: list[str]) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                problems.append(
                    f"{where}: {key}: must stand once in its section, got it twice. Remove one of the two."
                )
            seen[key] = value
        return seen

    try:
        values = json.loads(read_text(path), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(
            f"{where}: must be a readable file, got {error.strerror}. Correct engine.deepspeed_config."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: must be JSON, got an error: {error}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            [*problems, f"{where}: must be a JSON object, got {type(values).__name__}. Use braces."]
        )
    return values


def _check_top_level(values: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key in _OWNED_ELSEWHERE:
            problems.append(
                f"{where}: {key}: belongs to {_OWNED_ELSEWHERE[key]}, got {value!r} here. Move it there."
            )
        elif key in _REFUSED:
            problems.append(f"{where}: {key}: {_REFUSED[key]}")
        else:
            known[key] = value
    return _check_section(known, _TOP_LEVEL, where, "", problems)


def _check_section(
    values: object, schema: Mapping[str, Any], where: str, prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Returns the valid part of `values`; a nested mapping in `schema` describes a nested section."""
    if not isinstance(values, Mapping):
        problems.append(
            f"{where}: {prefix.rstrip('.')}: must be an object, got {values!r}. Put its settings in braces."
        )
        return {}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        rule = schema.get(key)
        if rule is None:
            problems.append(
                f"{where}: {prefix}{key}: unknown key, got {value!r}. {_nearest(str(key), schema)}"
            )
        elif isinstance(rule, Mapping):
            checked[key] = _check_section(value, rule, where, f"{prefix}{key}.", problems)
        else:
            try:
                checked[key] = rule(value)
            except ValueError as error:
                problems.append(f"{where}: {prefix}{key}: must be {error}, got {value!r}. Correct the value.")
    return checked


def _nearest(key: str, schema: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(schema), n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Valid keys: {', '.join(sorted(schema))}."


def _check_combinations(values: Mapping[str, Any], where: str, problems: list[str]) -> None:
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    fp16 = values.get("fp16", {}).get("enabled", False)
    bf16 = values.get("bf16", {}).get("enabled", False)
    if fp16 and bf16:
        problems.append(
            f"{where}: fp16.enabled: must not be true together with bf16.enabled, got both. Disable one."
        )
    if fp16 and stage == 0:
        problems.append(
            f"{where}: zero_optimization.stage: must be at least 1 with fp16, got 0: DeepSpeed 0.19.8 "
            "divides gradients by a loss"
            " scale that it never multiplied in. Use stage 1, which gives the same numbers."
        )
    _check_stage_keys(zero, stage, where, problems)
    accumulation_dtype = values.get("data_types", {}).get("grad_accum_dtype")
    precision = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    if stage == 0 and accumulation_dtype not in (None, precision):
        problems.append(
            f"{where}: data_types.grad_accum_dtype: must equal the precision {precision} at ZeRO stage 0, got"
            f" {accumulation_dtype!r}. Use stage 1 or remove the key."
        )
    if stage == 1 and precision == "bf16" and accumulation_dtype == "fp32":
        problems.append(
            f"{where}: data_types.grad_accum_dtype: must not be fp32 with bf16 at ZeRO stage 1, got 'fp32': "
            "DeepSpeed 0.19.8"
            " takes another optimizer with another checkpoint format there. Use stage 2 or remove the key."
        )


def _check_stage_keys(zero: Mapping[str, Any], stage: int, where: str, problems: list[str]) -> None:
    for key in zero:
        needed = _STAGE_3 if _is_stage_3_key(key) else 1
        if key != "stage" and stage < needed:
            problems.append(
                f"{where}: zero_optimization.{key}: has no effect below stage {needed}, got stage {stage}."
                " Remove it or raise the stage."
            )


def _is_stage_3_key(key: str) -> bool:
    return key.startswith("stage3_") or key in _STAGE_3_KEYS


def _settings(values: Mapping[str, Any]) -> DeepSpeedSettings:
    fp16 = dict(values.get("fp16", {}))
    is_fp16 = fp16.pop("enabled", False)
    precision: Precision = (
        "fp16" if is_fp16 else "bf16" if values.get("bf16", {}).get("enabled", False) else "fp32"
    )
    zero = values.get("zero_optimization", {})
    return DeepSpeedSettings(
        zero_stage=zero.get("stage", 0),
        precision=precision,
        loss_scale=LossScaleSettings(**fp16) if is_fp16 else None,
        activation_checkpointing=values.get("activation_checkpointing", {}).get("enabled", False),
        optimizer_offload=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
        buffer_dtype=values.get("data_types", {}).get("buffer_dtype"),
        # DeepSpeed's section acts only on models that call its checkpoint function; ours use torch's.
        dictionary={key: value for key, value in values.items() if key != "activation_checkpointing"},
    )


def _is_bool(value: object) -> bool:
    if value is True or value is False:
        return value
    raise ValueError("true or false")


def _only_false(value: object) -> bool:
    if value is False:
        return value
    raise ValueError("false, because DeepSpeed 0.19.8 then maps parameters to the master weights of others")


def _one_of(*choices: object) -> Check:
    def check(value: object) -> object:
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"one of {', '.join(repr(choice) for choice in choices)}")
        return value

    return check


def _count(minimum: int) -> Check:
    def check(value: object) -> object:
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
        if not whole or value < minimum:  # type: ignore[operator]  # `whole` makes it a number; bucket sizes are written 5e8
            raise ValueError(f"a whole number of at least {minimum}")
        return int(value)  # type: ignore[call-overload]

    return check


def _scale(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("0 (dynamic) or a positive number")
    return float(value)


def _names(value: object) -> object:
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(name, str) for name in value)
    ):
        raise ValueError("a list of names")
    return list(value)


_TOP_LEVEL: Mapping[str, Any] = {
    "zero_optimization": {
        "stage": _one_of(0, 1, 2, 3),
        "contiguous_gradients": _is_bool,
        "overlap_comm": _is_bool,
        "reduce_scatter": _is_bool,
        "reduce_bucket_size": _count(1),
        "allgather_partitions": _is_bool,
        "allgather_bucket_size": _count(1),
        "round_robin_gradients": _only_false,
        "offload_optimizer": {"device": _one_of("cpu", "none"), "pin_memory": _is_bool},
        "sub_group_size": _count(1),
        "memory_efficient_linear": _is_bool,
        "leaf_module": {"classes": _names, "names": _names, "name_suffixes": _names},
        "stage3_prefetch_bucket_size": _count(0),
        "stage3_param_persistence_threshold": _count(0),
        "stage3_model_persistence_threshold": _count(0),
        "stage3_max_live_parameters": _count(0),
        "stage3_max_reuse_distance": _count(0),
        "stage3_module_granularity_threshold": _count(0),
    },
    "fp16": {
        "enabled": _is_bool,
        "loss_scale": _scale,
        "initial_scale_power": _count(0),
        "loss_scale_window": _count(1),
        "hysteresis": _count(1),
        "consecutive_hysteresis": _is_bool,
        "min_loss_scale": _count(1),
    },
    "bf16": {"enabled": _is_bool},
    "activation_checkpointing": {"enabled": _is_bool},
    "communication_data_type": _one_of("fp32", "bf16", "fp16"),
    "data_types": {
        "grad_accum_dtype": _one_of("fp32", "bf16", "fp16"),
        "buffer_dtype": _one_of("fp32", "bf16", "fp16"),
    },
    "wall_clock_breakdown": _is_bool,
}
_STAGE_3_KEYS = frozenset({"sub_group_size", "memory_efficient_linear", "leaf_module"})
_PHASES = "the phases of the training configuration (global_batch_size, micro_batch_size)"
_OWNED_ELSEWHERE: Mapping[str, str] = {
    "train_batch_size": _PHASES,
    "train_micro_batch_size_per_gpu": _PHASES,
    "gradient_accumulation_steps": _PHASES,
    "gradient_clipping": "the training configuration (optimizer.gradient_clip_norm)",
    "optimizer": "the training configuration (optimizer)",
    "scheduler": "the phases of the training configuration (learning_rate)",
    "steps_per_print": "the training configuration (report.flush_updates)",
    "wandb": "the training configuration (report.wandb)",
    "tensorboard": "the training configuration (report.tensorboard)",
}
_REFUSED: Mapping[str, str] = {
    "torch_autocast": "is refused: DeepSpeed 0.19.8 clips the scaled gradient with it and leaves a "
    "process-wide flag set, got it"
    " configured. Use the fp16 or the bf16 section.",
    "amp": "was removed from DeepSpeed, got it configured. Use the fp16 or the bf16 section.",
}
