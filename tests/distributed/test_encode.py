"""Two ranks share the encoding; one is killed between writing an entry and naming it, and the next run
finishes.

Nothing is lost, nothing is done twice, no half file is taken for an entry, and the result is that of one
process. The ranks count and die in an audit hook of Python on `os.rename`, the call that gives an entry its
name.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.data.latents import AUDIO_LATENTS, CONDITIONS, LATENTS, read_header
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.encode.run import run_encoding
from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.dist import run_on_ranks

pytestmark = pytest.mark.dist

NUM_CLIPS = 8
TOTAL = {CONDITIONS: NUM_CLIPS, LATENTS: 2 * NUM_CLIPS, AUDIO_LATENTS: 2 * NUM_CLIPS}
DEADLY_RENAME = (
    9  # of rank 1, which has 4 captions and 8 clips of 2 entries each: the second entry of its third clip
)


def encode(media: str, output: str, rename_that_kills: int | None = None) -> dict[str, Any]:
    """Encodes and returns what this rank named, and what all ranks did; rank 1 dies before its n-th entry has
    its name."""
    named: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
            if dist.rank() == 1 and len(named) + 1 == rename_that_kills:
                os.kill(os.getpid(), signal.SIGKILL)
            named.append(str(Path(arguments[1]).relative_to(output)))

    sys.addaudithook(watch)
    summary = run_encoding(_config(media, output))
    return {"named": named, "written": dict(summary.written), "present": dict(summary.present)}


def _config(media: str, output: str) -> EncodeConfig:
    attention = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 259}
    codec = {"audio_channels": 1, "sampling_rate": 16_000, "encoder_hidden_size": 8, "decoder_channels": 8}
    codec |= {"decoder_input_channels": 4, "downsampling_ratios": [4, 8], "channel_multiples": [1, 2]}
    sizes = (("16x16", 3), ("16x24", 5))
    return EncodeConfig.model_validate(
        {
            "data": {"media": media, "output_dir": output, "num_workers": 0},
            "video": {"model": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"}, "precision": "fp32"},
            "audio": {"model": {"source": "AutoencoderOobleck", "config": codec}, "precision": "fp32"},
            "text": {
                "source": "T5EncoderModel",
                "config": attention,
                "precision": "fp32",
                "default_caption": "a film",
            },
            "shapes": [{"resolution": size, "duration": {"frames": frames}} for size, frames in sizes],
        }
    )


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("media")
    write_synthetic_clips(folder, num_clips=NUM_CLIPS, frames=8, height=32, width=48)
    return str(folder)


@pytest.fixture(scope="module")
def expected(media: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    output = tmp_path_factory.mktemp("one")
    summary = run_encoding(_config(media, str(output)))
    assert dict(summary.written) == TOTAL
    return output


def _names(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.rglob("*.safetensors"))


def _assert_equal_entries(output: Path, expected: Path, names: list[str]) -> None:
    for name in names:
        found, wanted = load_file(output / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert read_header(output / name) == read_header(expected / name)


def test_two_ranks_share_the_work_and_make_what_one_makes(media: str, expected: Path, tmp_path: Path) -> None:
    results = run_on_ranks(
        encode, ranks=2, arguments={"media": media, "output": str(tmp_path)}, timeout_seconds=600
    )
    assert [result["written"] for result in results] == [TOTAL, TOTAL]
    shares = [
        [name for name in result["named"] if "/" in name] for result in results
    ]  # all but the empty prompt
    assert [len(share) for share in shares] == [sum(TOTAL.values()) // 2] * 2
    assert not set(shares[0]) & set(shares[1])
    assert _names(tmp_path) == _names(expected)
    _assert_equal_entries(tmp_path, expected, _names(expected))


def test_a_killed_run_is_finished_by_the_next(media: str, expected: Path, tmp_path: Path) -> None:
    arguments = {"media": media, "output": str(tmp_path)}
    with pytest.raises(EngineError, match="no result of ranks"):
        run_on_ranks(
            encode, ranks=2, arguments={**arguments, "rename_that_kills": DEADLY_RENAME}, timeout_seconds=600
        )
    assert list(tmp_path.rglob("*.part")), "the kill was to leave an entry without its name"
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in _names(tmp_path)}
    assert DEADLY_RENAME - 1 <= len(before) < len(_names(expected))
    _assert_equal_entries(tmp_path, expected, list(before))

    results = run_on_ranks(encode, ranks=2, arguments=arguments, timeout_seconds=600)
    named = [name for result in results for name in result["named"]]
    assert sorted([*named, *before]) == _names(expected), (
        "each entry has been named once, by one rank of one run"
    )
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert results[0]["written"] == results[1]["written"]
    both = {
        source: results[0]["written"].get(source, 0) + results[0]["present"].get(source, 0)
        for source in TOTAL
    }
    assert both == TOTAL
    assert not list(tmp_path.rglob("*.part"))
    _assert_equal_entries(tmp_path, expected, _names(expected))
