"""The diffusion objective against the loss written out: noise and levels drawn here from the documented
streams.

The transformer's last layers are zero, so it predicts a velocity of 0 and the loss is the mean square of eps
- x0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.losses import FlowConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.registry import build_model
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.diffusion_objective import FlowObjective

SEED = 7
PLACES = [(0, 3, 0), (0, 3, 1), (0, 3, 2), (0, 3, 3)]
WEIGHTS = {"video_weight": 1.0, "audio_weight": 0.25}
CLOSE = {"rel": 1e-5}  # fp32 sums of some hundred terms


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    model = build_model(ModelConfig(source="LTX2VideoTransformer3DModel", config=LTX2.tiny_config()), seed=0)
    for name, parameter in model.named_parameters():
        if "proj_out" in name:
            torch.nn.init.zeros_(parameter)
    module = DiffusionModule(model, find_family(model, ModelStrides(spatial=32, temporal=8)))
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 1}}, "test")
    return LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=settings,
        micro_batch_size=4,
        accumulation=1,
    )


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 4, 3, 2, 2, generator=generator),
        "audio_latents": torch.randn(4, 2, 5, 4, generator=generator),
        "prompt_embeds": torch.randn(4, 3, 16, generator=generator),
        "prompt_attention_mask": torch.ones(4, 3, dtype=torch.bool),
        "fps": torch.full((4,), 24.0),
    }


def _loss(engine: LocalEngine, batch: dict[str, Tensor], places: Any = PLACES, **config: Any) -> LossTerms:
    objective = FlowObjective(family=engine.module.family, config=FlowConfig(**config), seed=SEED)  # type: ignore[arg-type]
    with torch.no_grad():
        return objective.loss(engine, batch | objective.draws(batch, places), weights=WEIGHTS)


def _velocity(latents: Tensor, modality: str) -> Tensor:
    """[B,L,D] of what the transformer should answer; the tokens of this model are latent positions with all
    their channels."""
    tokens = latents.flatten(2).transpose(1, 2) if modality == "video" else latents.transpose(1, 2).flatten(2)
    seeds = [stream_seed(SEED, "noise", modality, *place) for place in PLACES]
    noise = torch.stack(
        [torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    return noise - tokens


def test_a_prediction_of_zero_costs_the_mean_square_of_the_velocity(
    engine: LocalEngine, batch: dict[str, Tensor]
) -> None:
    terms = _loss(engine, batch).terms
    video = float(_velocity(batch["latents"], "video").square().mean())
    audio = float(_velocity(batch["audio_latents"], "audio").square().mean())
    assert float(terms["loss/video"]) == pytest.approx(video, **CLOSE)
    assert float(terms["loss/audio"]) == pytest.approx(audio, **CLOSE)
    assert float(terms["loss/total"]) == pytest.approx(video + 0.25 * audio, **CLOSE)
    for modality in ("video", "audio"):
        parts = [float(terms[f"loss/{modality}_s{bucket}_part"]) for bucket in range(4)]
        assert sum(parts) == pytest.approx(float(terms[f"loss/{modality}"]), **CLOSE)


def test_a_given_first_frame_is_not_trained(engine: LocalEngine, batch: dict[str, Tensor]) -> None:
    terms = _loss(engine, batch, first_frame_probability=1.0).terms
    later = _velocity(batch["latents"], "video")[:, 4:]  # a latent frame has 2 x 2 tokens
    assert float(terms["loss/video"]) == pytest.approx(float(later.square().mean()), **CLOSE)
    assert float(terms["loss/audio"]) == float(_loss(engine, batch).terms["loss/audio"])


def test_draws_belong_to_samples_and_not_to_the_batch(engine: LocalEngine, batch: dict[str, Tensor]) -> None:
    together = _loss(engine, batch).terms
    halves = [
        _loss(engine, {name: tensor[part] for name, tensor in batch.items()}, places=PLACES[part]).terms
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name, value in together.items():
        assert float(value) == pytest.approx(float(sum(half[name] for half in halves) / 2), **CLOSE)
    assert float(halves[0]["loss/video"]) != float(halves[1]["loss/video"])


@pytest.mark.parametrize("is_shared", [True, False])
def test_modalities_share_a_level_when_told(
    engine: LocalEngine, batch: dict[str, Tensor], is_shared: bool
) -> None:
    terms = _loss(engine, batch, shared_noise_level=is_shared).terms
    shares = [
        [float(terms[f"loss/{modality}_s{bucket}_share"]) for bucket in range(4)]
        for modality in ("video", "audio")
    ]
    assert (shares[0] == shares[1]) == is_shared


def test_held_out_noise_is_the_same_at_every_level_in_every_run(
    engine: LocalEngine, batch: dict[str, Tensor]
) -> None:
    one = {name: tensor[:1] for name, tensor in batch.items()}
    found = [
        FlowObjective(family=engine.module.family, config=FlowConfig(), seed=seed).held_out(  # type: ignore[arg-type]
            engine, one, place=5, noise_level=level
        )
        for seed in (1, 2)
        for level in (0.125, 0.875)
    ]
    assert all(measures == found[0] for measures in found), (
        "a prediction of zero makes the loss depend on the noise alone"
    )
    noise = torch.randn(
        12, 4, generator=torch.Generator().manual_seed(stream_seed(0, "evaluation_noise", "video", 5))
    )
    velocity = noise - one["latents"][0].flatten(1).transpose(0, 1)
    assert found[0]["video"] == pytest.approx(float(velocity.square().mean()), **CLOSE)
