"""Two ranks that take differently long: no collective runs out of time, errors reach every rank, and clips
are those of one.

The groups here have a time-out of 4 s; one rank works for 9. The control without `together` runs into it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.sample import PreviewConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import AiprodError, DataError, EngineError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.families import tiny_batch, tiny_transformer
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.preview import Previews, held_out_items

TIMEOUT_SECONDS, WORK_SECONDS = 4.0, 9.0
CONFIG = PreviewConfig(num_forwards=2, decode_precision="fp32")
NUM_ITEMS = 3  # ranks have 2 and 1

pytestmark = pytest.mark.dist


class SlowVAE(TinyVideoVAE):
    """Decodes for longer than the group waits, on rank 1."""

    def decode(self, latent: Tensor) -> Tensor:
        if dist.rank() == 1:
            time.sleep(WORK_SECONDS)
        return super().decode(latent)


def work_apart() -> dict[str, Any]:
    """Rank 1 works for longer than the group waits; then each kind of failure, and whether the group still
    works."""
    _shorten_timeout()
    dist.barrier()
    began = time.monotonic()
    outcome = dist.together(lambda: _sleep(WORK_SECONDS) if dist.rank() == 1 else "quick")
    seconds = time.monotonic() - began
    return {
        "outcome": outcome,
        "seconds": seconds,
        "known": _error_of(lambda: _raise(DataError("clip 7: must be whole, got half."))),
        "unknown": _error_of(lambda: _raise(ValueError("seven"))),
        "sum": sum(dist.gather_objects(dist.rank() + 1)),
    }


def wait_in_a_collective() -> bool:
    _shorten_timeout()
    if dist.rank() == 1:
        time.sleep(WORK_SECONDS)
    return dist.all_agree(True)


def make_previews(zero_stage: int, vae: str) -> dict[str, Any]:
    """Returns what the main rank would write, hashed, and how long it took after the first forward."""
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine

    module = _module()
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": zero_stage}}, where="test")
    batch = {"micro_batch_size": 1, "accumulation": 1}
    engine = DeepSpeedEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=settings,
        device=torch.device("cpu"),
        **batch,
    )
    engine.eval()
    _shorten_timeout()
    dist.barrier()
    began = time.monotonic()
    clips = _clips(engine, module, vae)
    return {"clips": clips, "seconds": time.monotonic() - began}


def _module() -> DiffusionModule:
    transformer = tiny_transformer(LTXVideo)
    return DiffusionModule(transformer, find_family(transformer, ModelStrides(spatial=4, temporal=2)))


def _clips(engine: Engine, module: DiffusionModule, vae: str) -> list[str] | None:
    """Returns the hash of every clip's stills; None where there are no examples."""
    items = [{name: tensor[0] for name, tensor in tiny_batch(seed=seed).items()} for seed in range(NUM_ITEMS)]
    empty = {"prompt_embeds": torch.zeros(6, 16), "prompt_attention_mask": torch.arange(6) < 1}
    decoder = LatentDecoder(ModelConfig(source=vae), None, CONFIG, seed=0)
    previews = Previews(CONFIG, family=module.family, decoder=decoder, empty_prompt=empty, seed=0)
    examples: Any = previews.make(engine, held_out_items(items, [""] * NUM_ITEMS))
    return (
        None
        if examples is None
        else [hashlib.sha256(clip.stills.tobytes()).hexdigest() for clip in examples.clips]
    )


def _shorten_timeout() -> None:
    torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_SECONDS))


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slow"


def _raise(error: Exception) -> None:
    if dist.rank() == 1:
        raise error


def _error_of(work: Callable[[], None]) -> str:
    try:
        dist.together(work)
    except (AiprodError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_a_rank_that_works_longer_than_the_timeout_does_not_trip_it() -> None:
    quick, slow = run_on_ranks(work_apart, ranks=2, timeout_seconds=120)
    assert (quick["outcome"], slow["outcome"]) == ("quick", "slow")
    assert quick["seconds"] > 2 * TIMEOUT_SECONDS, "the quick rank has waited, for longer than the group does"
    assert quick["known"] == slow["known"] == "DataError: clip 7: must be whole, got half."
    assert slow["unknown"] == "ValueError: seven"
    assert (
        quick["unknown"]
        == "EngineError: rank 1: must finish its part of the work, got ValueError: seven. Read its log."
    )
    assert quick["sum"] == slow["sum"] == 3, "after an error the group can still be used"


def test_the_same_wait_in_a_collective_does_trip_it() -> None:
    with pytest.raises(EngineError, match=r"(?is)no result of ranks .*(timed out|timeout)"):
        run_on_ranks(wait_in_a_collective, ranks=2, timeout_seconds=120)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The clips of one process with the plain engine."""
    module = _module()
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 0}}, where="test")
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=settings,
        micro_batch_size=1,
        accumulation=1,
    )
    engine.eval()
    clips = _clips(engine, module, "aiprod_ds.testing.tiny:TinyVideoVAE")
    assert clips is not None
    assert len(set(clips)) == NUM_ITEMS
    return clips


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_make_the_clips_of_one_however_long_one_decodes(
    expected: list[str], zero_stage: int
) -> None:
    vae = f"{Path(__file__).stem}:SlowVAE"
    main, other = run_on_ranks(
        make_previews, ranks=2, arguments={"zero_stage": zero_stage, "vae": vae}, timeout_seconds=200
    )
    assert main["clips"] == expected, "bitwise: fp32 on one thread, the same kernels"
    assert other["clips"] is None
    assert main["seconds"] > 2 * TIMEOUT_SECONDS, "the quick rank has waited, for longer than the group does"
