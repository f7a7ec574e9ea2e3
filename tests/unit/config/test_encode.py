"""Configurations of encoding: every problem at once, what options replace, and that the shipped and
documented ones load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiprod_ds.config.load import load_encode_config, read_curriculum
from aiprod_ds.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[3]
_SHIPPED = sorted((_ROOT / "configs" / "encode").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "data: {media: m}\nvideo: {model: {source: M}}\n",
            ["shapes: either these or curriculum must be given, got neither"],
        ),
        (
            (
                "data: {mdia: m}\nvideo: {model: {source: M}, tiling: {tile: 64x64, overlap: "
                "64}}\ncurriculum: "
                "c.yaml\n"
            ),
            [
                "data.mdia: is not a known key, got 'm'. Did you mean 'media'?",
                "video.tiling.overlap: must be below the tile's smaller side (64), got 64",
            ],
        ),
        (
            (
                "data: {media: m}\nvideo: {model: {source: M}}\ncurriculum: c\ntext: {config: {d_model: 8}, "
                "pretrained: p}\n"
            ),
            [
                "text.pretrained: either this or config must be given, got both",
                "text.source: must be given with config",
            ],
        ),
        (
            (
                "data: {media: m}\nvideo: {model: {source: M}}\nshapes: [{resolution: 8x8, duration: "
                "{seconds: "
                "1.0}}]\n"
            ),
            ["shapes[0].duration.seconds: needs frame_rate_hz, got none"],
        ),
        (
            (
                "data: {media: m, held_out: true}\nvideo: {model: {source: M}}\nshapes: [{resolution: 8x8, "
                "duration: {frames: 1}}]\n"
            ),
            ["data.held_out: has no effect without curriculum, got true"],
        ),
        (
            (
                "data: {media: m, captions_per_line: true, scene_threshold: 20.0}\nvideo: {model: {source: "
                "M}}\nshapes: [{resolution: 8x8, duration: {frames: 1}}]\n"
            ),
            [
                "data.scene_threshold: has no effect without scenes: cut, got 20",
                "data.captions_per_line: has no effect without text, got true",
            ],
        ),
        (
            (
                "data: {media: m, captions_per_line: true}\nvideo: {model: {source: M}}\n"
                "shapes: [{resolution: 8x8, duration: {frames: 1}}]\n"
            ),
            ["data.captions_per_line: has no effect without text, got true"],
        ),
    ],
)
def test_a_wrong_configuration_names_every_problem(tmp_path: Path, text: str, messages: list[str]) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_encode_config(tmp_path / "e.yaml")
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert any(f"e.yaml: {message}" in problem for problem in caught.value.problems), (
            caught.value.problems
        )


def test_options_replace_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("data: {media: m}\nvideo: {model: {source: M}}\ncurriculum: c.yaml\n")
    config = load_encode_config(
        tmp_path / "e.yaml", ["data.num_workers=7", "video.precision=fp32"], "elsewhere"
    )
    assert (config.data.num_workers, config.video.precision, config.data.output_dir) == (
        7,
        "fp32",
        "elsewhere",
    )


def test_options_and_files_are_judged_together(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        "data: {media: m}\nvideo: {model: {source: M}}\ncurriculum: c.yaml\nsede: 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_encode_config(
            tmp_path / "e.yaml", ["data.num_workers", "data.num_workers=-1", "shapes[2].duration=1"]
        )
    start, *others = caught.value.problems
    assert start.startswith("--set data.num_workers: must be of the form path.to.key[index]=value")
    assert [problem.split(": ")[1] for problem in others] == [
        "shapes[2].duration",
        "data.num_workers",
        "sede",
    ]
    assert "shapes must be a list to take [2], got nothing" in others[0]


def test_of_a_curriculum_only_its_section_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("anything: [goes]\ncurriculum: {preset: default}\n")
    assert [phase.name for phase in read_curriculum(path).phases] == ["low", "medium", "high"]
    path.write_text("anything: goes\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: curriculum: must be given, got nothing"):
        read_curriculum(path)
    path.write_text("curriculum: {phases: [{name: a, updates: 0, resolution: 8x8, duration: {frames: 1}}]}\n")
    with pytest.raises(ConfigError) as caught:
        read_curriculum(path)
    assert all(problem.startswith(f"{path}: curriculum.phases[0]") for problem in caught.value.problems)
    assert any(
        "curriculum.phases[0].updates: must be >= 1, got 0" in problem for problem in caught.value.problems
    )


@pytest.mark.parametrize("path", _SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_encode_config(path).text is not None


def test_the_guides_examples_load(tmp_path: Path) -> None:
    section = (_ROOT / "docs" / "guide.md").read_text().partition("\n## Encoding\n")[2].partition("\n## ")[0]
    examples = re.findall(r"^((?: {4}.*\n)+)", section, flags=re.MULTILINE)
    configurations = [text for text in examples if text.lstrip().startswith("data:")]
    assert configurations
    for number, text in enumerate(configurations):
        path = tmp_path / f"{number}.yaml"
        path.write_text(re.sub(r"^ {4}", "", text, flags=re.MULTILINE))
        assert load_encode_config(path).video.model.source
