# ruff: noqa: E501  messages stand on one line, as users see them
"""One pass tells all: faults of every kind hide no other, follow from no other, and name the file to edit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.config.load import load_config, load_encode_config, read_config
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.phase import PhaseConfig, PhaseDuration, PhaseResolution
from aiprod_ds.config.problems.gather import examine
from aiprod_ds.config.problems.places import places
from aiprod_ds.config.problems.rules import broken_rules, rule
from aiprod_ds.config.problems.stand_ins import stand_ins
from aiprod_ds.config.schema import StrictModel
from aiprod_ds.config.trainers import TRAINERS
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.errors import ConfigError

PHASE = "name: a, resolution: 64x64, duration: {frames: 9}, global_batch_size: 4, learning_rate: 1e-4"
WHOLE = f"""\
output_dir: runs/x
model: {{source: AutoencoderKLLTXVideo}}
data: {{train: samples}}
curriculum:
  phases:
    - {{{PHASE}, updates: 10}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(WHOLE)
    return tmp_path


def problems(text: str, *overrides: str) -> list[str]:
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("c.yaml"), overrides)
    return list(caught.value.problems)


SEVEN = f"""\
base: base.yaml
seed: 1
seed: 2
chekpoint: {{every_updates: 7}}
optimizer: {{epsilon: -1}}
data: {{validation: held_out, holdout_fraction: 0.2}}
checkpoint: {{keep_every_updates: 500}}
curriculum:
  phases:
    - {{{PHASE}, updates: 10, warmup_updates: 20}}
    - {{{PHASE}, updates: ten}}
"""


def test_seven_faults_of_all_kinds_are_seven_lines() -> None:
    """A key twice, an unknown key, a bad value and a bad type, rules in a section, in a phase and between
    phases: each of them hid those behind it."""
    assert problems(SEVEN) == [
        "c.yaml: line 3: seed: must be given once, got it on line 2 too. Remove one of the two.",
        "c.yaml: curriculum.phases[1].updates: must be an integer, got 'ten'. Correct the value.",
        "c.yaml: optimizer.epsilon: must be > 0.0, got -1. Use a larger value.",
        "c.yaml: chekpoint: is not a known key, got {'every_updates': 7}. Did you mean 'checkpoint'?",
        "c.yaml: data.holdout_fraction: has no effect when validation is set, got 0.2. Remove one of the two.",
        "c.yaml: curriculum.phases[0].updates: must exceed warmup_updates (20), got 10. Raise updates or lower warmup_updates.",
        "c.yaml: curriculum.phases[1].name: must be unique, got 'a' twice. Rename one of them.",
        "c.yaml: checkpoint.keep_every_updates: has no effect without keep_last, which null keeps everything, got a value. Set keep_last or remove it.",
    ]


def test_mending_one_line_after_the_other_tells_nothing_new() -> None:
    told = set(problems(SEVEN))
    for broken, mended in (
        ("seed: 2\n", ""),
        ("chekpoint: {every_updates: 7}\n", ""),
        ("epsilon: -1", "epsilon: 1e-8"),
        (", holdout_fraction: 0.2", ""),
        ("updates: ten", "updates: 10"),
        ("warmup_updates: 20", "warmup_updates: 2"),
    ):
        assert broken in SEVEN
        assert set(problems(SEVEN.replace(broken, mended))) < told


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        # What a rule says of a value that is broken is not known, whichever side of it the value is on.
        ("updates: ten, warmup_updates: 500", ["updates: must be an integer"]),
        ("updates: 10, warmup_updates: 5x", ["warmup_updates: must be an integer"]),
        ("updates: 10, plateau: 3", ["plateau: must be a mapping"]),
        ("updates: 10, moments: dekay, moment_decay: 0.5", ["moments: must be 'keep', 'reset' or 'decay'"]),
        ("upd: 10", ["upd: is not a known key"]),
        ("updates: 10, schedule: konstant, final_learning_rate_ratio: 0.5", ["schedule: must be 'constant'"]),
        # What holds whatever is meant is told.
        ("updates: 10, epochs: x, min_updates: 50", ["epochs: must be an integer", "min_updates: must be at most updates (10), got 50"]),
        ("max_updates: 5, moment_decay: x, warmup_updates: 9", ["moment_decay: must be a number", "updates: one of updates", "max_updates: has no effect without", "max_updates: must exceed warmup_updates (9), got 5"]),
    ],
)  # fmt: skip
def test_a_broken_value_makes_up_no_problem_and_hides_none(phase: str, told: list[str]) -> None:
    text = f"base: base.yaml\ncurriculum:\n  phases:\n    - {{name: zero, {PHASE[9:]}, updates: 5}}\n    - {{{PHASE}, {phase}}}\n"
    found = problems(text)
    assert len(found) == len(told), found
    for line, begin in zip(found, told, strict=True):
        assert line.startswith(f"c.yaml: curriculum.phases[1].{begin}")


