"""How fast do latents come out of shards, on a disk and over a network, beside a folder of the same files?

Writes clips as `latent_loading.py` does (9 frames of 256x256 of LTX-Video with sound and embeddings, 1.1 MB
in three files a clip), packs them into shards, and reads them all with `ClipLoader` in the sampler's order,
in batches of 4:

    folder              the files, warm
    shards              tar shards on the same disk, warm
    S3                  a server on the loopback, nothing cached; one process of Python that serves all
    S3, cached          the same with everything in the cache
    S3, cache of a half again, with a cache that holds half of the clips, from its second pass on
    S3, slow line       behind a line of 30 ms and 20 MB/s for each connection, nothing cached

Times begin with the loader's start and cover all clips once; the servers are started before. Figures over the
loopback share the machine's cores with the servers. What a slow line needs is workers: each waits for one
request at a time.

    python benchmarks/shards.py --clips 400 --runs 3 --output benchmarks/results/NAME.json

It does not show: a real network or a real object storage, several hosts, raw media. The run of 29 November
2026 was taken beside other work, a load of 15 on two cores: its cases may be compared with each other alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from latent_loading import write_clips
from result_file import figure, write_result

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.latent_dataset import LatentDataset
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.loader import ClipLoader
from aiprod_ds.data.packed.media import open_source
from aiprod_ds.data.packed.packing import pack_latents
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler
from aiprod_ds.shards.storage import FolderStorage
from aiprod_ds.testing.object_storage import CREDENTIALS, BadLine, web_server

_STRIDES = ModelStrides(spatial=32, temporal=8)
_BATCH = 4
_SHARD_BYTES = 64_000_000
_LINE = BadLine(latency_seconds=0.03, bytes_per_second=20e6)
_BUCKET_NAME = "benchmark"
_ADDRESS = f"s3://{_BUCKET_NAME}/latents"
_BUCKET = BucketPlan(
    frames=9,
    requested_frames=9,
    height=256,
    width=256,
    frame_rate_hz=24.0,
    global_batch_size=_BATCH,
    micro_batch_size=_BATCH,
    accumulation=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What is read: a source, with how many workers, and with which cache (None: none)."""

    name: str
    source: str
    workers: int
    endpoint: str | None = None
    cache: Path | None = None
    cache_gb: float = 0.0
    is_warm: bool = True


def main() -> None:
    """Measures every case in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Latents out of shards against a folder of the same files.")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write; by default the system's temporary folder"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        write_clips(root / "folder", arguments.clips)
        stack.enter_context(patch.dict(os.environ, CREDENTIALS))
        server = stack.enter_context(web_server(root))
        line = stack.enter_context(web_server(root, _LINE))
        shards = root / _BUCKET_NAME / "latents"
        index = pack_latents(root / "folder", FolderStorage(shards), shard_bytes=_SHARD_BYTES)
        gigabytes = sum(size for _, size in index.shards) / 1e9
        cases = list(_cases(root, server.url, line.url, gigabytes))
        rates: dict[str, list[float]] = {case.name: [] for case in cases}
        for _ in range(arguments.runs):
            for case in cases:
                rates[case.name].append(_clips_per_second(case, arguments.clips))
        opening = [_seconds_to_open(root / _BUCKET_NAME / "latents") for _ in range(arguments.runs)]
    rows: list[dict[str, Any]] = [figure(name, "throughput", "clips/s", runs) for name, runs in rates.items()]
    rows.append(figure("shards on a disk", f"opening {arguments.clips} clips", "s", opening))
    write_result(arguments.output, "shards", rows)


def _cases(root: Path, endpoint: str, slow: str, gigabytes: float) -> Iterator[_Case]:
    for workers in (0, 2):
        words = f"num_workers {workers}"
        yield _Case(name=f"folder, {words}", source=str(root / "folder"), workers=workers)
        yield _Case(name=f"shards, {words}", source=str(root / _BUCKET_NAME / "latents"), workers=workers)
        s3 = {"source": _ADDRESS, "endpoint": endpoint, "workers": workers}
        yield _Case(name=f"S3, {words}", **s3, is_warm=False)
        cache = root / f"whole_{workers}"
        yield _Case(name=f"S3, cached, {words}", **s3, cache=cache, cache_gb=2 * gigabytes)
        cache = root / f"half_{workers}"
        yield _Case(name=f"S3, cache of a half, {words}", **s3, cache=cache, cache_gb=gigabytes / 2)
    for workers in (0, 2, 4, 8, 16):
        yield _Case(
            name=f"S3, slow line, num_workers {workers}",
            source=_ADDRESS,
            endpoint=slow,
            workers=workers,
            is_warm=False,
        )


def _open(source: str, settings: StorageConfig) -> LatentDataset:
    needs = LatentNeeds(strides=_STRIDES, with_audio=True)
    manifest = scan_latents(open_source(source, settings), needs)
    assert not manifest.unreadable, manifest.unreadable[:3]
    return LatentDataset(manifest, seed=0, strides=_STRIDES, with_audio=True)


def _seconds_to_open(folder: Path) -> float:
    began = time.perf_counter()
    _open(str(folder), StorageConfig())
    return time.perf_counter() - began


def _clips_per_second(case: _Case, clips: int) -> float:
    settings = StorageConfig(
        endpoint_url=case.endpoint,
        cache_dir=None if case.cache is None else str(case.cache),
        cache_gb=case.cache_gb,
    )
    dataset = _open(case.source, settings)
    # In another order each time: a cache of a half must not get the same half again.
    if case.is_warm:
        _read(dataset, case.workers, clips, seed=1)
    seconds = _read(dataset, case.workers, clips, seed=2)
    if case.cache is not None:
        shutil.rmtree(case.cache)
    return clips // _BATCH * _BATCH / seconds


def _read(dataset: LatentDataset, workers: int, clips: int, *, seed: int) -> float:
    indices: Sequence[int] = tuple(range(clips))
    sampler = PhaseSampler(
        seed=seed, phase=0, buckets=[BucketSamples(indices=indices, global_batch_size=_BATCH)]
    )
    loader = ClipLoader(
        dataset,
        sampler,
        (_BUCKET,),
        rank=0,
        world_size=1,
        start_position=0,
        num_workers=workers,
        augment=True,
        flip=False,
    )
    began = time.perf_counter()
    with closing(loader):
        for _ in islice(loader, clips // _BATCH):
            pass
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
