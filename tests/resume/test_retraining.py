"""From LoRA to full and back inside one run, on two ranks at every ZeRO stage: the function is kept, every
moment is resumable.

A tiny LTX-Video trains adapters, then all weights, then smaller adapters. Copies of the run folder whose
later checkpoints were taken away go on, among them the two that a process killed inside a change would find.
One rank on the local engine is the oracle. One case saves while training goes on, with a writer so slow that
the save of a phase's end is under way when the change begins.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.errors import EngineError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import record_of, series, train_and_resume, without_plots
from aiprod_ds.train import phase_change
from aiprod_ds.train.resume import saver as saving
from aiprod_ds.trainers.diffusion import DiffusionTrainer

CASES = ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32", "zero3_bf16")
ASYNCHRONOUS = "zero3_fp32"
WRITER_WAITS_SECONDS = 0.1  # from the save of a phase's end to the change pass a few milliseconds
PHASES = ({"training_mode": "lora", "lora": {"rank": 4}}, {}, {"training_mode": "lora", "lora": {"rank": 2}})
EACH = 2  # updates of a phase; a checkpoint stands at every update
RESUMES = {"before_full": 2, "in_full": 3, "before_smaller": 4}
RESUMED = [
    # the others differ from these in stage, precision and way of saving alone
    pytest.param(case, resumed, marks=() if (number + place) % len(RESUMES) == 0 else pytest.mark.exhaustive)
    for number, case in enumerate([*CASES, "asynchronous"])
    for place, resumed in enumerate(RESUMES)
]
KILLED = "zero2_fp32"
WITHOUT_ADAPTER = "proj_in.weight"

# Ranks and flattened partitions add in another order than one process, and Adam turns rounding of tiny
# gradients into steps of the learning rate's size.
RELATIVE_TOLERANCE = 1e-5

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("case", "resumed"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[str, Any], case: str, resumed: str
) -> None:
    whole, again = runs[case]["whole"], runs[case][resumed]
    assert whole["updates"] == [EACH] * len(PHASES)
    assert len(set(series(whole, "loss/total"))) == EACH * len(PHASES), (
        "otherwise the comparison shows nothing"
    )
    assert again["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert again["sha256"] == whole["sha256"], "parameters and optimizer state"
    assert again["rows"] == whole["rows"], "metrics.jsonl without measured times"


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("fp32")])
@pytest.mark.parametrize("metric", ["loss/total", "gradient/norm", "evaluation/loss"])
def test_every_stage_computes_what_the_local_engine_computes(
    runs: dict[str, Any], local: dict[str, Any], case: str, metric: str
) -> None:
    assert series(runs[case]["whole"], metric) == pytest.approx(
        series(local, metric), rel=RELATIVE_TOLERANCE, abs=0
    )


@pytest.mark.parametrize("case", CASES)
def test_the_function_is_kept_and_the_report_says_so(runs: dict[str, Any], case: str) -> None:
    changes = runs[case]["whole"]["retrained"]
    assert [change["trained"] for change in changes] == [
        ["adapters of rank 4", "all weights"],
        ["all weights", "adapters of rank 2"],
    ]
    into_full, into_adapters = (change["relative_difference"] for change in changes)
    # In bf16 W and B A were rounded apart and their sum is rounded once; new adapters start at zero, so
    # nothing changes at all.
    assert into_full <= (1e-6 if case.endswith("fp32") else 2e-2)
    assert into_adapters == 0.0


def test_a_save_under_way_is_finished_before_the_engine_is_rebuilt(runs: dict[str, Any]) -> None:
    committed = [f"update_{update:06d}" for update in range(1, 2 * EACH + 1)]
    assert runs["asynchronous"]["whole"]["checkpoints_at_changes"] == [committed[:EACH], committed]


def test_saving_while_training_goes_on_changes_no_number(runs: dict[str, Any]) -> None:
    whole, waiting = runs["asynchronous"]["whole"], runs[ASYNCHRONOUS]["whole"]
    assert whole["sha256"] == waiting["sha256"]
    assert whole["rows"] == waiting["rows"]
    assert whole["retrained"] == waiting["retrained"]


def test_weights_move_only_while_they_are_trained(local: dict[str, Any]) -> None:
    assert local["moved"] == [False, True, False]


def test_a_run_killed_inside_a_change_repeats_it(runs: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 dies where the new engine is to be written into: the old one is gone by then."""
    with pytest.raises(EngineError, match="no result of ranks"):
        run_on_ranks(die_inside_the_change, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=600)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("update_*"))
    assert kept == ["update_000001", "update_000002"]
    record = run_on_ranks(finish, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=600)[0]
    whole = runs[KILLED]["whole"]
    assert record["resumed_from"] == ["update_000002"]
    assert (record["sha256"], record["rows"]) == (whole["sha256"], whole["rows"])


