"""What of a configuration's stages cannot be trained: found in the plan, with the model's own names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.stages.latent_facts import latent_facts
from aiprod_ds.trainers.stages.parts import matches
from aiprod_ds.trainers.stages.rules import stage_problems

CLIP = torch.empty(1, 3, 5, 8, 8, device="meta")
ENCODING = {"enter", "blocks", "moments"}
RAMP = {"start": 0.0, "end": 1e-3, "updates": 2}


class _Plain(nn.Module):
    """A deterministic autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 1)

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Returns the latent."""
        latent: Tensor = self.down(video_BCTHW)
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Returns the clip."""
        clip_BCTHW: Tensor = self.up(latent)
        return clip_BCTHW


class _Tied(_Plain):
    """Decodes with what it encodes with."""

    def decode(self, latent: Tensor) -> Tensor:
        """Returns the clip."""
        return nn.functional.conv_transpose3d(latent, self.down.weight)


class _NotOnMeta(_Plain):
    """Makes a tensor on the CPU inside of its encoder."""

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Returns the latent."""
        return super().encode(video_BCTHW) + torch.ones(1, device="cpu")


def _problems(*phases: dict[str, Any], model: nn.Module | None = None, **loss: Any) -> list[str]:
    values = {
        "output_dir": "unused",
        "model": {"source": "unused"},
        "data": {"train": "unused"},
        "loss": loss,
        "curriculum": {
            "phases": [
                {
                    "name": f"p{index}",
                    "resolution": "8x8",
                    "duration": {"frames": 5},
                    "global_batch_size": 1,
                    "updates": 4,
                    "learning_rate": 1e-3,
                    **phase,
                }
                for index, phase in enumerate(phases)
            ]
        },
    }
    config = VAETrainerConfig.model_validate(values)
    plan = plan_run(config, world_size=1, strides=ModelStrides(spatial=4, temporal=2))
    module = VideoVAE(TinyVideoVAE() if model is None else model)
    return list(stage_problems(config.loss, plan, module=module, clip=CLIP))


def test_latents_depend_on_what_encodes() -> None:
    found = latent_facts(VideoVAE(TinyVideoVAE()), CLIP)
    assert found is not None
    assert {name.split(".")[1] for name in found.depend_on} == ENCODING
    assert found.has_posterior
    plain = latent_facts(VideoVAE(_Plain()), CLIP)
    assert plain is not None
    assert (plain.depend_on, plain.has_posterior) == ({"vae.down.weight", "vae.down.bias"}, False)
    assert latent_facts(VideoVAE(_NotOnMeta()), CLIP) is None


def test_finding_that_out_changes_nothing() -> None:
    module = VideoVAE(TinyVideoVAE())
    module.vae.grow.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    latent_facts(module, CLIP)
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == before


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("decoder.blocks.0.conv.weight", "decoder.blocks.0.conv.weight", True),
        ("decoder.blocks.0.conv.weight", "decoder", True),
        ("decoder.blocks.0.conv.weight", "decoder.blocks.[01]", True),
        ("decoder.blocks.0.conv.weight", "*.conv", True),
        ("decoder.blocks.0.conv.weight", "blocks", False),
        ("decoder.blocks.0.conv.weight", "dec", False),
        ("decoder.blocks.2.conv.weight", "decoder.blocks.[01]", False),
        ("decoder_out.weight", "decoder", False),
    ],
)
def test_a_pattern_is_of_a_layer_or_a_weight(name: str, pattern: str, *, expected: bool) -> None:
    assert matches(name, pattern) == expected


@pytest.mark.parametrize(
    "phases",
    [
        ({},),
        ({}, {"decoder_only": True}),
        (
            {"frozen": ["enter", "blocks.?.norm"]},
            {"decoder_only": True, "latents": "mode", "frozen": ["leave.bias"]},
        ),
        ({"frozen": ["enter", "blocks", "moments"], "latents": "mode"},),
        ({"loss": {"kl_weight": RAMP}}, {"decoder_only": True, "loss": {"kl_weight": 0.0}}),
    ],
)
def test_what_can_be_trained_passes(phases: tuple[dict[str, Any], ...]) -> None:
    assert _problems(*phases) == []


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            ({}, {"frozen": ["blocks", "entr"]}),
            (
                "curriculum.phases[1].frozen[1]: must match a layer or a weight of the model, got 'entr'. "
                "Did you mean 'enter'?"
            ),
        ),
        (
            ({"frozen": ["*"]},),
            (
                "curriculum.phases[0].frozen: must leave something to train, got all 16 weights of the model "
                "frozen. Freeze less."
            ),
        ),
        (
            ({"decoder_only": True, "frozen": ["moments"]},),
            "curriculum.phases[0].frozen[0]: has no effect beside decoder_only, got 'moments'. Remove it.",
        ),
        (
            ({"frozen": ["enter", "blocks"], "latents": "mode"},),
            (
                "curriculum.phases[0].latents: has no effect where weights are trained that latents depend "
                "on, moments.bias for one, got mode. Remove it, or set decoder_only."
            ),
        ),
        (
            ({"decoder_only": True, "loss": {"kl_weight": RAMP}},),
            (
                "curriculum.phases[0].loss.kl_weight: has no effect where nothing is trained that latents "
                "depend on, got a weight that moves. Remove it."
            ),
        ),
        (
            ({}, {"decoder_only": True, "loss": {"kl_weight": 0.5}}),
            (
                "curriculum.phases[1].loss.kl_weight: has no effect where nothing is trained that latents "
                "depend on, got 0.5. Remove it."
            ),
        ),
    ],
)
def test_what_cannot_is_told(phases: tuple[dict[str, Any], ...], message: str) -> None:
    assert _problems(*phases) == [message]


def test_free_bits_of_no_divergence_are_told() -> None:
    why = "has no effect where nothing is trained that latents depend on"
    assert _problems({"decoder_only": True}, kl_free_bits=0.5, kl_weight=0.5) == [
        f"loss.kl_weight: {why}, got 0.5. Remove it.",
        f"loss.kl_free_bits: {why}, got 0.5. Remove it.",
    ]
    assert _problems({}, kl_free_bits=0.5, kl_weight=0.0) == [
        "loss.kl_free_bits: has no effect without kl_weight, got 0.5. Remove it."
    ]
    assert _problems({}, {"decoder_only": True}, kl_free_bits=0.5, kl_weight=0.5) == []


def test_without_a_posterior_there_is_no_divergence() -> None:
    why = "has no effect for a model without a posterior"
    assert _problems({}, model=_Plain()) == [], "the default counts as not given"
    assert _problems({}, model=_Plain(), kl_weight=0.5, kl_free_bits=0.1) == [
        f"loss.kl_weight: {why}, got 0.5. Remove it.",
        f"loss.kl_free_bits: {why}, got 0.1. Remove it.",
    ]
    assert _problems({"loss": {"kl_weight": RAMP}}, model=_Plain()) == [
        f"curriculum.phases[0].loss.kl_weight: {why}, got a weight that moves. Remove it."
    ]
    assert _problems({"decoder_only": True, "latents": "mode"}, model=_Plain()) == [
        "curriculum.phases[0].latents: has no effect on a model without a posterior, got mode. Remove it."
    ]


def test_a_decoder_that_is_the_encoder_leaves_nothing() -> None:
    model = _Tied()
    del model.up
    assert _problems({"decoder_only": True}, model=model) == [
        (
            "curriculum.phases[0].decoder_only: must leave something to train, got all 2 weights of the "
            "model frozen. Freeze less."
        )
    ]


def test_a_model_that_does_not_run_without_weights_is_told_by_name() -> None:
    assert _problems({"frozen": ["down"]}, model=_NotOnMeta()) == []
    assert _problems({"decoder_only": True}, model=_NotOnMeta()) == [
        (
            "curriculum.phases[0].decoder_only: needs a model that runs without weights, so that it is seen "
            "what latents depend on, got one that does not. Name those layers in `frozen`."
        )
    ]
