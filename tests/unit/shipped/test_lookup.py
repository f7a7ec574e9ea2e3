"""Names lead to shipped files from any folder, a reader's own files come first, and paths are found beside
the file that says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.fingerprint import config_fingerprint
from aiprod_ds.config.load import found_data, load_config, load_encode_config
from aiprod_ds.errors import ConfigError
from aiprod_ds.shipped import lookup

_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds nothing of the repository, nor does any folder above it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_all_that_is_shipped_has_a_name() -> None:
    assert {"video_vae/tiny", "encode/ltx2", "sample/tiny"} <= set(lookup.shipped_configurations())
    files = {path.stem for path in (_ROOT / "ds_configs").glob("*.json")}
    assert files == set(lookup.shipped_settings())
    assert "zero1_bf16" in files


@pytest.mark.parametrize("name", ["video_vae/tiny", "video_vae/tiny.yaml", "configs/video_vae/tiny.yaml"])
def test_a_configuration_is_found_by_its_name_from_any_folder(name: str) -> None:
    config = load_config(Path(name))
    assert config.model.source == "AutoencoderKLLTXVideo"
    settings = read_settings(config, source=name)
    assert (settings.precision, settings.zero_stage) == ("fp32", 1)


def test_a_file_of_the_readers_own_comes_first(elsewhere: Path) -> None:
    (elsewhere / "video_vae").mkdir()
    (elsewhere / "video_vae" / "tiny").write_text("base: video_vae/tiny\nseed: 7\n")
    assert load_config(Path("video_vae/tiny")).seed == 7
    (elsewhere / "mine.yaml").write_text("base: video_vae/tiny.yaml\nseed: 8\n")
    assert load_config(Path("mine.yaml")).seed == 8


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"must exist, got no such file in .*vide_vae.*Did you mean video_vae"
    ):
        load_config(Path("vide_vae/tiny"))
    with pytest.raises(ConfigError, match="`aiprod-ds examples` lists what is shipped"):
        load_config(Path("qqqq"))


@pytest.mark.parametrize("given", ["zero2_fp32", "ds_configs/zero2_fp32.json", "ds_configs/zero2_fp32"])
def test_settings_are_found_by_their_name_from_any_folder(given: str) -> None:
    config = load_config(Path("video_vae/tiny"), [f"engine.deepspeed_config={given}"])
    assert read_settings(config, source="in Python").zero_stage == 2


def test_settings_of_the_readers_own_come_first(elsewhere: Path) -> None:
    (elsewhere / "zero2_fp32").write_text('{"zero_optimization": {"stage": 3}}')
    config = load_config(Path("video_vae/tiny"), ["engine.deepspeed_config=zero2_fp32"])
    assert read_settings(config, source="video_vae/tiny").zero_stage == 3


def test_a_path_of_a_base_is_relative_to_the_base(elsewhere: Path, tmp_path: Path) -> None:
    team = tmp_path / "team"
    team.mkdir()
    (team / "settings.json").write_text('{"zero_optimization": {"stage": 2}}')
    (team / "base.yaml").write_text("base: video_vae/tiny\nengine: {deepspeed_config: settings.json}\n")
    (elsewhere / "run.yaml").write_text("base: ../team/base.yaml\nseed: 1\n")
    assert read_settings(load_config(Path("run.yaml")), source="run.yaml").zero_stage == 2
    # what the configuration says itself is beside it
    (elsewhere / "near.yaml").write_text(
        "base: ../team/base.yaml\nengine: {deepspeed_config: settings.json}\n"
    )
    with pytest.raises(ConfigError, match="must name a file or shipped settings"):
        read_settings(load_config(Path("near.yaml")), source="near.yaml")


def test_a_miss_lists_the_folders_that_were_searched(elsewhere: Path) -> None:
    (elsewhere / "conf").mkdir()
    (elsewhere / "conf" / "run.yaml").write_text("base: video_vae/tiny\n")
    config = load_config(Path("conf/run.yaml"), ["engine.deepspeed_config=no.json"])
    with pytest.raises(ConfigError) as caught:
        read_settings(config, source="conf/run.yaml")
    (problem,) = caught.value.problems
    assert f"the working folder {elsewhere}, {elsewhere / 'conf'} and the folders above it" in problem
    assert "take one of zero0_bf16, " in problem


def test_data_is_found_and_the_fingerprint_is_that_of_what_was_typed(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Path("video_vae/tiny"))
    found = found_data(config.data, "video_vae/tiny")
    assert (Path(found.train), Path(found.validation or "")) == (
        _ROOT / "samples" / "train.csv",
        _ROOT / "samples" / "validation.csv",
    )
    assert config.data.train == "samples/train.csv"
    monkeypatch.chdir(_ROOT)
    near = load_config(Path("configs/video_vae/tiny.yaml"))
    assert found_data(near.data, "configs/video_vae/tiny.yaml").train == "samples/train.csv"
    assert config_fingerprint(config) == config_fingerprint(near)


def test_data_that_is_nowhere_stays_as_it_was_typed() -> None:
    config = load_config(Path("video_vae/tiny"), ["data.train=nowhere", "data.validation=s3://bucket/x"])
    found = found_data(config.data, "video_vae/tiny")
    assert (found.train, found.validation) == ("nowhere", "s3://bucket/x")


def test_encode_finds_media_and_curriculum(elsewhere: Path) -> None:
    config = load_encode_config(Path("encode/tiny"))
    assert Path(config.data.media) == _ROOT / "samples" / "train.csv"
    assert config.curriculum == "configs/diffusion/tiny.yaml"  # a name of what is shipped, from any folder
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine" / "phases.yaml").write_text("base: diffusion/tiny\n")
    (elsewhere / "mine" / "encode.yaml").write_text("base: encode/tiny\ncurriculum: phases.yaml\n")
    assert Path(load_encode_config(Path("mine/encode.yaml")).curriculum or "").is_file()


def test_nothing_is_of_an_installation_in_a_checkout() -> None:
    assert not lookup.is_of_the_installation(_ROOT / "samples")