# Below runs on the ranks.


def run_every_case(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by case the uninterrupted run and its copies resumed at `points`."""

    def record(case: str, train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        resumes = {point: RESUMES[point] for point in points.get(case, ())}
        return train_and_resume(train, Path(folder) / case, resumes)

    records = {case: record(case, partial(_train, case)) for case in CASES}
    write_as_it_is = saving.write_shards

    def write_late(*arguments: Any) -> Any:
        time.sleep(WRITER_WAITS_SECONDS)
        return write_as_it_is(*arguments)

    saving.write_shards = write_late
    records["asynchronous"] = record("asynchronous", _train_asynchronously)
    return records


def run_locally(folder: str) -> dict[str, Any]:
    """Returns the run of the local engine, and in which phases a weight that never has an adapter moved."""
    seen = [
        build_model(_config("zero0_fp32", Path(folder), "local").model, seed=0)
        .get_parameter(WITHOUT_ADAPTER)
        .detach()
    ]
    retrain_as_it_is = phase_change.retrain

    def watch(engine: Any, *arguments: Any, **settings: Any) -> Any:
        seen.append(engine.read_value(f"transformer.{WITHOUT_ADAPTER}"))
        return retrain_as_it_is(engine, *arguments, **settings)

    phase_change.retrain = watch
    with without_plots():
        record = _train("zero0_fp32", Path(folder) / "local", kind="local")
    seen.append(
        load_file(Path(folder) / "local" / "export" / "base" / "diffusion_pytorch_model.safetensors")[
            WITHOUT_ADAPTER
        ]
    )
    return {**record, "moved": [not torch.equal(before, after) for before, after in pairwise(seen)]}


def die_inside_the_change(folder: str) -> None:
    """Trains until the first change, in which rank 1 kills itself."""
    measure = phase_change._relative_difference

    def die(before: Tensor, after: Tensor) -> float:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(before, after)

    phase_change._relative_difference = die  # type: ignore[assignment]
    _train(KILLED, Path(folder) / "run")


def finish(folder: str) -> dict[str, Any]:
    """Goes on with what is left."""
    with without_plots():
        return _train(KILLED, Path(folder) / "run")


def _train_asynchronously(folder: Path) -> dict[str, Any]:
    """Returns the record of a run, and the checkpoints, committed or not, that it found at each change."""
    found: list[list[str]] = []
    retrain_as_it_is = phase_change.retrain

    def watch(*arguments: Any, **settings: Any) -> Any:
        found.append(sorted(path.name for path in (folder / "checkpoints").glob("update_*")))
        return retrain_as_it_is(*arguments, **settings)

    phase_change.retrain = watch
    record = _train(ASYNCHRONOUS, folder, asynchronous=True)
    phase_change.retrain = retrain_as_it_is
    return {**record, "checkpoints_at_changes": found}


def _train(case: str, folder: Path, *, kind: str = "deepspeed", asynchronous: bool = False) -> dict[str, Any]:
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = _clips(9)
    config = _config(case, folder, kind, asynchronous=asynchronous)
    summary = DiffusionTrainer(config, dataset=clips[:6], validation=clips[6:]).train(resume="auto")
    record = record_of(summary, folder)
    changes = json.loads((folder / "report.json").read_text())["retrained"]
    return {
        **record,
        "retrained": [{key: change[key] for key in ("trained", "relative_difference")} for change in changes],
    }


def _clips(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 2, 2, 2), "prompt_embeds": (3, 16)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def _config(case: str, folder: Path, kind: str, *, asynchronous: bool = False) -> DiffusionTrainerConfig:
    shared = {
        "resolution": "64x64",
        "duration": {"frames": 9},
        "updates": EACH,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
    }
    phases = [{"name": f"phase{index}", **shared, **phase} for index, phase in enumerate(PHASES)]
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
            "data": {"train": "given_in_code", "num_workers": 0},
            "ema": {"half_life_samples": 8},
            "curriculum": {"phases": phases},
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 1, "asynchronous": asynchronous},
            "evaluation": {"max_clips": 2, "noise_levels": [0.25, 0.75], "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
