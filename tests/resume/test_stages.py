"""A video VAE through stages on two ranks: all of it, its decoder alone, all but some layers, with weights
that move; resumed everywhere bit for bit.

In bf16 with an average of the weights and against a discriminator, in fp32 without either, as the local
engine, which is the oracle. Latents are taken of the exported model and of the one the run began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.engine import dist
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.runs import record_of, series, train_and_resume, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

SOURCE = "aiprod_ds.testing.tiny:TinyVideoVAE"
CASES = ("zero2_bf16", "zero3_bf16", "zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32")
USUAL = {("zero3_bf16", "before_decoder"), ("zero3_bf16", "in_part")}
KL_RAMP = {"start": 0.0, "end": 0.5, "updates": 2}
MOTION = {
    "frame_difference_weight": {"start": 0.0, "end": 2.0, "updates": 2},
    "flicker_weight": 0.5,
}
ADVERSARY = {"adversarial_weight": {"start": 0.0, "end": 0.5, "updates": 2}}
PHASES = (
    {"loss": {"kl_weight": KL_RAMP}},
    {"decoder_only": True, "latents": "mode", "loss": MOTION},
    {"frozen": ["enter", "blocks.*.norm", "leave.bias"]},
)
EACH = 2
RESUMES = {"in_all": 1, "before_decoder": 2, "in_decoder": 3, "before_part": 4, "in_part": 5}
FROZEN_FROM_THE_BEGINNING = ({"decoder_only": True}, {"decoder_only": True, "latents": "mode"})
ENCODING = ("enter", "blocks", "moments")
# Ranks and flattened partitions add in another order than one process, and Adam turns rounding of tiny
# gradients into steps of the learning rate's size.
RELATIVE_TOLERANCE = 1e-4

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


RESUMED = [
    pytest.param(case, resumed, marks=() if (case, resumed) in USUAL else pytest.mark.exhaustive)
    for case in CASES
    for resumed in RESUMES
]


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("fp32")])
def test_every_stage_computes_what_the_local_engine_computes(
    runs: dict[str, Any], local: dict[str, Any], case: str
) -> None:
    assert series(runs[case]["whole"], "loss/total") == pytest.approx(
        series(local, "loss/total"), rel=RELATIVE_TOLERANCE
    )


def test_the_function_is_kept_where_other_weights_are_trained(local: dict[str, Any]) -> None:
    assert local["retrained"] == [
        {"trained": ["all weights", "what latents do not depend on"], "relative_difference": 0.0},
        {
            "trained": [
                "what latents do not depend on",
                "all weights but enter, blocks.*.norm, leave.bias",
            ],
            "relative_difference": 0.0,
        },
    ]


def test_weights_move_only_while_they_are_trained(local: dict[str, Any]) -> None:
    """Between the exports of the two runs that end one phase apart."""
    assert local["moved"] == {
        "decoder": ["grow.bias", "grow.weight", "leave.bias", "leave.weight"],
        "part": ["blocks", "grow", "leave.weight", "moments"],
    }


def test_terms_of_a_weight_that_moves_enter_with_it(local: dict[str, Any]) -> None:
    rows = [metrics for _, metrics in local["rows"] if "loss/total" in metrics]
    first, second = rows[0], rows[1]
    assert first["loss/total"] == pytest.approx(first["loss/reconstruction_l1"], rel=1e-6)
    own = second["loss/reconstruction_l1"] + 0.25 * second["loss/kl_free_bits"]
    assert second["loss/total"] == pytest.approx(own, rel=1e-5)
    decoder = rows[EACH]
    expected = decoder["loss/reconstruction_l1"] + 0.5 * decoder["loss/flicker"]
    assert decoder["loss/total"] == pytest.approx(expected, rel=1e-5), "no divergence"
    assert "loss/kl" in decoder, "which is measured"


@pytest.mark.parametrize("kind", ["local", "deepspeed"])
def test_latents_stay_bit_for_bit_through_bf16(
    kind: str, local: dict[str, Any], runs: dict[str, Any]
) -> None:
    found = (local if kind == "local" else runs)["kept"]
    assert found["same_latents"]
    assert found["same_weights"] == sorted(ENCODING)
    assert found["moved"] == ["grow", "leave"]


# Below runs on the ranks.


def run_every_case(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by case the uninterrupted run and its copies resumed at `points`, and what a run that never
    trains the encoder leaves of it."""
    records: dict[str, Any] = {}
    for case in points:
        resumes = {point: RESUMES[point] for point in points[case]}
        records[case] = train_and_resume(partial(_train, case), Path(folder) / case, resumes)
    records["kept"] = _kept(Path(folder) / "kept", kind="deepspeed")
    return records


