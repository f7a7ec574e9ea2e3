# ruff: noqa: E501  messages stand on one line, as users see them
"""Loading a configuration: bases, overrides, and every broken rule as one message with file, path, rule, value and fix."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiprod_ds.config.fingerprint import to_yaml
from aiprod_ds.config.load import load_config
from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.strict_yaml import read_yaml, write_yaml

BASE = """\
output_dir: runs/x
model:
  source: AutoencoderKLLTXVideo
  config: {latent_channels: 8, block_out_channels: [8, 16]}
data: {train: samples}
curriculum:
  phases:
    - {name: a, resolution: 64x64, duration: {frames: 8}, global_batch_size: 4, updates: 10, learning_rate: 1e-4}
    - {name: b, resolution: 64x96, duration: {frames: 16}, global_batch_size: 2, updates: 20, learning_rate: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # messages then name files without the temporary folder
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def load(text: str | bytes, *overrides: str, output_dir: str | None = None) -> VAETrainerConfig:
    path = Path("c.yaml")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides, output_dir)


def problems(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return list(caught.value.problems)


def test_loads_numbers_sizes_and_defaults(folder: Path) -> None:
    config = load_config(folder / "base.yaml")
    first, second = config.curriculum.phases
    assert first.learning_rate == 1e-4
    assert second.learning_rate == 1.0
    assert second.resolution is not None
    assert (second.resolution.height, second.resolution.width) == (64, 96)
    assert config.checkpoint.every_updates == 500


def test_resolved_yaml_loads_back_equal(folder: Path) -> None:
    config = load(
        "base: base.yaml\ndata: {validation: held_out}\nreport: {wandb: {mode: off, name: 1e-4}}\n".replace(
            "1e-4", "'1e-4'"
        )
    )
    assert load(to_yaml(config)) == config


def test_base_merges_mappings_replaces_lists_and_clears_with_an_empty_mapping(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mid.yaml").write_text(
        "base: ../base.yaml\nmodel: {config: {block_out_channels: [4]}}\nseed: 3\n"
    )
    config = load("base: sub/mid.yaml\noptimizer: {weight_decay: 0.5}\n")
    assert config.model.config == {"latent_channels": 8, "block_out_channels": [4]}
    assert (config.seed, config.optimizer.weight_decay, config.optimizer.epsilon) == (3, 0.5, 1e-8)
    assert load("base: base.yaml\nmodel: {config: {}, pretrained: weights}\n").model.pretrained == "weights"


def test_overrides_reach_into_lists_and_later_ones_win(folder: Path) -> None:
    config = load(
        "base: base.yaml\n",
        "curriculum.phases[1].updates=5",
        "seed=1",
        "seed=2",
        "optimizer.betas=[0.5, 0.6]",
        "report.wandb.name=a=b",
        "evaluation.max_clips=3",
        output_dir="out",
    )
    assert config.curriculum.phases[1].updates == 5
    assert (config.seed, config.optimizer.betas, config.output_dir) == (2, (0.5, 0.6), "out")
    assert (config.report.wandb.name, config.evaluation.max_clips) == ("a=b", 3)


def test_preset_gives_the_three_default_phases_and_takes_overrides(folder: Path) -> None:
    text = "output_dir: x\nmodel: {source: M}\ndata: {train: s}\ncurriculum: {preset: default, frames_policy: strict}\n"
    config = load(text, "curriculum.phases[2].updates=700")
    rows = [
        (p.name, p.resolution.height, p.duration.frames, p.micro_batch_size, p.learning_rate, p.updates, p.warmup_updates, p.accumulation)
        for p in config.curriculum.phases
        if p.resolution and p.duration
    ]  # fmt: skip
    assert rows == [
        ("low", 256, 8, 16, 1e-4, 50_000, 1_000, 1),
        ("medium", 512, 16, 8, 5e-5, 100_000, 500, 2),
        ("high", 1024, 49, 4, 2e-5, 700, 500, 4),
    ]
    assert config.curriculum.frames_policy == "strict"


def test_every_problem_at_once_each_with_its_file_path_and_fix(folder: Path) -> None:
    text = """\
base: base.yaml
trainer: vidoe_vae
sed: 1
optimizer: {weight_decay: "0.1", epsilon: -1}
engine: {deepspeed_config: 7}
loss: {perceptual: {mode: lpip}}
checkpoint: 5
data: {train: "", random_flip: 1}
curriculum:
  phases:
    - {name: a, resolution: 64, duration: {frames: 8}, updates: 10.5, learning_rate: yes, warmup_update: 2}
    - {name: "b c", resolution: 64x64, duration: {frame: 8}, updates: 10, learning_rate: .inf}
"""
    assert problems(text, "curriculum.phases[9].updates=1", "model.source=3") == [
        "--set: curriculum.phases[9].updates: curriculum.phases must have entry [9], got 2 counted from 0. Lower the index.",
        "c.yaml: trainer: must be one of ['audio_vae', 'diffusion', 'video_vae'], got 'vidoe_vae'. Did you mean 'video_vae'?",
        '--set: model.source: must be text, got 3. Quote it: "3".',
        "c.yaml: data.train: must not be empty, got ''. Fill it in.",
        "c.yaml: data.random_flip: must be true or false, got 1. Correct the value.",
        "c.yaml: curriculum.phases[0].resolution: must be HEIGHTxWIDTH or a mapping with both, got 64. Write for example 256x256.",
        "c.yaml: curriculum.phases[0].updates: must be an integer, got 10.5. Correct the value.",
        "c.yaml: curriculum.phases[0].learning_rate: must be a number, got 'yes'. Correct the value.",
        "c.yaml: curriculum.phases[0].warmup_update: is not a known key, got 2. Did you mean 'warmup_updates'?",
        "c.yaml: curriculum.phases[1].name: must match ^[A-Za-z0-9_-]+$, got 'b c'. Use only those characters.",
        "c.yaml: curriculum.phases[1].duration.frame: is not a known key, got 8. Did you mean 'frames'?",
        "c.yaml: curriculum.phases[1].learning_rate: must be finite, got inf. Write a number.",
        "c.yaml: optimizer.epsilon: must be > 0.0, got -1. Use a larger value.",
        "c.yaml: optimizer.weight_decay: must be a number, got '0.1'. Remove the quotes.",
        "c.yaml: engine.deepspeed_config: must be text or a mapping, got 7. Write text or a mapping.",
        "c.yaml: checkpoint: must be a mapping, got 5. Write `key: value` lines under it.",
        "c.yaml: loss.perceptual.mode: must be 'lpips', 'vgg' or 'l2', got 'lpip'. Did you mean 'lpips'?",
        "c.yaml: sed: is not a known key, got 1. Did you mean 'seed'?",
        "c.yaml: curriculum.phases[0].global_batch_size: this or micro_batch_size must be given, got neither. Set one of them.",
        "c.yaml: curriculum.phases[1].global_batch_size: this or micro_batch_size must be given, got neither. Set one of them.",
    ]


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("", None, "c.yaml: must hold a mapping of settings, got an empty file. Start from a file in configs/."),
        ("[1]", None, "c.yaml: must hold a mapping of settings, got list. Write `key: value` lines."),
        ("base: c.yaml", None, "c.yaml: base: must not lead back to a file that is being read, got c.yaml. Break the circle."),
        ("base: nowhere.yaml", None, "nowhere.yaml: must exist, got no such file in {folder}, nor a shipped configuration of that name. Check the path; `aiprod-ds examples` lists what is shipped."),
        ("base: .", None, ".: must be a YAML file, got a folder. Name a file in it."),
        ("base: [base.yaml]", None, "c.yaml: base: must be the path of a YAML file relative to this one, got ['base.yaml']. Name one file."),
        ("base: base.yaml", "seed", "--set seed: must be of the form path.to.key[index]=value, got 'seed'. Write for example seed=1."),
        ("base: base.yaml", "a..b=1", "--set a..b=1: must be of the form path.to.key[index]=value, got 'a..b=1'. Write for example seed=1."),
        ("base: base.yaml", "sed=1", "--set: sed: is not a known key, got 1. Did you mean 'seed'?"),
        ("base: base.yaml", "optimizer.eps=1", "--set: optimizer.eps: is not a known key, got 1. Did you mean 'epsilon'?"),
        ("base: base.yaml", "output_dir.a=1", "--set: output_dir.a: output_dir must be a mapping to take 'a', got text. Correct the path."),
        ("base: base.yaml", "data[0]=1", "--set: data[0]: data must be a list to take [0], got a mapping. Correct the path."),
        ("base: base.yaml", "seed.a=1", "--set: seed: must be an integer, got {'a': 1}. Correct the value."),
        ("base: base.yaml", "curriculum.phases=[]", "--set: curriculum.phases: must have at least one entry, got an empty list. Add a phase."),
        ("base: base.yaml", "curriculum.phases=x", "--set: curriculum.phases: must be a list, got 'x'. Write [..] or lines that start with `-`."),
        ("base: base.yaml\ncurriculum: {preset: default}", None, "c.yaml: curriculum.preset: cannot stand beside phases, got both. Remove one of the two."),
        ("base: base.yaml", "seed=017", "--set seed=017: line 1: an integer must not start with 0, got 017. Drop the zero, or quote it as text."),
        ("base: base.yaml", "model.pretrained=x", "c.yaml: model.config: has no effect when pretrained is set, got both. Remove one of the two. It is set in base.yaml."),
        ("base: base.yaml", "optimizer.betas=[0.9, 0.9, 0.9]", "--set: optimizer.betas: must have at most 2 entries, got [0.9, 0.9, 0.9]. Remove what is too much."),
        ("base: base.yaml\ndata: {validation: v, holdout_fraction: 0.2}", None, "c.yaml: data.holdout_fraction: has no effect when validation is set, got 0.2. Remove one of the two."),
        ("base: base.yaml", "curriculum.phases[1].loss.kl=1", "--set: curriculum.phases[1].loss.kl: is not a weight of the loss section, got 1.0. Did you mean 'kl_weight'?"),
        ("base: base.yaml", "optimizer.betas=[0.9]", "--set: optimizer.betas[1]: must be given, got nothing. Add it to the list."),
    ],
)  # fmt: skip
def test_one_broken_thing_gives_one_message(
    folder: Path, text: str, override: str | None, message: str
) -> None:
    assert problems(text, *([override] if override else [])) == [message.replace("{folder}", str(folder))]