def test_a_value_that_yaml_refuses_is_told_once() -> None:
    assert problems("base: base.yaml\nseed: 017\noptimizer: {epsilon: !x 3}\nsed: 1\n") == [
        "c.yaml: line 2: an integer must not start with 0, got 017. Drop the zero, or quote it as text.",
        "c.yaml: line 3: must be a plain value, got the tag '!x'. Remove the tag.",
        "c.yaml: sed: is not a known key, got 1. Did you mean 'seed'?",
    ]


def test_a_refused_value_in_a_mapping_that_takes_anything_is_left_out_and_the_rest_judged() -> None:
    assert problems(
        "base: base.yaml\nmodel: {config: {a: 017}}\nseed: x\noptimizer: {betas: [!x 1, 0.5], epsilon: 017}\n"
    ) == [
        "c.yaml: line 2: an integer must not start with 0, got 017. Drop the zero, or quote it as text.",
        "c.yaml: line 4: must be a plain value, got the tag '!x'. Remove the tag.",
        "c.yaml: line 4: an integer must not start with 0, got 017. Drop the zero, or quote it as text.",
        "c.yaml: seed: must be an integer, got 'x'. Correct the value.",
    ]


def test_without_its_base_a_file_misses_nothing_and_the_rest_of_it_is_told() -> None:
    assert problems(
        "base: bas.yaml\nsed: 1\ndata: {random_flip: 3}\ncheckpoint: {keep_every_updates: 5}\n"
        f"curriculum: {{phases: [{{{PHASE}, updates: 1, warmup_updates: 5}}]}}\n"
    )[1:] == [
        "c.yaml: data.random_flip: must be true or false, got 3. Correct the value.",
        "c.yaml: sed: is not a known key, got 1. Did you mean 'seed'?",
        "c.yaml: curriculum.phases[0].updates: must exceed warmup_updates (5), got 1. Raise updates or lower warmup_updates.",
    ]


def test_faults_of_a_base_and_of_its_user_name_the_file_to_edit(folder: Path) -> None:
    (folder / "base.yaml").write_text(
        WHOLE.replace("source: AutoencoderKLLTXVideo", "pretrained: weights").replace(
            "updates: 10", "updates: 0"
        )
    )
    assert problems("base: base.yaml\nmodel: {config: {a: 1}}\noptimizer: {epsilon: x}\n", "seed=-1") == [
        "--set: seed: must be >= 0, got -1. Use a larger value.",
        "c.yaml: model.source: must be given, got nothing. Add `source:`.",
        "base.yaml: curriculum.phases[0].updates: must be >= 1, got 0. Use a larger value.",
        "c.yaml: optimizer.epsilon: must be a number, got 'x'. Correct the value.",
        "c.yaml: model.config: has no effect when pretrained is set, got both. Remove one of the two.",
    ]  # fmt: skip


def test_a_section_that_only_the_base_has_is_missing_in_the_users_file(folder: Path) -> None:
    (folder / "base.yaml").write_text(WHOLE.replace("data: {train: samples}\n", ""))
    assert problems("base: base.yaml\nseed: 1\n") == [
        "c.yaml: data: must be given, got nothing. Add `data:`."
    ]


def test_what_is_sound_can_be_used_though_the_rest_is_broken() -> None:
    Path("c.yaml").write_text("base: base.yaml\noptimizer: {epsilon: x}\nseed: 3\n")
    found = read_config(Path("c.yaml"))
    assert found.record is not None
    assert found.record.seed == 3
    assert found.is_sound("data", "model", "curriculum")
    assert not found.is_sound("data", "optimizer")
    with pytest.raises(ConfigError, match=r"optimizer\.epsilon"):
        found.sound()


def test_records_that_a_program_makes_tell_all_of_it_under_their_name() -> None:
    with pytest.raises(ConfigError) as caught:
        PhaseConfig(name="a b", lr=1e-4, max_steps=5, warmup_updates=9, duration=PhaseDuration(frames=9))  # type: ignore[call-arg]
    assert caught.value.problems == (
        "PhaseConfig: name: must match ^[A-Za-z0-9_-]+$, got 'a b'. Use only those characters.",
        "PhaseConfig: lr: is not a known key, got 0.0001. Did you mean 'learning_rate'?",
        "PhaseConfig: max_steps: is not a known key, got 5. Did you mean 'updates'?",
        "PhaseConfig: global_batch_size: this or micro_batch_size must be given, got neither. Set one of them.",
        "PhaseConfig: max_steps: must exceed warmup_updates (9), got 5. Raise updates or lower warmup_updates.",
    )
    with pytest.raises(ConfigError, match=r"^PhaseResolution: must be a mapping, got 5\.$|HEIGHTxWIDTH"):
        PhaseResolution.model_validate(5)


