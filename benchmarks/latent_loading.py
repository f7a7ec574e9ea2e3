"""Does the loader deliver latents as fast as their files can be read?

Writes clips as `aiprod-ds encode` does for LTX-Video at 9 frames of 256x256: video latents 128x2x8x8, audio
latents 64x16 and embeddings of 128 tokens of 4,096, all bf16, 1.1 MB in three files a clip. Then reads them
all, several times in turn:

    plain files     open, read and close each file in the order of the loader, nothing else: the disk's speed for these files
    dataset         `LatentDataset` in one process, clip by clip, every tensor copied once
    loader          `ClipLoader` with 0, 1 and 2 workers, stacked in batches of 16

`cold` evicts the files from the page cache before every pass, `warm` does not. A share of plain reading
compares passes of the same run. Starting the workers counts. Run on an idle machine:

    python benchmarks/latent_loading.py --clips 1000 --runs 3 --output benchmarks/results/NAME.json

It does not show: network file systems, several ranks, pinned memory and copies to a GPU, or a training
process that competes for the processor.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result

from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.latent_dataset import LatentDataset
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    LATENTS,
    LatentShape,
    entry_name,
    entry_path,
    write_entry,
)
from aiprod_ds.data.loader import ClipLoader
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler

_STRIDES = ModelStrides(spatial=32, temporal=8)
_SHAPE = LatentShape(frames=9, height=256, width=256, frame_rate_hz=24.0)
_BATCH = 16
_WORKERS = (0, 1, 2)


def main() -> None:
    """Measures every reader in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Loader of latents against plain reading of the same files.")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write the clips; by default, the system's temporary folder"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        write_clips(root, arguments.clips)
        files = list(root.rglob("*.safetensors"))
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        readers = _readers(root, arguments.clips)
        seconds: dict[tuple[str, str], list[float]] = {
            (cache, name): [] for cache in ("cold", "warm") for name in readers
        }
        for _ in range(arguments.runs):
            for (cache, name), runs in seconds.items():
                runs.append(_timed(readers[name], files if cache == "cold" else []))
        index = [_timed(lambda: _open(root), []) for _ in range(arguments.runs)]
    write_result(arguments.output, "latent_loading", _rows(seconds, index, megabytes, arguments.clips))


def write_clips(root: Path, count: int) -> None:
    """Writes the files of `count` clips."""
    draw = torch.Generator().manual_seed(0)
    facts = {
        "fps": "24.0",
        "media_sha256": "0",
        "media_frames": "48",
        "media_fps": "24.0",
        "media_seconds": "2.0",
    }
    facts |= {"media_height": "720", "media_width": "1280"}
    mask = torch.arange(128) < 40
    for number in range(count):
        clip = f"part{number % 16:02d}/clip_{number:06d}.mp4"
        name = entry_name(clip, _SHAPE)
        latents, sound, prompt = (_noise(draw, *shape) for shape in ((128, 2, 8, 8), (64, 16), (128, 4096)))
        write_entry(
            entry_path(root, LATENTS, name), {"latents": latents}, {**facts, "media_sha256": str(number)}
        )
        write_entry(entry_path(root, AUDIO_LATENTS, name), {"latents": sound}, {"duration": str(9 / 24)})
        write_entry(
            entry_path(root, CONDITIONS, clip), {"prompt_embeds": prompt, "prompt_attention_mask": mask}, {}
        )


def _noise(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw).bfloat16()


def _open(root: Path) -> LatentDataset:
    manifest = scan_latents(root, LatentNeeds(strides=_STRIDES, with_audio=True))
    assert not manifest.unreadable, manifest.unreadable[:3]
    return LatentDataset(manifest, seed=0, strides=_STRIDES, with_audio=True)


def _readers(root: Path, count: int) -> dict[str, Callable[[], None]]:
    dataset = _open(root)
    bucket = BucketPlan(
        frames=_SHAPE.frames,
        requested_frames=_SHAPE.frames,
        height=_SHAPE.height,
        width=_SHAPE.width,
        frame_rate_hz=_SHAPE.frame_rate_hz,
        global_batch_size=_BATCH,
        micro_batch_size=_BATCH,
        accumulation=1,
    )
    sampler = PhaseSampler(
        seed=0, phase=0, buckets=[BucketSamples(indices=tuple(range(count)), global_batch_size=_BATCH)]
    )
    order = [
        sample.sample_index
        for position in range(count // _BATCH)
        for sample in sampler.batch(position).samples
    ]
    clips = [facts.name for facts in dataset.lengths()]
    names = [(clips[index], entry_name(clips[index], _SHAPE)) for index in order]
    files = [
        entry_path(root, source, name)
        for clip, tagged in names
        for source, name in ((LATENTS, tagged), (AUDIO_LATENTS, tagged), (CONDITIONS, clip))
    ]
    request = {"epoch": 0, "frames": 9, "height": 256, "width": 256, "frame_rate_hz": 24.0}

    def plain() -> None:
        for file in files:
            file.read_bytes()

    def one_by_one() -> None:
        for index in order:
            for tensor in dataset[ClipRequest(sample_index=index, **request)].values():
                tensor.clone()  # files are mapped: what is not touched is not read

    def loaded(workers: int) -> None:
        loader = ClipLoader(
            dataset,
            sampler,
            (bucket,),
            rank=0,
            world_size=1,
            start_position=0,
            num_workers=workers,
            augment=True,
            flip=False,
        )
        with closing(loader):
            for _ in islice(loader, count // _BATCH):
                pass

    loaders = {
        f"loader, num_workers {workers}": lambda workers=workers: loaded(workers) for workers in _WORKERS
    }
    return {"plain files": plain, "dataset": one_by_one, **loaders}


def _timed(read: Callable[[], Any], evicted: list[Path]) -> float:
    for path in evicted:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def _rows(
    seconds: dict[tuple[str, str], list[float]], index: list[float], megabytes: float, clips: int
) -> list[dict[str, Any]]:
    used = clips // _BATCH * _BATCH
    rows = [
        figure(
            f"{name}, {cache} cache", "throughput", "MB/s", [megabytes * used / clips / run for run in runs]
        )
        for (cache, name), runs in seconds.items()
    ]
    rows += [
        figure(
            f"{name}, {cache} cache",
            "share of plain reading",
            "%",
            [100 * plain / run for plain, run in pairs],
        )
        for (cache, name), runs in seconds.items()
        if (pairs := list(zip(seconds[cache, "plain files"], runs, strict=True))) and name != "plain files"
    ]
    return [
        *rows,
        figure(
            "scanning the folder, warm cache", "clips per second", "clips/s", [clips / run for run in index]
        ),
    ]


if __name__ == "__main__":
    main()