def run_locally(folder: str) -> dict[str, Any]:
    """Returns the run of the local engine, which weights moved in its last two phases, and what a run that
    never trains the encoder leaves of it."""
    root = Path(folder)
    with without_plots():
        record = _train("zero0_fp32", root / "whole", kind="local")
        exports = []
        for count in (1, 2):
            _train("zero0_fp32", root / f"first_{count}", kind="local", phases=PHASES[:count])
            exports.append(_exported(root / f"first_{count}"))
    exports.append(_exported(root / "whole"))
    decoder, part = (_moved(exports[place], exports[place + 1]) for place in (0, 1))
    frozen = {"blocks.0.norm", "blocks.1.norm", "enter", "leave.bias"}
    assert not any(name.startswith(tuple(frozen)) for name in part)
    heads = {name if name.startswith("leave") else name.split(".")[0] for name in part}
    moved = {"decoder": decoder, "part": sorted(heads)}
    return {**record, "moved": moved, "kept": _kept(root / "kept", kind="local")}


def _kept(folder: Path, *, kind: str) -> dict[str, Any]:
    """Trains decoders alone in bf16 from weights that bf16 does not hold, resumed once."""
    with without_plots():
        train = partial(_train, "zero2_bf16", kind=kind, phases=FROZEN_FROM_THE_BEGINNING)
        train_and_resume(train, folder, {"again": 3})
    dist.barrier()
    original = build_model(ModelConfig(source=SOURCE), seed=0).eval()
    found: dict[str, Any] = {}
    for name in (folder, folder.with_name(f"{folder.name}_again")):
        exported = _exported(name)
        model = TinyVideoVAE().eval()
        model.load_state_dict(exported)
        clip = _clips(1)[0][None]
        with torch.no_grad():
            latents = [each.encode(clip) for each in (model, original)]
        state = {key: value.clone() for key, value in original.state_dict().items()}
        moved = {key.split(".")[0] for key in _moved(state, exported)}
        now = {
            "same_latents": all(map(torch.equal, *latents)),
            "same_weights": sorted({key.split(".")[0] for key in state} - moved),
            "moved": sorted(moved),
        }
        assert not found or found == now, "a resumed run exports the same"
        found = now
    assert any(not torch.equal(value, value.bfloat16().float()) for value in original.state_dict().values())
    return found


def _exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "diffusion_pytorch_model.safetensors")


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def _train(
    case: str,
    folder: Path,
    *,
    kind: str = "deepspeed",
    phases: Sequence[Mapping[str, Any]] = PHASES,
) -> dict[str, Any]:
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = _clips(9)
    config = _config(case, folder, kind, phases)
    summary = VideoVAETrainer(config, dataset=clips[:6], validation=clips[6:]).train(resume="auto")
    record = record_of(summary, folder)
    changes = json.loads((folder / "report.json").read_text())["retrained"]
    return {
        **record,
        "retrained": [{key: change[key] for key in ("trained", "relative_difference")} for change in changes],
    }


def _clips(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 5, 16, 16, generator=generator) * 2 - 1 for _ in range(count)]


def _config(case: str, folder: Path, kind: str, phases: Sequence[Mapping[str, Any]]) -> VAETrainerConfig:
    shared = {
        "resolution": "16x16",
        "duration": {"frames": 5},
        "updates": EACH,
        "learning_rate": 1e-2,
        "global_batch_size": 2,
    }
    is_staged, is_full = phases is not FROZEN_FROM_THE_BEGINNING, case.endswith("bf16")
    loss: dict[str, Any] = {"perceptual_weight": 0.0}
    if is_staged:
        loss |= {"kl_free_bits": 0.01, "kl_reduction": "mean"}
    if is_staged and is_full:
        loss["adversarial"] = {"patch_3d": {"channels": 4, "layers": 1}}
    values = []
    for index, phase in enumerate(phases):
        weights = {**phase.get("loss", {}), **(ADVERSARY if "adversarial" in loss and not index else {})}
        values.append({"name": f"phase{index}", **shared, **phase, "loss": weights})
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": SOURCE},
            "data": {"train": "given_in_code", "num_workers": 0},
            **({"ema": {"half_life_samples": 8}} if is_full else {}),
            "loss": loss,
            "curriculum": {"phases": values},
            "engine": {
                "kind": kind,
                "deepspeed_config": str(_DS_CONFIGS / f"{case}.json"),
            },
            "checkpoint": {"every_updates": 1},
            "evaluation": {"max_clips": 2, "num_pictures": 0},
            "report": {"flush_updates": 1},
        }
    )
