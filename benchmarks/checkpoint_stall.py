"""How long does training stand still for a checkpoint of LTX-Video 2B with its optimizer state, DeepSpeed's
own against ours?

One process a GPU trains diffusers' LTXVideoTransformer3DModel in its default size (1.92 billion parameters,
random weights, ZeRO-1, bf16, AdamW with fp32 masters: 23 GB of masters and moments) on one batch of noise,
with the trainer's engine and saver. Then, in the same process: DeepSpeed's `save_checkpoint`; ours with
`checkpoint.asynchronous: false`; ours with `true`, in which updates go on until the checkpoint is committed,
and before the first while memory for the copies is got. Every figure begins on an idle GPU. Ours hashes every
byte and brings it to the disk before it counts; DeepSpeed's does neither. Between the cases the files are
deleted and the disk is waited for.

    python benchmarks/checkpoint_stall.py --output benchmarks/results/NAME.json
    deepspeed --num_gpus 2 benchmarks/checkpoint_stall.py --output benchmarks/results/NAME.json

`--tiny` runs a small model in fp32 on any machine, to see that the script works. It does not show: a network
file system, other ZeRO stages, a data loader beside the writer, or a disk that is slower than what training
produces between two saves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.report.environment import peak_rss_bytes, rss_bytes
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.interrupts import Interrupts, SignalWatch
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_GOAL_SECONDS = 1.0
_STALL = "training stands still"
_WARM_UP = 3


def main() -> None:
    """Measures the three ways to save in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Seconds that training stands still for a checkpoint.")
    parser.add_argument("--saves", type=int, default=2, help="asynchronous ones")
    parser.add_argument("--updates", type=int, default=20, help="without a save, for comparison")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder by default")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with dist.process_group():
        made = dist.from_main(lambda: tempfile.mkdtemp(dir=arguments.folder))
        try:
            rows: list[dict[str, Any]] = []
            for found in _Run(arguments, Path(made)).rows():
                rows += found
                if dist.is_main():  # what is measured is kept if a later case fails
                    write_result(arguments.output, "checkpoint_stall", rows)
        finally:
            if dist.is_main():
                shutil.rmtree(made)


