"""A run reads the same from a folder, from shards on a disk and from shards on S3: the same final state, bit
for bit, with any number of workers, resumed in the middle, on one rank and on two.

The S3 server is a process of its own behind a line that waits, cuts answers and fails now and then; the cache
is smaller than the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.data.latents import CONDITIONS, EMPTY_PROMPT, LATENTS, entry_path, write_entry
from aiprod_ds.data.packed.packing import pack_latents
from aiprod_ds.errors import DataError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.shards.storage import FolderStorage, open_storage
from aiprod_ds.testing.object_storage import BadLine, bad_line, s3_server
from aiprod_ds.testing.runs import (
    alike_on_ranks,
    copy_as_if_stopped_at,
    record_of,
    train_and_resume,
    without_plots,
)
from aiprod_ds.trainers.diffusion import DiffusionTrainer

CLIPS, UPDATES, MIDDLE = 12, 6, 2
BUCKET = "tests"
LINE = BadLine(latency_seconds=0.002, cut_every=7, fail_every=11)
_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The data sections of a run, by where the latents are, and the environment that S3 needs."""
    folder = tmp_path_factory.mktemp("sources")
    _write_latents(folder / "folder")
    pack_latents(folder / "folder", FolderStorage(folder / "shards"), shard_bytes=8000)
    with s3_server(BUCKET) as server, bad_line(server, LINE) as line:
        storage = open_storage(f"s3://{BUCKET}/latents", endpoint_url=server.url)
        index = pack_latents(folder / "folder", storage, shard_bytes=8000)
        assert len(index.shards) > 2
        total = sum(size for _, size in index.shards)
        data = {
            "folder": {"train": str(folder / "folder")},
            "shards": {"train": str(folder / "shards")},
            "s3": {
                "train": f"s3://{BUCKET}/latents",
                "storage": {
                    "endpoint_url": line.url,
                    "cache_dir": str(folder / "cache"),
                    "cache_gb": total / 3 / 1e9,
                },
            },
        }
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        yield {"data": data, "environment": environment, "server": server}
        kept = sum(path.stat().st_size for path in (folder / "cache").glob("*/*"))
        assert 0 < kept <= total / 3