def test_missing_file_and_unreadable_path(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: must exist, got no such file"):
        load_config(Path("no.yaml"))
    with pytest.raises(ConfigError, match=r"must be readable, got .*null byte"):
        load_config(Path("a\0b"))


def test_cycle_of_two_files_ends(folder: Path) -> None:
    (folder / "d.yaml").write_text("base: c.yaml\n")
    assert len(problems("base: d.yaml\n")) == 1


def test_unknown_preset_is_named_once_and_the_rest_is_still_checked(folder: Path) -> None:
    text = "output_dir: x\nmodel: {source: M}\ndata: {train: s, trian: 1}\ncurriculum: {preset: defualt}\n"
    assert problems(text) == [
        "c.yaml: curriculum.preset: must be 'default', got 'defualt'. Write default or list phases.",
        "c.yaml: data.trian: is not a known key, got 1. Did you mean 'train'?",
    ]


def test_no_message_shows_the_validation_library(folder: Path) -> None:
    text = "base: base.yaml\nseed: {}\nmodel: []\ndata: null\ncurriculum: 1\nloss: x\nreport: {wandb: {tags: 5, mode: 1}}\n"
    found = problems(text)
    assert len(found) == 7
    for problem in found:
        assert "pydantic" not in problem.lower()
        assert "http" not in problem
        assert "Input should" not in problem
        assert problem.endswith((".", "?"))


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for step, child in steps for found in _paths(child, (*path, step)))]