def test_records_inside_records_are_told_with_their_path() -> None:
    with pytest.raises(ConfigError) as caught:
        VAETrainerConfig(
            output_dir="",
            model=ModelConfig(source="AutoencoderKLLTXVideo"),
            data=VideoDataConfig(train="samples"),
            curriculum={"phases": ({"name": "a", "learning_rate": "x", "updates": 3},)},  # type: ignore[arg-type]
        )
    assert [line.split(":")[1].strip() for line in caught.value.problems] == [
        "output_dir",
        "curriculum.phases[0].learning_rate",
        "curriculum.phases[0].duration",
        "curriculum.phases[0].global_batch_size",
        "curriculum.phases[0].resolution",
    ]


class Inner(StrictModel):
    low: int = 0
    high: int = 1

    @rule
    def _ordered(self) -> Iterator[str]:
        if self.low > self.high:
            yield f"low: must be at most high ({self.high}), got {self.low}. Lower it."


class Outer(Inner):
    inner: Inner = Inner()

    @rule
    def _together(self) -> Iterator[str]:
        if self.low < self.inner.low:
            yield f"low: must be at least that of inner ({self.inner.low}), got {self.low}. Raise it."


def test_rules_of_base_classes_come_first_and_broken_ones_keep_no_other_from_being_asked() -> None:
    values = {"low": 2, "inner": {"low": 9, "high": 5}}
    with pytest.raises(ConfigError) as caught:
        Outer.model_validate(values)
    assert caught.value.problems == (
        "Outer: inner.low: must be at most high (5), got 9. Lower it.",
        "Outer: low: must be at most high (1), got 2. Lower it.",
        "Outer: low: must be at least that of inner (9), got 2. Raise it.",
    )
    assert list(broken_rules(Outer())) == []


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_place_of_a_schema_has_stand_ins_that_it_takes(trainer: str) -> None:
    """Else a fault at that place would hide the rules of the whole file."""
    schema = TRAINERS[trainer].config_class
    without: list[str] = []
    for place in places(schema):
        path = tuple(
            step for part in place.split(".") for step in ((part[:-2], 0) if part.endswith("[]") else (part,))
        )
        if not stand_ins(schema, path):
            without.append(place)
    assert len(places(schema)) > 100
    assert without == []


def test_a_junk_value_at_any_place_leaves_a_record_to_go_on_with() -> None:
    config = VAETrainerConfig(
        output_dir="x",
        model=ModelConfig(source="m"),
        data=VideoDataConfig(train="t"),
        curriculum=CurriculumConfig(),
    ).model_dump(mode="json")

    def junked(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        for key in values:
            here = (*path, key)
            inside = values[key]
            if isinstance(inside, dict) and inside:
                yield from junked(inside, here)
            values[key] = object()
            yield here, config
            values[key] = inside

    checked = 0
    for path, values in junked(config, ()):
        if path[:2] == ("model", "config"):
            continue  # takes anything
        found = examine(VAETrainerConfig, values)
        assert found.record is not None, path
        assert {problem.path for problem in found.problems} == {path}, found.problems
        checked += 1
    assert checked > 80


def test_an_encode_file_is_told_in_one_pass_too(folder: Path) -> None:
    (folder / "e.yaml").write_text(
        "data: {media: clips, max_failed_fraction: 3}\n"
        "video: {model: {source: X, pretrained: p, config: {a: 1}}, tiling: {tile: 64x64, overlap: 64}}\n"
        "shapes: [{resolution: 64x64, duration: {seconds: 2}, fps: 24}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_encode_config(Path("e.yaml"))
    assert caught.value.problems == (
        "e.yaml: data.max_failed_fraction: must be <= 1.0, got 3. Use a smaller value.",
        "e.yaml: shapes[0].fps: is not a known key, got 24. Write `frame_rate_hz` under `duration` in each entry of `shapes`.",
        "e.yaml: video.model.config: has no effect when pretrained is set, got both. Remove one of the two.",
        "e.yaml: video.tiling.overlap: must be below the tile's smaller side (64), got 64. Lower it.",
    )
