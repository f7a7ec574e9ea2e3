"""The posterior's noise: drawn beside training, and what the module would draw itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.data.sampler import SampleRef
from aiprod_ds.errors import EngineError
from aiprod_ds.models.posterior import draw_latent
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.posterior_noise import PosteriorNoise

SHAPE = (3, 5, 16, 16)
PLACES = [(1, 7, 30), (1, 7, 31)]


def _noise(module: nn.Module, **values: object) -> PosteriorNoise:
    return PosteriorNoise(module, name="video", shapes=[SHAPE], dtype=torch.float32, seed=3, **values)


def _batch(tensors: dict[str, Tensor]) -> MicroBatch:
    samples = [SampleRef(sample_index=0, epoch=0, ordinal=ordinal) for _, _, ordinal in PLACES]
    return MicroBatch(tensors=tensors, samples=samples, bucket=0, position=7)


def test_what_is_drawn_beside_training_is_what_the_module_draws() -> None:
    module = VideoVAE(TinyVideoVAE())
    noise, video = _noise(module), torch.randn(2, *SHAPE)
    drawn = noise.draws({"video": video}, PLACES)
    assert list(drawn) == ["noise/posterior"]
    given = noise.of(_batch({"video": video, **drawn}), 1, torch.device("cpu"))
    seeds = noise.of(_batch({"video": video}), 1, torch.device("cpu"))
    assert isinstance(given, Tensor)
    assert isinstance(seeds, list)
    for one, other in zip(module(video, given), module(video, seeds), strict=True):
        assert torch.equal(one, other)


def test_a_clip_of_an_unknown_shape_is_left_to_the_module() -> None:
    assert _noise(VideoVAE(TinyVideoVAE())).draws({"video": torch.zeros(1, 3, 9, 16, 16)}, PLACES[:1]) == {}


def test_a_model_that_cannot_be_asked_is_left_to_itself() -> None:
    class Stubborn(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("needs values")

    assert _noise(Stubborn()).draws({"video": torch.zeros(2, *SHAPE)}, PLACES) == {}


def test_a_deterministic_autoencoder_gets_none() -> None:
    class Plain(nn.Module):
        def forward(self, video: Tensor) -> tuple[Tensor, Tensor, None]:
            return video, video, None

    assert _noise(Plain()).draws({"video": torch.zeros(2, *SHAPE)}, PLACES) == {}


def test_noise_of_another_shape_is_refused() -> None:
    encoded = (torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(
        EngineError, match=r"posterior noise: must have the latent's shape \(2, 4\), got \(2, 5\)"
    ):
        draw_latent(encoded, torch.zeros(2, 5))
