"""Strict reading of DeepSpeed settings: every shipped file, one pass and one fail for every rule, and the
merge with the YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.config.deepspeed import deepspeed_dictionary, parse_deepspeed_settings
from aiprod_ds.errors import ConfigError

FILES = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
ZERO_1 = {"zero_optimization": {"stage": 1}}


def _problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_deepspeed_settings(values, "ds.json")
    return caught.value.problems


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_shipped_file_says_what_its_name_says(path: Path) -> None:
    settings = parse_deepspeed_settings(path, path.name)
    stage, precision = path.stem.split("_")[:2]
    assert f"zero{settings.zero_stage}" == stage
    assert settings.precision == precision
    assert settings.optimizer_offload == path.stem.endswith("offload")
    assert settings.activation_checkpointing == ("v100" in path.stem)


def test_all_fifteen_files_ship() -> None:
    assert len(FILES) == 15


def test_defaults_are_fp32_at_stage_0() -> None:
    settings = parse_deepspeed_settings({}, "ds.json")
    assert (settings.zero_stage, settings.precision, settings.loss_scale) == (0, "fp32", None)


def test_the_fp16_section_is_typed() -> None:
    settings = parse_deepspeed_settings(
        ZERO_1 | {"fp16": {"enabled": True, "initial_scale_power": 12}}, "ds.json"
    )
    assert settings.loss_scale is not None
    assert (settings.loss_scale.initial_scale_power, settings.loss_scale.hysteresis) == (12, 2)


def test_bucket_sizes_may_be_written_as_powers_of_ten() -> None:
    settings = parse_deepspeed_settings(
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}, "ds.json"
    )
    bucket = settings.dictionary["zero_optimization"]["reduce_bucket_size"]
    assert bucket == 500_000_000
    assert isinstance(bucket, int)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"gradient_cliping": 1.0}, "ds.json: gradient_cliping: unknown key, got 1.0."),
    ({"zero_optimisation": {}}, "Did you mean zero_optimization?"),
    (
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        "zero_optimization.overlap_com: unknown key, got True. Did you mean overlap_comm",
    ),
    ({"train_batch_size": 8}, "train_batch_size: belongs to the phases"),
    ({"gradient_clipping": 1.0}, "belongs to the training configuration (optimizer.gradient_clip_norm)"),
    ({"optimizer": {}}, "belongs to the training configuration (optimizer)"),
    ({"scheduler": {}}, "scheduler: belongs to the phases"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast: is refused"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be one of 0, 1, 2, 3, got 4."),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be one of"),
    ({"zero_optimization": 2}, "zero_optimization: must be an object, got 2."),
    (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 0.5}},
        "must be a whole number of at least 1, got 0.5.",
    ),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": float("inf")}}, "must be a whole number"),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "must be a whole number"),
    (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients: must be false",
    ),
    (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}},
        "has no effect below stage 3, got stage 2.",
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "has no effect below stage 1, got stage 0.",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        "must be one of 'cpu', 'none', got 'nvme'.",
    ),
    ({"fp16": {"enabled": True}}, "must be at least 1 with fp16, got 0"),
    (
        ZERO_1 | {"fp16": {"enabled": True, "min_loss_scale": 0.25}},
        "fp16.min_loss_scale: must be a whole number of at least 1",
    ),
    (
        ZERO_1 | {"fp16": {"enabled": True, "loss_scale": -1}},
        "fp16.loss_scale: must be 0 (dynamic) or a positive number",
    ),
    (
        ZERO_1 | {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "fp16.enabled: must not be true together",
    ),
    ({"bf16": {"enabled": "true"}}, "bf16.enabled: must be true or false, got 'true'."),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "must equal the precision bf16 at ZeRO stage 0",
    ),
    (
        ZERO_1 | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "must not be fp32 with bf16 at ZeRO stage 1",
    ),
    (
        {"activation_checkpointing": {"enabled": True, "cpu_checkpointing": True}},
        "activation_checkpointing.cpu_checkpointing: unknown",
    ),
    (
        {"communication_data_type": "int8"},
        "communication_data_type: must be one of 'fp32', 'bf16', 'fp16', got 'int8'.",
    ),
    (
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": "Block"}}},
        "leaf_module.classes: must be a list of names",
    ),
]


@pytest.mark.parametrize(("values", "problem"), BROKEN)
def test_a_broken_rule_is_named(values: dict[str, Any], problem: str) -> None:
    problems = _problems(values)
    assert len(problems) == 1
    assert problem in problems[0]


def test_all_problems_come_at_once() -> None:
    assert (
        len(_problems({"train_batch_size": 8, "nonsense": 1, "zero_optimization": {"stage": 9, "more": 1}}))
        == 4
    )


def test_a_duplicate_key_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true, "enabled": false}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="enabled: must stand once in its section, got it twice"):
        parse_deepspeed_settings(path, "ds.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "must be JSON"), ("[]", "must be a JSON object, got list")]
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        parse_deepspeed_settings(path, "ds.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file, got No such file"):
        parse_deepspeed_settings(tmp_path / "none.json", "none.json")


def test_the_merge_solves_the_batch_and_drops_what_the_trainer_applies() -> None:
    settings = parse_deepspeed_settings(ZERO_1 | {"activation_checkpointing": {"enabled": True}}, "ds.json")
    merged = deepspeed_dictionary(
        settings, micro_batch_size=3, accumulation=4, world_size=2, gradient_clip_norm=0.5
    )
    assert merged == {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }


def test_no_clipping_is_deepspeeds_zero_and_the_settings_are_not_shared() -> None:
    settings = parse_deepspeed_settings(ZERO_1, "ds.json")
    merged = deepspeed_dictionary(
        settings, micro_batch_size=1, accumulation=1, world_size=1, gradient_clip_norm=None
    )
    merged["zero_optimization"]["stage"] = 3
    assert merged["gradient_clipping"] == 0.0
    assert settings.dictionary["zero_optimization"] == {"stage": 1}
