"""Which code a configuration may name before it is trusted: every key that takes an import path, in every
kind of file; nothing is imported before that is judged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.config.load import load_config, load_encode_config, load_sample_config, read_saved_run
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
VIDEO = ROOT / "configs" / "video_vae" / "tiny.yaml"
DIFFUSION = ROOT / "configs" / "diffusion" / "tiny.yaml"
ENCODE = next(iter(sorted((ROOT / "configs" / "encode").glob("tiny*.yaml"))))
SAMPLE = next(iter(sorted((ROOT / "configs" / "sample").glob("tiny*.yaml"))))
OWN = "code_of_someone_else:Thing"
PLACES = [
    (load_config, VIDEO, "trainer"),
    (load_config, VIDEO, "model.source"),
    (load_config, VIDEO, "evaluation.measures.fvd.network"),
    (load_config, DIFFUSION, "vae.source"),
    (load_encode_config, ENCODE, "video.model.source"),
    (load_sample_config, SAMPLE, "model.source"),
    (load_sample_config, SAMPLE, "vae.source"),
]


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists if the module that the configuration names was imported."""
    mark = tmp_path / "imported"
    (tmp_path / "code_of_someone_else.py").write_text(f"open({str(mark)!r}, 'w').close()\nThing = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "code_of_someone_else", raising=False)
    return mark


@pytest.mark.parametrize(("load", "path", "key"), PLACES)
def test_every_key_that_names_code_needs_trust(load: Any, path: Path, key: str, code: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, [f"{key}={OWN}", "seed=-1"])
    told = next(problem for problem in caught.value.problems if f"{key}: " in problem)
    assert told == (
        f"--set: {key}: names code outside of aiprod_ds and diffusers, which runs only if it is trusted, got "
        f"{OWN!r}. If you would run it yourself, add --trust-code, or `trust_code: true` to the file."
    )
    assert any("seed: must be >= 0" in problem for problem in caught.value.problems)  # told at once
    assert not code.exists()


@pytest.mark.parametrize(("load", "path", "key"), [place for place in PLACES if place[2] != "trainer"])
def test_both_ways_to_trust_count(load: Any, path: Path, key: str) -> None:
    load(path, [f"{key}={OWN}"], trust_code=True)
    load(path, [f"{key}={OWN}", "trust_code=true"])


def test_a_trusted_trainer_is_imported(code: Path) -> None:
    with pytest.raises(ConfigError, match="trainer: must be a class derived from Trainer"):
        load_config(VIDEO, [f"trainer={OWN}"], trust_code=True)
    assert code.exists()


def test_a_trusted_file_stays_the_configuration_that_it_is() -> None:
    assert load_config(VIDEO, ["trust_code=true"]) == load_config(VIDEO)


def test_trust_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"--set: trust_code: must be true or false, got 'yes'\."):
        load_config(VIDEO, ["trust_code=yes"])


@pytest.mark.parametrize("source", ["aiprod_ds.testing.tiny:TinyVideoVAE", "diffusers:AutoencoderKLWan"])
def test_installed_packages_need_no_trust(source: str) -> None:
    assert load_config(VIDEO, [f"model.source={source}"]).model.source == source


@pytest.mark.parametrize("source", ["aiprod_ds_x:X", "diffusersx.models:X", ".aiprod_ds:X", " diffusers:X"])
def test_a_name_that_begins_like_theirs_is_not_theirs(source: str) -> None:
    with pytest.raises(ConfigError, match="names code outside of"):
        load_config(VIDEO, [f'model.source="{source}"'])


def test_records_made_in_code_are_not_judged() -> None:
    assert ModelConfig(source=OWN).source == OWN


def test_a_run_folder_is_read_without_trust_and_without_import(tmp_path: Path, code: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(VIDEO.read_text().replace("AutoencoderKLLTXVideo", OWN))
    assert read_saved_run(path).model.source == OWN
    assert not code.exists()
