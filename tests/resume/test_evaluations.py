"""Evaluations inside phases on two ranks: training with them is training without them, and a signal ends a
slow one within seconds.

A process that has joined no group forks the ranks (`testing.forked`) and writes down what it saw; the tests
below read that. The oracle is the run that nobody evaluates, or stops, compared bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.testing.dist import run_forked

INTERRUPTED = 75
UPDATES, EVERY = 6, 2
CASES = ("zero1_bf16", "zero3_fp32")
PREVIEWS = "previews"
CLIPS = 16
SLOW_SECONDS = 4.0  # for each of 8 clips on a rank: 32 s in all, longer than a batch system waits
ALLOWED_SECONDS = 25.0

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {"folder": str(tmp_path_factory.mktemp("evaluations"))}
    found: dict[str, Any] = run_forked(serve, arguments=arguments, timeout_seconds=600)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_evaluations_is_the_run_without(outcome: dict[str, Any], case: str) -> None:
    without, evaluated = outcome[case]["without"], outcome[case]["evaluated"]
    assert [place for place in evaluated["evaluations"] if place[1] == "interval"] == [
        [update, "interval"] for update in range(EVERY, UPDATES, EVERY)
    ]
    assert not [place for place in without["evaluations"] if place[1] == "interval"]
    assert evaluated["sha256"] == without["sha256"]
    assert evaluated["rows"] == without["rows"]


def test_a_run_with_previews_of_own_prompts_is_the_run_without(outcome: dict[str, Any]) -> None:
    without, evaluated = outcome[PREVIEWS]["without"], outcome[PREVIEWS]["evaluated"]
    assert evaluated["sha256"] == without["sha256"]
    assert evaluated["rows"] == without["rows"]
    assert evaluated["prompts"] == [["a red cat", "a dog", "a bird"]] * 4, "before, at 2, at 4, at the end"
    assert evaluated["measures"][1:3] == [{}, {}]


def test_a_stop_between_two_sampling_steps_leaves_the_previews(outcome: dict[str, Any]) -> None:
    assert outcome[PREVIEWS]["codes"] == [INTERRUPTED] * 2
    resumed, whole = outcome[PREVIEWS]["resumed"], outcome[PREVIEWS]["evaluated"]
    for key in ("sha256", "rows", "evaluations", "measures", "prompts"):
        assert resumed[key] == whole[key], key


def test_a_signal_ends_a_slow_evaluation_in_time(outcome: dict[str, Any]) -> None:
    stopped = outcome["stopped"]
    assert stopped["codes"] == [INTERRUPTED] * 2
    assert stopped["seconds"] < ALLOWED_SECONDS < SLOW_SECONDS * CLIPS / 2
    assert stopped["saved"] == EVERY, "the update that was to be evaluated"
    assert [EVERY, "interval"] not in stopped["evaluations"]


def test_the_stopped_run_goes_on_like_one_that_nobody_stopped(outcome: dict[str, Any]) -> None:
    resumed, whole = outcome["resumed"], outcome[CASES[-1]]["evaluated"]
    assert resumed["resumed_from"] == [f"update_{EVERY:06d}"]
    for key in ("sha256", "rows", "evaluations", "measures"):
        assert resumed[key] == whole[key], key


# Below runs in the server and in the ranks that it forks.


def serve(folder: str) -> dict[str, Any]:
    """Trains each case with and without evaluations, stops one of them inside an evaluation and goes on."""
    from aiprod_ds.checkpoint.store import CheckpointStore
    from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

    runs = Path(folder)
    found: dict[str, Any] = {}
    for case in CASES:
        found[case] = {}
        for name, every in (("without", None), ("evaluated", EVERY)):
            run = runs / f"{case}_{name}"
            assert wait_for_ranks(fork_ranks(partial(_train, run, case, every), ranks=2)) == [0, 0]
            found[case][name] = _result(run)
    run, case = runs / "stopped", CASES[-1]
    processes = fork_ranks(partial(_train, run, case, EVERY, is_slow=True), ranks=2)
    while not (runs / "evaluating").exists():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(processes[1], signal.SIGTERM)
    codes = wait_for_ranks(processes)
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    found["stopped"] = {
        "codes": codes,
        "seconds": time.monotonic() - began,
        "saved": newest.state.clock.updates,
        "evaluations": _evaluations(run),
    }
    assert wait_for_ranks(fork_ranks(partial(_train, run, case, EVERY), ranks=2)) == [0, 0]
    found["resumed"] = _result(run)
    found[PREVIEWS] = {}
    for name, every in (("without", None), ("evaluated", EVERY)):
        run = runs / f"previews_{name}"
        assert wait_for_ranks(fork_ranks(partial(_sample, run, every), ranks=2)) == [0, 0]
        found[PREVIEWS][name] = _result(run)
    run = runs / "previews_stopped"
    found[PREVIEWS]["codes"] = wait_for_ranks(fork_ranks(partial(_sample, run, EVERY, stop_at=30), ranks=2))
    assert wait_for_ranks(fork_ranks(partial(_sample, run, EVERY), ranks=2)) == [0, 0]
    found[PREVIEWS]["resumed"] = _result(run)
    return found


def _train(run: Path, case: str, every: int | None, *, is_slow: bool = False) -> int:
    import torch

    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.data.synthetic import SyntheticVideoDataset
    from aiprod_ds.engine import dist
    from aiprod_ds.report.summary import RunStatus
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    class Slow(SyntheticVideoDataset):
        """From the second evaluation on, a rank's clips take long."""

        reads = 0

        def __getitem__(self, index: int) -> torch.Tensor:
            self.reads += 1
            if is_slow and self.reads > CLIPS + CLIPS // 2:  # lengths, and the evaluation before training
                (run.parent / "evaluating").touch()
                time.sleep(SLOW_SECONDS)
            return super().__getitem__(index)

    with dist.process_group(timeout_seconds=60), without_plots():
        logging.getLogger("aiprod_ds").setLevel(logging.WARNING)
        torch.manual_seed(0)
        phase = {"name": "only", "resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 4}
        values = {
            "output_dir": str(run),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
            "curriculum": {"phases": [{**phase, "updates": UPDATES, "learning_rate": 1e-3}]},
            "engine": {"deepspeed_config": str(Path(__file__).parents[2] / "ds_configs" / f"{case}.json")},
            "ema": {"half_life_samples": 8},
            "checkpoint": {"every_updates": 1000},
            "evaluation": {"max_clips": CLIPS, "num_pictures": 1, "every_updates": every},
            "report": {"flush_updates": 1},
        }
        clips = {
            "dataset": SyntheticVideoDataset(8, 5, 16, 16),
            "validation": Slow(CLIPS, 5, 16, 16, seed=1),
        }
        config = VAETrainerConfig.model_validate(values)
        summary = VideoVAETrainer(config, model=TinyVideoVAE(), **clips).train(resume="auto")
    return 0 if summary.status is RunStatus.COMPLETED else INTERRUPTED


def _sample(run: Path, every: int | None, *, stop_at: int | None = None) -> int:
    """Trains a diffusion transformer with ZeRO-3; at `stop_at` forwards of sampling it asks for an end."""
    import torch

    from aiprod_ds.config.diffusion import DiffusionTrainerConfig
    from aiprod_ds.engine import dist
    from aiprod_ds.models.families.ltx import LTXVideo
    from aiprod_ds.report.summary import RunStatus
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.train import interrupts
    from aiprod_ds.trainers import preview
    from aiprod_ds.trainers.diffusion import DiffusionTrainer

    interrupts.LOOK_SECONDS = 0.0
    real, made = preview.sample_latents, 0

    def sampled(forward: Any, *arguments: Any, **options: Any) -> Any:
        def counted(*inputs: Any) -> Any:
            nonlocal made
            made += 1
            if made == stop_at:
                (run / "STOP").touch()
            return forward(*inputs)

        return real(counted, *arguments, **options)

    preview.sample_latents = sampled  # type: ignore[assignment]
    text = {
        "source": "T5EncoderModel",
        "config": {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "max_tokens": 16,
    }
    with dist.process_group(timeout_seconds=60), without_plots():
        logging.getLogger("aiprod_ds").setLevel(logging.WARNING)
        generator = torch.Generator().manual_seed(0)
        shapes = {"latents": (4, 3, 4, 4), "prompt_embeds": (3, 16)}
        clips = [
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            for _ in range(8)
        ]
        phase = {"name": "only", "resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 4}
        own = {"prompts": ["a red cat", "a dog", "a bird"], "text": text, "every_updates": every}
        values = {
            "output_dir": str(run),
            "model": {"source": LTXVideo.transformer_class, "config": LTXVideo.tiny_config()},
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 4,
                "temporal_stride": 2,
            },
            "data": {"train": "unused", "num_workers": 0},
            "curriculum": {"phases": [{**phase, "updates": UPDATES, "learning_rate": 1e-3}]},
            "engine": {"deepspeed_config": str(Path(__file__).parents[2] / "ds_configs" / "zero3_fp32.json")},
            "ema": {"half_life_samples": 8},
            "checkpoint": {"every_updates": 1000},
            "evaluation": {"max_clips": 2, "num_pictures": 0, "noise_levels": [0.5]},
            "preview": {
                "num_forwards": 5,
                "guidance_scale": 2.0,
                "decode_precision": "fp32",
                **(own if every else {}),
            },
            "report": {"flush_updates": 1},
        }
        config = DiffusionTrainerConfig.model_validate(values)
        summary = DiffusionTrainer(config, dataset=clips[:6], validation=clips[6:]).train(resume="auto")
    return 0 if summary.status is RunStatus.COMPLETED else INTERRUPTED


def _result(run: Path) -> dict[str, Any]:
    from aiprod_ds.metrics.evaluations import read_evaluations
    from aiprod_ds.testing.runs import repeatable_rows

    report = json.loads((run / "report.json").read_text())
    return {
        "sha256": report["final_state_sha256"],
        "resumed_from": report["resumed_from"],
        "rows": [row for row in repeatable_rows(run) if "loss/total" in row[1]],
        "evaluations": _evaluations(run),
        "measures": [dict(record.metrics) for record in read_evaluations(run)],
        "prompts": [
            [medium.prompt for medium in record.media if medium.role == "preview"]
            for record in read_evaluations(run)
        ],
    }


def _evaluations(run: Path) -> list[list[Any]]:
    from aiprod_ds.metrics.evaluations import read_evaluations

    return [[record.update, record.reason] for record in read_evaluations(run)]
