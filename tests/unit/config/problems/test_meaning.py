"""What people type from other trainers, in the section where they would, is answered with the right key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.config.problems.aliases import ALIASES, INSTEAD
from aiprod_ds.config.problems.gather import examine
from aiprod_ds.config.problems.meaning import meaning_of
from aiprod_ds.config.problems.places import Schema, places
from aiprod_ds.config.sample import SampleConfig
from aiprod_ds.config.trainers import TRAINERS
from aiprod_ds.config.video_vae import VAETrainerConfig

SCHEMAS: list[Schema] = [*(named.config_class for named in TRAINERS.values()), EncodeConfig, SampleConfig]
PHASE_0: tuple[str | int, ...] = ("curriculum", "phases", 0)


def in_each_phase(key: str) -> str:
    return f"Write `{key}` in each phase of `curriculum.phases`."


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("lr",), in_each_phase("learning_rate")),
        (("LR",), in_each_phase("learning_rate")),
        (("learning_rate",), in_each_phase("learning_rate")),
        (("optimizer", "lr"), in_each_phase("learning_rate")),
        (("optimizer", "learning_rate"), in_each_phase("learning_rate")),
        ((*PHASE_0, "lr"), "Did you mean 'learning_rate'?"),
        (("steps",), in_each_phase("updates")),
        (("max_steps",), in_each_phase("updates")),
        (("max-train-steps",), in_each_phase("updates")),
        ((*PHASE_0, "max_steps"), "Did you mean 'updates'?"),
        (("epochs",), in_each_phase("epochs")),
        (("num_epochs",), in_each_phase("epochs")),
        (("batch_size",), in_each_phase("micro_batch_size")),
        (("data", "batch_size"), in_each_phase("micro_batch_size")),
        (("train_micro_batch_size_per_gpu",), in_each_phase("micro_batch_size")),
        ((*PHASE_0, "grad_accum"), "Did you mean 'accumulation'?"),
        (("gradient_accumulation_steps",), in_each_phase("accumulation")),
        (("warmup",), in_each_phase("warmup_updates")),
        (("lr_warmup_steps",), in_each_phase("warmup_updates")),
        (("model", "training_mode"), "Write `training_mode` at the top level."),
        (("lora_rank",), "Write `rank` under `lora`."),
        (("rank",), "Write `rank` under `lora`."),
        (("lora", "lora_rank"), "Did you mean 'rank'?"),
        (("lora", "target_modules"), "Did you mean 'targets'?"),
        (("network_dim",), "Write `rank` under `lora`."),
        (("max_grad_norm",), "Write `gradient_clip_norm` under `optimizer`."),
        (("weight_decay",), "Write `weight_decay` under `optimizer`."),
        (("save_total_limit",), "Write `keep_last` under `checkpoint`."),
        (("num_frames",), "Write `frames` under `duration` in each phase of `curriculum.phases`."),
        ((*PHASE_0, "fps"), "Write `frame_rate_hz` under `duration` in each phase of `curriculum.phases`."),
        (("dataset_path",), "Write `train` under `data`."),
        (("pretrained_model_name_or_path",), "Write `pretrained` under `model`."),
        (("mixed_precision",), INSTEAD["mixed_precision"]),
        (("optimizer", "type"), INSTEAD["optimizer.type"]),
        (("epsilom",), None),
        (("optimizer", "epsilom"), "Did you mean 'epsilon'?"),
        (("qqqq",), None),
    ],
)
def test_names_of_other_trainers(path: tuple[str | int, ...], words: str | None) -> None:
    meaning = meaning_of(DiffusionTrainerConfig, path, 1)
    assert (None if meaning is None else meaning.words) == words


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_unknown_somewhere_and_leads_to_a_key(name: str) -> None:
    section, _, typed = name.rpartition(".")
    every = {place for schema in SCHEMAS for place in places(schema)}
    assert set(ALIASES[name]) <= every
    answered = [schema for schema in SCHEMAS if set(ALIASES[name]) & set(places(schema))]
    for schema in answered:
        found = meaning_of(schema, (section, typed) if section else (typed,), 1)
        assert found is not None
        assert found.place is not None
        # A name that the schema has at the top level is no alias there.
        assert found.place in places(schema)


def test_names_without_a_key_are_no_keys_and_name_none_that_is_not_there() -> None:
    keys = {name for schema in SCHEMAS[:3] for name in schema.model_fields}
    known = {part for schema in SCHEMAS for place in places(schema) for part in re.split(r"[.\[\]]+", place)}
    assert meaning_of(EncodeConfig, ("fp16",), 1) is None
    for name, words in INSTEAD.items():
        assert name not in keys or "." in name, name
        assert name not in ALIASES
        for quoted in re.findall(r"`([\w.]+)(?:: [^`]*)?:?`", words):
            is_known = set(quoted.split(".")) <= known or quoted in {"train", "launch", "plan"}
            assert is_known or quoted.startswith("zero"), (name, quoted)


def whole(**values: Any) -> dict[str, Any]:
    phase = {
        "name": "a",
        "resolution": "64x64",
        "duration": {"frames": 9},
        "global_batch_size": 4,
        "updates": 9,
    }
    return {
        "output_dir": "x",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": [{**phase, "learning_rate": 1e-4}, {**phase, "name": "b"}]},
    } | values


def told(values: dict[str, Any]) -> list[str]:
    return [problem.told("f") for problem in examine(VAETrainerConfig, values).problems]


def test_a_value_under_another_name_is_not_missing_under_its_own() -> None:
    assert told(whole(lr=1e-4)) == [
        f"f: lr: is not a known key, got 0.0001. {in_each_phase('learning_rate')}"
    ]


def test_a_value_under_another_name_is_judged_as_what_it_is() -> None:
    assert told(whole(lr="fast", max_steps=3)) == [
        f"f: lr: is not a known key, got 'fast'. {in_each_phase('learning_rate')}",
        f"f: max_steps: is not a known key, got 3. {in_each_phase('updates')}",
        "f: lr: must be a number, got 'fast'. Correct the value.",
    ]


def test_the_keys_of_an_unknown_section_are_answered_one_by_one() -> None:
    section = {"learning_rate": 1e-4, "fp16": True, "qqqq": 1}
    (line,) = told(whole(hyperparameters=section))
    assert line == (
        f"f: hyperparameters: is not a known key, got {section!r}. Of its keys, learning_rate: "
        f"{in_each_phase('learning_rate')} Of its keys, fp16: {INSTEAD['fp16']}"
    )


def test_a_value_is_read_in_the_entry_in_which_it_was_typed() -> None:
    values = whole()
    values["curriculum"]["phases"][1] |= {"lr": -1.0, "warmup": 20}
    assert told(values) == [
        "f: curriculum.phases[1].lr: is not a known key, got -1.0. Did you mean 'learning_rate'?",
        "f: curriculum.phases[1].warmup: is not a known key, got 20. Did you mean 'warmup_updates'?",
        "f: curriculum.phases[1].lr: must be > 0.0, got -1.0. Use a larger value.",
        "f: curriculum.phases[1].updates: must exceed warmup_updates (20), got 9. Raise updates or lower warmup_updates.",  # noqa: E501
    ]