@pytest.fixture(scope="module")
def one_rank(sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return alike_on_ranks(run_every_source, ranks=1, folder=folder, **_given(sources))


def _given(sources: dict[str, Any]) -> dict[str, Any]:
    return {"data": sources["data"], "environment": sources["environment"]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["shards", "s3"])
def test_a_run_does_not_depend_on_where_its_data_lies(
    one_rank: dict[str, Any], source: str, workers: int
) -> None:
    oracle, found = one_rank["folder_0"]["whole"], one_rank[f"{source}_{workers}"]["whole"]
    assert oracle["updates"] == [UPDATES]
    assert len({row[1]["loss/total"] for row in oracle["rows"] if "loss/total" in row[1]}) == UPDATES
    assert found["sha256"] == oracle["sha256"], "parameters and optimizer state"
    assert found["rows"] == oracle["rows"], "metrics.jsonl without measured times"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["shards", "s3"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    one_rank: dict[str, Any], source: str, workers: int
) -> None:
    oracle, again = one_rank["folder_0"]["whole"], one_rank[f"{source}_{workers}"]["middle"]
    assert again["resumed_from"] == [f"update_{MIDDLE:06d}"]
    assert again["sha256"] == oracle["sha256"]
    assert again["rows"] == oracle["rows"]


def test_a_run_that_began_on_a_folder_goes_on_from_its_shards(one_rank: dict[str, Any]) -> None:
    oracle, moved = one_rank["folder_0"]["whole"], one_rank["moved"]
    assert moved["resumed_from"] == [f"update_{MIDDLE:06d}"]
    assert moved["sha256"] == oracle["sha256"]
    assert moved["rows"] == oracle["rows"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_storage_that_dies_ends_the_run_which_then_goes_on_to_the_same_end(
    one_rank: dict[str, Any], sources: dict[str, Any], tmp_path: Path, workers: int
) -> None:
    with bad_line(sources["server"], BadLine(die_after=20)) as dying:
        storage = {"endpoint_url": dying.url, "cache_gb": 0, "patience_seconds": 1}
        found = alike_on_ranks(
            run_until_the_storage_is_gone,
            ranks=1,
            folder=tmp_path,
            dying={**sources["data"]["s3"], "storage": storage, "num_workers": workers},
            data={**sources["data"]["s3"], "num_workers": workers},
            environment=sources["environment"],
        )
    assert "must be delivered by its storage, got: EndpointConnectionError" in found["told"]
    assert found["resumed_from"] != []
    assert found["sha256"] == one_rank["folder_0"]["whole"]["sha256"]
    assert found["rows"] == one_rank["folder_0"]["whole"]["rows"]


def test_two_ranks_share_a_cache(sources: dict[str, Any], tmp_path: Path) -> None:
    found = alike_on_ranks(run_on_two_ranks, ranks=2, folder=tmp_path, **_given(sources))
    assert found["s3"]["whole"]["sha256"] == found["folder"]["whole"]["sha256"]
    assert found["s3"]["middle"]["sha256"] == found["folder"]["whole"]["sha256"]
    assert found["s3"]["whole"]["rows"] == found["folder"]["whole"]["rows"]


# Below runs on the ranks.


def run_every_source(
    folder: str, data: Mapping[str, dict[str, Any]], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the runs of one rank by source and workers, and one that moves from the folder to S3."""
    cases = [("folder", 0), *((source, workers) for source in ("shards", "s3") for workers in (0, 2))]
    with patch.dict(os.environ, environment):
        records: dict[str, Any] = {
            f"{source}_{workers}": train_and_resume(
                _trainer(data[source], workers, kind="local"),
                Path(folder) / f"{source}_{workers}",
                {"middle": MIDDLE},
            )
            for source, workers in cases
        }
        whole, moved = Path(folder) / "folder_0", Path(folder) / "moved"
        copy_as_if_stopped_at(MIDDLE, whole, moved)
        with without_plots():
            records["moved"] = _trainer(data["s3"], 0, kind="local")(moved)
        return records


def run_until_the_storage_is_gone(
    folder: str, dying: dict[str, Any], data: dict[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the run that went on after its storage was back, and with what error it ended before."""
    with patch.dict(os.environ, environment), without_plots():
        try:
            _train(dying, "local", Path(folder))
        except DataError as error:
            told = str(error)
        return {"told": told, **_train(data, "local", Path(folder))}


def run_on_two_ranks(
    folder: str, data: Mapping[str, dict[str, Any]], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the runs from a folder and from S3."""
    with patch.dict(os.environ, environment):
        return {
            source: train_and_resume(
                _trainer(data[source], 1, kind="deepspeed"), Path(folder) / source, {"middle": MIDDLE}
            )
            for source in ("folder", "s3")
        }


def _trainer(data: dict[str, Any], workers: int, *, kind: str) -> Callable[[Path], dict[str, Any]]:
    return partial(_train, {**data, "num_workers": workers}, kind)


def _train(data: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    summary = DiffusionTrainer(_config(data, kind, folder)).train(resume="auto")
    return record_of(summary, folder)


def _write_latents(root: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([True, True, False])
    for number in range(CLIPS):
        clip = f"part{number % 3}/clip_{number:02d}.mp4"
        facts = {"media_sha256": f"{number:064d}", "fps": "24.0", "media_frames": "24", "media_fps": "24.0"}
        facts |= {"media_seconds": "1.0", "media_height": "64", "media_width": "64"}
        latents = torch.randn((4, 2, 2, 2), generator=draw).bfloat16()
        write_entry(entry_path(root, LATENTS, f"{clip}@9x64x64"), {"latents": latents}, facts)
        prompt = torch.randn((3, 16), generator=draw).bfloat16()
        tensors = {"prompt_embeds": prompt, "prompt_attention_mask": mask}
        write_entry(entry_path(root, CONDITIONS, clip), tensors, {})
    write_entry(root / EMPTY_PROMPT, {name: tensor * 0 for name, tensor in tensors.items()}, {})


def _config(data: dict[str, Any], kind: str, folder: Path) -> DiffusionTrainerConfig:
    return DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {
                "source": "LTXVideoTransformer3DModel",
                "config": {**LTXVideo.tiny_config(), "num_layers": 1},
            },
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 32,
                "temporal_stride": 8,
            },
            "data": {"holdout_fraction": 0.2, "caption_dropout": 0.3, **data},
            "curriculum": {
                "phases": [
                    {
                        "name": "only",
                        "resolution": "64x64",
                        "duration": {"frames": 9},
                        "updates": UPDATES,
                        "learning_rate": 1e-3,
                        "global_batch_size": 4,
                    }
                ]
            },
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / "zero1_fp32.json")},
            "checkpoint": {"every_updates": 2},
            "evaluation": {"max_clips": 2, "noise_levels": [0.5], "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