_junk = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["frames", "height", "preset", "base", "updates", "{x}", "a b", ""]), st.integers() | st.text(max_size=3), max_size=2),
)  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_junk_anywhere_is_refused_in_the_house_form_or_taken(folder: Path, data: st.DataObject) -> None:
    values = read_yaml(BASE.encode(), "base")
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(values)[1:]))
        target = values
        for step in path[:-1]:
            target = target[step]
        target[path[-1] if data.draw(st.booleans()) or isinstance(target, list) else "junk"] = data.draw(
            _junk
        )
    try:
        config = load(write_yaml(values))
    except ConfigError as error:
        found = error.problems
    else:
        assert load(to_yaml(config)) == config
        return
    assert found
    assert all(problem.startswith(("c.yaml: ", "file: ")) for problem in found)
    assert not any("Input should" in problem or "pydantic" in problem for problem in found)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "[1, {deep: .inf}]"])
@pytest.mark.parametrize("key", ["model.config.latent_channels", "engine.deepspeed_config.bf16"])
def test_free_mappings_hold_finite_numbers_because_json_has_no_others(
    folder: Path, key: str, value: str
) -> None:
    text = BASE if key.startswith("model") else BASE + "engine: {deepspeed_config: {}}\n"
    with pytest.raises(ConfigError) as caught:
        load(text, f"{key}={value}")
    where = key.rpartition(".")[0]
    assert any(
        f"{where}: must hold finite numbers only, got " in problem for problem in caught.value.problems
    )


@pytest.mark.parametrize(
    ("name", "valid", "words"),
    [
        ("learnig_rate", ["learning_rate", "updates"], "Did you mean 'learning_rate'?"),
        ("Seed", ["seed"], "Did you mean 'seed'?"),
        ("kl", ["kl_weight", "haar_weight"], "Did you mean 'kl_weight'?"),
        ("zzz", ["b", "a"], "Use one of: a, b."),
        ("zzz", [], "Remove it."),
        ("zzz", [f"key{i}" for i in range(20)], "Remove it or look the name up in docs/configuration.md."),
    ],
)
def test_suggestion(name: str, valid: list[str], words: str) -> None:
    assert suggestion(name, valid) == words