class _Run:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        tiny = arguments.tiny
        model = ModelConfig(
            source="LTXVideoTransformer3DModel", config=LTXVideo.tiny_config() if tiny else {}
        )
        device = dist.choose_device()
        module = build_model(model, seed=0, device=str(device))
        self._engine = DeepSpeedEngine(
            module,
            decay_groups(module),
            optimizer=OptimizerConfig(),
            settings=parse_deepspeed_settings(
                _SETTINGS / f"zero1_{'fp32' if tiny else 'bf16'}.json", where="ds_configs"
            ),
            micro_batch_size=1,
            accumulation=1,
        )
        self._engine.set_learning_rate(1e-4)
        dtype, (channels, text) = self._engine.compute_dtype, (4, 16) if tiny else (128, 4096)
        frames, size = (2, 2) if tiny else (3, 16)
        generator = torch.Generator(device=device).manual_seed(dist.rank())

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        self._batch = {
            "hidden_states": noise(1, frames * size * size, channels),
            "encoder_hidden_states": noise(1, 128, text),
            "timestep": torch.full((1,), 500.0, device=device, dtype=dtype),
            "encoder_attention_mask": torch.ones(1, 128, device=device, dtype=dtype),
            "num_frames": frames,
            "height": size,
            "width": size,
            "return_dict": False,
        }
        self._updates = 0

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """Measures one case after the other; the same on every rank."""
        for _ in range(_WARM_UP):
            self._update()
        rate = self._updates_per_second(self._arguments.updates)
        case = f"{self._engine.world_size} ranks" if self._engine.world_size > 1 else "1 rank"
        yield [figure(f"{case}, training", "updates per second without a save", "1/s", [rate])]
        seconds, num_bytes = self._deepspeed()
        own = f"{case}, DeepSpeed's save_checkpoint"
        yield [figure(own, "size", "GB", [num_bytes / 1e9]), figure(own, _STALL, "s", [seconds])]
        with self._saver(asynchronous=False) as saver:
            waited = self._ours(saver, saves=1)
        yield [figure(f"{case}, synchronous", _STALL, "s", [stalled for stalled, _, _ in waited])]
        before = rss_bytes()
        with self._saver(asynchronous=True) as saver:
            delayed, longest = self._reserve(saver, rate)
            yield [
                figure(f"{case}, asynchronous, memory being got", "updates are late by", "s", [delayed]),
                figure(f"{case}, asynchronous, memory being got", "longest update", "s", [longest]),
            ]
            saves = self._ours(saver, saves=self._arguments.saves)
            after = rss_bytes()
        stalls, whole, rates = (list(values) for values in zip(*saves, strict=True))
        yield [figure(f"{case}, asynchronous", _STALL, "s", stalls, goal=_GOAL_SECONDS)]
        copies = "memory of the host that the copies take, a rank"
        yield [
            figure(f"{case}, asynchronous", "seconds until the checkpoint is there", "s", whole),
            figure(f"{case}, asynchronous", "updates per second while it is written", "1/s", rates),
            figure(f"{case}, asynchronous", copies, "GB", [(after - before) / 1e9]),
            figure(f"{case}, everything", "peak resident memory of a rank", "GB", [peak_rss_bytes() / 1e9]),
        ]

    def _update(self) -> None:
        (predicted,) = self._engine(**self._batch)
        self._engine.backward(predicted.float().square().mean())
        self._engine.step()
        self._updates += 1

    def _updates_per_second(self, count: int) -> float:
        began = self._idle()
        for _ in range(count):
            self._update()
        return count / (self._idle() - began)

    def _deepspeed(self) -> tuple[float, int]:
        folder = self._folder / "deepspeed"
        began = self._idle()
        self._engine._engine.save_checkpoint(str(folder), tag="one")
        seconds = self._idle() - began
        dist.barrier()
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self._clear(folder)
        return seconds, num_bytes

    @contextmanager
    def _saver(self, *, asynchronous: bool) -> Iterator[Saver]:
        store = CheckpointStore(self._folder / "ours" / "checkpoints")
        saver = Saver(store=store, config=CheckpointConfig(asynchronous=asynchronous), phase_names=("only",))
        yield saver
        saver.close()

    def _reserve(self, saver: Saver, rate: float) -> tuple[float, float]:
        """Trains while memory is being got; returns how many seconds more that took than at `rate`, and the
        longest update."""
        before, began = self._updates, self._idle()
        longest, last = 0.0, began
        saver.reserve(TrainState(engine=self._engine))
        while dist.from_main(lambda: saver.is_reserving) or self._updates == before:
            self._update()
            now = self._idle()
            longest, last = max(longest, now - last), now
        return last - began - (self._updates - before) / rate, longest

    def _ours(self, saver: Saver, *, saves: int) -> list[tuple[float, float, float]]:
        """Returns, for each save, seconds of standing still, seconds until it is there and updates/s
        meanwhile."""
        folder, found = saver.store.folder.parent, []
        for _ in range(saves):
            if dist.is_main():
                folder.mkdir(exist_ok=True)
            dist.barrier()
            found.append(
                self._save(saver, Interrupts(SignalWatch(), folder, finished=lambda: saver.finished))
            )
            assert dist.from_main(lambda: len(saver.store.names())) == 1
            self._clear(folder)
        return found

    def _save(self, saver: Saver, requests: Interrupts) -> tuple[float, float, float]:
        layout = {"world_size": self._engine.world_size}
        count = self._updates
        clock = Clock(updates=count, phase_updates=count, micro_batches=count, samples=count)
        state = RunState(clock=clock, scheduler={}, fingerprint="", phase_fingerprints=("",), layout=layout)
        began = self._idle()
        saver.save(TrainState(engine=self._engine), state)
        stalled, updates_before = self._idle() - began, self._updates
        resumed, waited = time.perf_counter(), 0.0
        while saver.is_saving:
            self._update()
            requests.agreed()
            waited += _seconds(lambda: saver.advance(requests.finished_by_all))
        ended = self._idle()
        return stalled + waited, ended - began, (self._updates - updates_before) / (ended - resumed)

    def _idle(self) -> float:
        """Waits for all ranks and for the GPU and returns the time."""
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        dist.barrier()
        return time.perf_counter()

    def _clear(self, folder: Path) -> None:
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(folder)
            os.sync()
        dist.barrier()


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
