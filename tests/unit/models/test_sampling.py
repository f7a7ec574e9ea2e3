"""Noise levels, Euler's method and guidance against closed forms, and the way of every family's latents
through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.protocol import LATENTS, Family
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.families.tokens import tokens_of
from aiprod_ds.models.sampling import draw_noise, guided, integrate, noise_levels, sample_latents
from aiprod_ds.testing.families import tiny_batch, tiny_transformer

STRIDES = ModelStrides(spatial=32, temporal=8)
MEAN, DEVIATION = 0.7, 0.4
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_levels_fall_from_1_to_0_and_lean_towards_noise() -> None:
    torch.testing.assert_close(noise_levels(4, shift=3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(noise_levels(4, shift=1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert noise_levels(1, shift=5.0).tolist() == [1.0, 0.0]


def test_the_shift_adds_its_logarithm_to_the_logit() -> None:
    # Oracle: the definition of the time shift by exp(mu); fp32 levels near 1 lose digits in the logit.
    plain, shifted = noise_levels(10, shift=1.0)[1:-1], noise_levels(10, shift=2.5)[1:-1]
    expected = plain.logit() + torch.log(torch.tensor(2.5))
    torch.testing.assert_close(shifted.logit(), expected, rtol=0, atol=1e-5)


def test_a_constant_velocity_is_exact_in_one_interval() -> None:
    worked = integrate(
        lambda *_: {"video": torch.tensor(3.0)}, {"video": torch.tensor(5.0)}, noise_levels(1, shift=1.0)
    )
    assert worked["video"] == 2.0
    sample, noise = _normal(2, 5, 4), _normal(2, 5, 4, seed=1)
    for count in (1, 7):
        found = integrate(
            lambda *_: {"video": noise - sample}, {"video": noise}, noise_levels(count, shift=3.0)
        )["video"]
        torch.testing.assert_close(
            found, sample, rtol=0, atol=1e-6
        )  # rounding of 7 sums of numbers of order 1


def test_data_of_one_point_is_exact_in_one_interval() -> None:
    # Its field (x - m) / s is straight: all noise runs to the point.
    found = integrate(
        lambda state, level: {"video": (state["video"] - MEAN) / level},
        {"video": _normal(100)},
        noise_levels(1, shift=1.0),
    )
    torch.testing.assert_close(found["video"], torch.full((100,), MEAN), rtol=0, atol=1e-6)


def _gaussian_velocity(x: Tensor, level: float) -> Tensor:
    """The exact field E[eps - x0 | x_s = x] of data N(m, d^2), from the joint normal distribution of x0, eps
    and x_s."""
    variance = (1 - level) ** 2 * DEVIATION**2 + level**2
    slope = (level - (1 - level) * DEVIATION**2) / variance
    return slope * (x - (1 - level) * MEAN) - MEAN


def _gaussian_error(count: int, shift: float) -> float:
    """Returns how far the samples are from m + d * eps, to which the exact flow takes the noise eps."""
    noise = {"video": _normal(1000).double()}
    # In fp32 the sums of 800 intervals are off by 1e-5, far below the errors that are compared.
    found = integrate(
        lambda state, level: {"video": _gaussian_velocity(state["video"], level)},
        noise,
        noise_levels(count, shift=shift),
    )
    return float((found["video"] - (MEAN + DEVIATION * noise["video"])).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_gaussian_noise_becomes_gaussian_data(shift: float) -> None:
    errors = {count: _gaussian_error(count, shift) for count in (100, 200, 400, 800)}
    assert errors[800] < 0.01
    for count in (100, 200, 400):  # Euler's method is of first order: half the interval, half the error
        assert errors[count] / errors[2 * count] == pytest.approx(2.0, abs=0.15)


def test_the_state_is_fp32_whatever_the_model_answers() -> None:
    # 1000 intervals of 1/1000 in bf16 would stop moving at 256 rounding steps.
    found = integrate(
        lambda state, _: {"video": torch.ones_like(state["video"], dtype=torch.bfloat16)},
        {"video": torch.ones(3, dtype=torch.bfloat16)},
        noise_levels(1000, shift=1.0),
    )["video"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.zeros(3), rtol=0, atol=1e-5)


def test_guidance_leads_away_from_the_empty_prompt() -> None:
    prompt, empty = {"video": torch.tensor(3.0)}, {"video": torch.tensor(1.0)}
    assert guided(prompt, empty, scale=4.0)["video"] == 9.0
    assert guided(prompt, empty, scale=1.0)["video"] == 3.0
    assert (
        guided({"video": torch.ones(1).half()}, {"video": torch.ones(1).half()}, scale=2.0)["video"].dtype
        == torch.float32
    )


def test_noise_depends_on_its_seed_alone() -> None:
    both = draw_noise({"video": (4, 2, 3, 3), "audio": (2, 7)}, {"video": 1, "audio": 2})
    assert {name: tuple(value.shape) for name, value in both.items()} == {
        "video": (1, 4, 2, 3, 3),
        "audio": (1, 2, 7),
    }
    assert torch.equal(draw_noise({"audio": (2, 7)}, {"audio": 2})["audio"], both["audio"])
    assert not torch.equal(draw_noise({"audio": (2, 7)}, {"audio": 1})["audio"], both["audio"])


@each_family
def test_every_family_gets_tokens_levels_and_prompts_and_gives_latents_back(
    family_type: type[Family],
) -> None:
    """The module knows the point to which each prompt leads; guidance then ends at empty + scale * (point -
    empty)."""
    family = find_family(tiny_transformer(family_type), STRIDES)
    batch = tiny_batch()
    shapes = {modality: tuple(batch[LATENTS[modality]].shape[1:]) for modality in family.modalities}
    ends = {name: {modality: _normal(1, *shape, seed=seed) for modality, shape in shapes.items()} for name, seed in  # noqa: E501
            (("prompt", 5), ("empty", 6))}  # fmt: skip
    calls: list[str] = []

    def module(
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Any,
    ) -> Any:
        name = "prompt" if tensors["prompt_embeds"].item() == 1 else "empty"
        calls.append(name)
        assert tensors["fps"].tolist() == [24.0]
        points = {
            modality: tokens_of(end, grids[modality].patch).values for modality, end in ends[name].items()
        }
        assert all(levels.shape == (1, 1) for levels in timesteps.values())
        return {
            modality: (noisy[modality] - points[modality]) / timesteps[modality][..., None]
            for modality in noisy
        }

    found = sample_latents(
        module,
        family,
        noise=draw_noise(shapes, {"video": 1, "audio": 2}),
        fps=torch.tensor([24.0]),
        prompt={"prompt_embeds": torch.tensor(1)},
        empty_prompt={"prompt_embeds": torch.tensor(0)},
        levels=noise_levels(3, shift=3.0),
        guidance_scale=2.5,
    )
    assert calls == ["prompt", "empty"] * 3
    for modality, latents in found.items():
        empty, point = ends["empty"][modality], ends["prompt"][modality]
        # fp32 rounding, enlarged by the division by levels down to 0.6 and the scale.
        torch.testing.assert_close(latents, empty + 2.5 * (point - empty), rtol=0, atol=1e-5)


@each_family
def test_guidance_of_1_needs_no_empty_prompt_and_half_the_forwards(family_type: type[Family]) -> None:
    transformer = tiny_transformer(family_type).eval()
    family = find_family(transformer, STRIDES)
    batch = {name: tensor[:1] for name, tensor in tiny_batch().items()}
    shapes = {modality: tuple(batch[LATENTS[modality]].shape[1:]) for modality in family.modalities}
    prompt = {name: batch[name] for name in ("prompt_embeds", "prompt_attention_mask")}
    forwards: list[int] = []
    transformer.register_forward_hook(lambda *_: forwards.append(1))
    common: dict[str, Any] = {
        "noise": draw_noise(shapes, {"video": 1, "audio": 2}),
        "fps": batch["fps"],
        "prompt": prompt,
    }
    common["levels"] = noise_levels(2, shift=3.0)
    with torch.no_grad():
        module = DiffusionModule(transformer, family)
        plain = sample_latents(module, family, empty_prompt=None, guidance_scale=4.0, **common)
        assert len(forwards) == 2
        same = sample_latents(module, family, empty_prompt=prompt, guidance_scale=4.0, **common)
        assert len(forwards) == 6
    assert {name: tuple(value.shape[1:]) for name, value in plain.items()} == shapes
    for modality, latents in plain.items():
        assert latents.dtype == torch.float32
        torch.testing.assert_close(same[modality], latents, rtol=0, atol=1e-5)  # v + 4 * (v - v) is v
