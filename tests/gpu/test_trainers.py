"""Training on a GPU through the trainer: captured or not it is the same bit for bit, and so is a resumed run.

A tiny LTX-Video trains in two phases of two shapes, in bf16, with an average of its weights. One process runs
every case; the tests read its records.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.engine.adamw import OnePassAdamW
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import record_of, series, train_and_resume
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.trainers.diffusion import DiffusionTrainer

EDGE, LAST = 4, 8
RESUMES = {"middle": 2, "edge": EDGE, "late": 6}
GRAPHS = ("off", "passes")
STAGES = (0, 1, 2)
_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.gpu, pytest.mark.dist]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = {"DS_ACCELERATOR": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return run_on_ranks(measure, ranks=1, timeout_seconds=600, environment=environment)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_captured_passes_train_the_same_bit_for_bit(measured: dict[str, Any], stage: int) -> None:
    off, passes = (measured["runs"][f"{stage}-{graphs}"]["whole"] for graphs in GRAPHS)
    assert len(set(series(off, "loss/total"))) == LAST, "otherwise the comparison shows nothing"
    assert passes["rows"] == off["rows"]
    assert passes["sha256"] == off["sha256"]


@pytest.mark.parametrize("resumed", RESUMES)
@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    measured: dict[str, Any], stage: int, graphs: str, resumed: str
) -> None:
    found = measured["runs"][f"{stage}-{graphs}"]
    assert found[resumed]["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert found[resumed]["rows"] == found["whole"]["rows"]
    assert found[resumed]["sha256"] == found["whole"]["sha256"]


@pytest.mark.parametrize("graphs", GRAPHS)
def test_nothing_in_an_update_waits_for_the_device(measured: dict[str, Any], graphs: str) -> None:
    assert measured["waits"]["canary"], "torch tells of those that do"
    assert measured["waits"][graphs] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_of_adamw_computes_what_torch_does(measured: dict[str, Any], dtype: str) -> None:
    found = measured["adamw"][dtype]
    assert found["moved"] > 0.1
    # Some roundings of fp32 an update, over five.
    assert found["difference"] < 2e-6
    assert found["is_rounded"]
    assert found["skipped_changes"] == 0
    assert found["steps"] == 5


# Below runs on the rank.


def measure() -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        runs = {
            f"{stage}-{graphs}": train_and_resume(
                partial(_train, stage, graphs), Path(folder) / f"{stage}-{graphs}", RESUMES
            )
            for stage in STAGES
            for graphs in GRAPHS
        }
        waits: dict[str, list[str]] = {
            graphs: _waits(graphs, Path(folder) / f"waits_{graphs}") for graphs in GRAPHS
        }
    with _waits_told(canary := []):
        torch.zeros(1, device="cuda").item()
    waits["canary"] = canary
    return {
        "runs": runs,
        "waits": waits,
        "adamw": {str(dtype).split(".")[1]: _adamw(dtype) for dtype in (torch.float32, torch.bfloat16)},
    }


def _train(
    stage: int, graphs: str, folder: Path, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    clips = [
        {
            "latents": torch.randn(4, 2, 4, 4, generator=generator),
            "prompt_embeds": torch.randn(3, 16, generator=generator),
            "prompt_attention_mask": torch.tensor([True, True, False]),
        }
        for _ in range(8)
    ]
    trainer = DiffusionTrainer(
        _config(stage, graphs, folder, changes), dataset=clips[:6], validation=clips[6:]
    )
    return record_of(trainer.train(resume="auto"), folder)


def _waits(graphs: str, folder: Path) -> list[str]:
    """Returns where updates waited for the device, from the third of each phase on."""
    found: list[str] = []
    update = TrainingLoop._update

    def told(self: TrainingLoop, entered: Any) -> float | None:
        if self.clock.phase_updates < 2:  # compiles, captures and measures memory
            return update(self, entered)
        with _waits_told(found):
            return update(self, entered)

    with patch.object(TrainingLoop, "_update", told):
        _train(1, graphs, folder, {"report": {"flush_updates": 100}, "checkpoint": {"every_updates": 100}})
    return found


@contextmanager
def _waits_told(found: list[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


def _config(stage: int, graphs: str, folder: Path, changes: Mapping[str, Any]) -> DiffusionTrainerConfig:
    phase = {"resolution": "128x128", "duration": {"frames": 9}, "updates": EDGE, "learning_rate": 1e-3}
    return DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "LTXVideoTransformer3DModel", "config": LTXVideo.tiny_config()},
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 32,
                "temporal_stride": 8,
            },
            "data": {"train": "given_in_code", "num_workers": 0},
            "ema": {"half_life_samples": 8},
            "curriculum": {
                "phases": [
                    {"name": "early", "global_batch_size": 4, **phase},
                    {"name": "late", "global_batch_size": 6, "accumulation": 3, **phase},
                ]
            },
            "engine": {"deepspeed_config": str(_DS_CONFIGS / f"zero{stage}_bf16.json")},
            "checkpoint": {"every_updates": 2},
            "performance": {"compile": "off", "graphs": graphs, "deterministic": True},
            "evaluation": {"max_clips": 2, "noise_levels": [0.5], "num_pictures": 0},
            "report": {"flush_updates": 2},
            **changes,
        }
    )


def _adamw(dtype: torch.dtype) -> dict[str, Any]:
    """Returns how far five updates of the kernel are from those of torch's AdamW; a sixth has a bad norm."""
    torch.manual_seed(0)
    sizes = (4096, 1000, 33)
    master = torch.randn(sum(sizes) + 3, device="cuda")
    own, weights = master.clone(), torch.zeros_like(master, dtype=dtype)
    theirs = master.clone().requires_grad_()
    expected = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    optimizer = OnePassAdamW([{"params": [own]}], betas=(0.9, 0.999), epsilon=1e-8, fused=True)
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.1)
    for _ in range(5):
        gradients = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
        optimizer.expect(torch.tensor(4.0, device="cuda"), clip_norm=2.0)
        optimizer.update(0, gradients, weights)
        theirs.grad = torch.cat([*gradients, torch.zeros(3, device="cuda", dtype=dtype)]).float() / 2
        expected.step()
    kept: list[Tensor] = [own.clone(), weights.clone()]
    optimizer.expect(torch.tensor(torch.nan, device="cuda"), clip_norm=2.0)
    optimizer.update(
        0, [torch.full((size,), torch.nan, device="cuda", dtype=dtype) for size in sizes], weights
    )
    parts = own[: sum(sizes)]  # padding is not updated
    return {
        "moved": float((parts - master[: sum(sizes)]).abs().max()),
        "difference": float((parts - theirs[: sum(sizes)]).detach().abs().max()),
        "is_rounded": torch.equal(weights[: sum(sizes)], parts.to(dtype)),
        "skipped_changes": int((own != kept[0]).sum() + (weights != kept[1]).sum()),
        "steps": float(optimizer.state[own]["step"]),
    }
