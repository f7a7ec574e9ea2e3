"""Every example is listed with what it is for, and a copy is whole or not made."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.cli import main
from aiprod_ds.errors import ConfigError
from aiprod_ds.starting.examples import copy_examples, examples

_ROOT = Path(__file__).resolve().parents[3]


def test_every_configuration_is_listed_with_its_use() -> None:
    listed = {example.name: example for example in examples()}
    configurations = set((_ROOT / "configs").rglob("*.yaml"))
    assert len(configurations) == sum(bool(example.command) for example in listed.values())
    assert listed["encode/tiny"].command == "aiprod-ds encode encode/tiny"
    assert listed["video_vae/tiny"].command == "aiprod-ds train video_vae/tiny"
    assert all(len(example.text) > 20 for example in listed.values())


def test_all_examples_lie_as_in_the_repository(tmp_path: Path) -> None:
    made = copy_examples(["all"], tmp_path)
    for path in made:
        assert path.read_bytes() == (_ROOT / path.relative_to(tmp_path)).read_bytes()
    for part in ("configs", "ds_configs", "launch", "samples"):
        sources = [path for path in (_ROOT / part).rglob("*") if path.is_file()]
        assert len([path for path in made if path.is_relative_to(tmp_path / part)]) == len(sources)
    assert copy_examples(["all"], tmp_path) == []


def test_a_changed_file_is_not_written_over(tmp_path: Path) -> None:
    (copied,) = copy_examples(["configs/video_vae/tiny.yaml"], tmp_path)
    copied.write_text("seed: 1\n")
    with pytest.raises(
        ConfigError, match=r"tiny\.yaml: must not be there or be the shipped file, got another"
    ):
        copy_examples(["audio_vae/tiny", "video_vae/tiny"], tmp_path)
    assert copied.read_text() == "seed: 1\n"
    assert not (tmp_path / "configs" / "audio_vae").exists()


def test_the_command_lists_copies_and_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["examples"]) == 0
    assert "diffusion/ltx_2b_h200" in capsys.readouterr().out
    assert main(["examples", "sample/tiny", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'configs' / 'sample' / 'tiny.yaml'}\n"
    assert main(["examples", "sample/tin", "--to", str(tmp_path)]) == 2
    assert (
        "sample/tin: must be the name of an example, got none such. Did you mean" in capsys.readouterr().err
    )
