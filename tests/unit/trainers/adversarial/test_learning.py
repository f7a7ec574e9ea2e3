"""What it is for: against a discriminator a tiny model gives back texture that L1 alone smooths away.

Clips are smooth pictures with fine noise that their few latents cannot hold. Under L1 the best answer to it
is its median, nothing; a discriminator tells that from data at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.losses import PatchDiscriminatorConfig, VideoAdversarialConfig, VideoVAELossConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.losses import LossTerms, VideoVAELoss
from aiprod_ds.models.discriminators.judgement import video_discriminators
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.adversarial.adversary import Adversary
from aiprod_ds.trainers.adversarial.critic import Critic
from aiprod_ds.trainers.adversarial.last_layer import LastLayer

CLIPS, SIDE, UPDATES, ALONE = 4, 16, 200, 40
BUCKET = BucketPlan(
    frames=1,
    requested_frames=1,
    height=SIDE,
    width=SIDE,
    frame_rate_hz=None,
    global_batch_size=CLIPS,
    micro_batch_size=CLIPS,
    accumulation=1,
)


@dataclass
class Found:
    """Of one training: energy of fine detail over that of the data, and accuracies at the first updates of
    the discriminator and before the model feels it."""

    energy_ratio: float
    first_accuracy: float = 0.0
    last_accuracy: float = 0.0


@pytest.mark.slow
def test_the_discriminator_learns_and_detail_comes_nearer_to_that_of_the_data() -> None:
    """Measured: 0.044 of the data's energy without and 0.087 with; accuracies 0.77 and 0.99. The model has
    no layer that could draw noise, so it does not come closer than that."""
    plain, against = train(0.0), train(2.0)
    assert against.first_accuracy < 0.85
    assert against.last_accuracy > 0.95
    assert 1.5 * plain.energy_ratio < against.energy_ratio < 1.0


def clips(update: int) -> Tensor:
    generator = torch.Generator().manual_seed(update)
    coarse = torch.rand(CLIPS, 3, 4, 4, generator=generator) - 0.5
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    noise = torch.rand(CLIPS, 3, SIDE, SIDE, generator=generator) - 0.5
    return (smooth + noise).unsqueeze(2)


def energy(video: Tensor) -> float:
    """Returns the mean square of what a 2x2 mean takes away."""
    frames = video.detach()[:, :, 0]
    return float((frames - F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2.0)).square().mean())


def engine(module: torch.nn.Module, rate: float, betas: tuple[float, float]) -> LocalEngine:
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 0}}, where="test")
    own = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(betas=betas, weight_decay=0.0),
        settings=settings,
        micro_batch_size=CLIPS,
        accumulation=1,
    )
    own.set_learning_rate(rate)
    return own


def train(weight: float) -> Found:
    torch.manual_seed(0)
    config = VideoAdversarialConfig(
        patch_3d=None,
        frame_2d=PatchDiscriminatorConfig(channels=8, layers=2),
        warmup_updates=ALONE,
        lecam_weight=0.05,
    )
    module = VideoVAE(TinyVideoVAE())
    critic, last = Critic(video_discriminators(config), config), LastLayer(module, "vae.leave")
    model = engine(module, 3e-3, (0.9, 0.95))
    adversary = Adversary(critic, engine(critic, 5e-4, (0.5, 0.9)), config, last_layer=last, start_phase=None)
    phase = phase_plan(
        updates=UPDATES, loss_weights={"adversarial_weight": weight, "feature_matching_weight": 0.0}
    )
    own_loss = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0, kl_weight=1e-4), None)
    accuracies = []
    for update in range(UPDATES):
        video = clips(update)

        def loss_of(y: Tensor, mean: Tensor, logvar: Tensor, x: Tensor = video) -> LossTerms:
            terms: LossTerms = own_loss(y, x, mean, logvar)
            return terms

        adversary.begin_update(Clock(updates=update), phase=phase, bucket=BUCKET, learning_rate=2e-3)
        seeds = [update * CLIPS + clip for clip in range(CLIPS)]
        terms = adversary.loss(model, (video, seeds), video, loss_of, phase)
        model.backward(terms.total)
        model.step()
        sides = [float(terms.terms[f"discriminator/{side}_accuracy"]) for side in ("real", "fake")]
        accuracies.append(sum(sides) / 2)
    video = clips(UPDATES)
    with torch.no_grad():
        reconstruction = module(video, list(range(CLIPS)))[0]
    return Found(
        energy_ratio=energy(reconstruction) / energy(video),
        first_accuracy=sum(accuracies[:5]) / 5,
        last_accuracy=sum(accuracies[ALONE - 10 : ALONE]) / 10,
    )
