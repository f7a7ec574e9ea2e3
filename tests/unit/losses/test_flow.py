"""Flow matching: worked numbers, the distribution of noise levels, conditioning, padding, independence of the
batch."""

import pytest
import torch
from scipy.stats import kstest, norm

from aiprod_ds.config.losses import FlowConfig, NoiseLevelConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses.flow import bucket_terms, draw_noise, first_frame_mask, flow_losses, noised
from aiprod_ds.losses.noise_level import draw_noise_levels, noise_level_shift
from aiprod_ds.metrics.recorder import with_quotients


def _latents(batch=4, tokens=6, channels=8, dtype=torch.float32):
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def _noise(latents, seeds):
    return draw_noise(latents.shape[1:], seeds=seeds)


@pytest.mark.parametrize(
    ("tokens", "shift"),
    [(1024, 0.95), (4096, 2.05), (2560, 1.5), (6749, 2.9999674), (6750, 3.0), (1, 0.58370)],
)
def test_shift_worked_numbers(tokens, shift):
    assert noise_level_shift(tokens, NoiseLevelConfig()) == pytest.approx(shift, abs=1e-4)


def test_shift_stays_within_its_bounds_unless_they_are_taken_away():
    assert noise_level_shift(10**6, NoiseLevelConfig()) == 3.0
    assert noise_level_shift(1, NoiseLevelConfig(low_shift=-1.0)) == 0.5
    assert noise_level_shift(50_000, NoiseLevelConfig(max_shift=None)) == pytest.approx(18.49, abs=0.01)
    assert noise_level_shift(1, NoiseLevelConfig(low_shift=-1.0, min_shift=None)) < -1.0


def test_levels_are_logit_normal():
    config = NoiseLevelConfig(uniform_fraction=0.0, standard_deviation=0.7)
    levels = draw_noise_levels(config, num_tokens=[2560] * 2000, seeds=range(2000))

    # Kolmogorov-Smirnov over 2000 fixed seeds; a shift off by 0.1 gives p < 1e-4.
    assert kstest(torch.logit(levels.double()).numpy(), norm(1.5, 0.7).cdf).pvalue > 0.01


def test_a_fraction_of_the_levels_is_uniform():
    assert (
        kstest(
            draw_noise_levels(
                NoiseLevelConfig(uniform_fraction=1.0), num_tokens=[9] * 2000, seeds=range(2000)
            ),
            "uniform",
        ).pvalue
        > 0.01
    )
    arguments = {"num_tokens": [2560] * 2000, "seeds": range(2000)}
    mixed = draw_noise_levels(NoiseLevelConfig(), **arguments)
    normal = draw_noise_levels(NoiseLevelConfig(uniform_fraction=0.0), **arguments)

    # A tenth of 2000 draws is 200 with a standard deviation of 13; the others do not move.
    assert 150 < (mixed != normal).sum().item() < 250


def test_levels_are_a_function_of_the_samples_own_seed():
    whole = draw_noise_levels(NoiseLevelConfig(), num_tokens=[100, 2000, 5000], seeds=[7, 8, 9])

    assert torch.equal(draw_noise_levels(NoiseLevelConfig(), num_tokens=[5000], seeds=[9]), whole[2:])
    assert len(set(whole.tolist())) == 3
    with pytest.raises(DataError, match="one seed for each of 2 samples, got 1"):
        draw_noise_levels(NoiseLevelConfig(), num_tokens=[1, 2], seeds=[0])


def test_very_many_tokens_still_give_finite_levels_below_one():
    levels = draw_noise_levels(NoiseLevelConfig(), num_tokens=[200_000] * 200, seeds=range(200))

    assert torch.isfinite(levels).all()
    assert levels.max() < 1


def test_noising_follows_the_formula_and_leads_back():
    x0 = _latents()
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    sample = noised(x0, levels, _noise(x0, range(4)))
    eps = sample.velocity + x0
    s = levels.view(-1, 1, 1)

    # fp32 rounding of one subtraction.
    torch.testing.assert_close(sample.noisy, (1 - s) * x0 + s * eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample.noisy - s * sample.velocity, x0, rtol=0, atol=1e-6)
    assert torch.equal(sample.noisy[0], x0[0])
    assert torch.equal(sample.timesteps, levels.unsqueeze(1).expand(4, 6))
    assert sample.has_loss.all()


def test_noise_is_normal_and_a_function_of_the_samples_own_seed():
    x0 = torch.zeros(4, 50, 40)
    noise = noised(x0, torch.ones(4), _noise(x0, [1, 2, 3, 1])).noisy

    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noised(x0[:1], torch.ones(1), _noise(x0[:1], [2])).noisy[0], noise[1])
    assert kstest(noise[:3].flatten().numpy(), "norm").pvalue > 0.01


def test_conditioning_tokens_are_clean_and_have_no_loss():
    x0 = _latents()
    is_clean = torch.zeros(4, 6, dtype=torch.bool)
    is_clean[:2, :2] = True
    sample = noised(x0, torch.full((4,), 0.5), _noise(x0, range(4)), is_clean_BL=is_clean)
    prediction = sample.velocity.clone()
    prediction[:2, :2] += 100.0

    assert torch.equal(sample.noisy[is_clean], x0[is_clean])
    assert torch.equal(sample.timesteps, torch.where(is_clean, 0.0, 0.5))
    assert torch.equal(sample.has_loss, ~is_clean)
    assert flow_losses(prediction, sample).tolist() == [0.0] * 4


def test_loss_is_the_mean_over_generated_tokens():
    is_clean = torch.zeros(2, 6, dtype=torch.bool)
    is_clean[1, :4] = True
    sample = noised(
        _latents(batch=2), torch.full((2,), 0.5), _noise(_latents(batch=2), [0, 1]), is_clean_BL=is_clean
    )

    # fp32: velocity + 3 - velocity rounds.
    assert flow_losses(sample.velocity + 3, sample).tolist() == pytest.approx([9.0, 9.0], rel=1e-5)


def test_padding_may_hold_anything():
    is_token = torch.ones(2, 6, dtype=torch.bool)
    is_token[0, 3:] = False
    x0 = _latents(batch=2)
    x0[0, 3:] = float("nan")
    sample = noised(x0, torch.full((2,), 0.5), _noise(x0, [0, 1]), is_token_BL=is_token)
    prediction = torch.full_like(x0, float("inf"))
    prediction[is_token] = 0.0
    prediction.requires_grad_()
    losses = flow_losses(prediction, sample)
    losses.mean().backward()

    assert losses[0].item() == pytest.approx(sample.velocity[0, :3].square().mean().item(), rel=1e-5)
    assert torch.isfinite(prediction.grad).all()
    assert prediction.grad[0, 3:].abs().sum() == 0


def test_a_sample_without_generated_tokens_has_loss_zero():
    sample = noised(
        _latents(batch=1),
        torch.ones(1),
        _noise(_latents(batch=1), [0]),
        is_clean_BL=torch.ones(1, 6, dtype=torch.bool),
    )
    assert flow_losses(torch.ones(1, 6, 8), sample).item() == 0.0


def test_gradient_agrees_with_finite_differences():
    is_clean = torch.tensor([[True, False, False]])
    x0 = _latents(1, 3, 2, torch.float64)
    sample = noised(x0, torch.full((1,), 0.5), _noise(x0, [0]), is_clean_BL=is_clean)
    prediction = _latents(1, 3, 2, torch.float64).mul(0.3).requires_grad_()

    assert torch.autograd.gradcheck(lambda p: flow_losses(p, sample), (prediction,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    x0 = _latents(dtype=dtype)
    levels = torch.linspace(0, 1, 4)
    sample = noised(x0, levels, _noise(x0, range(4)))
    prediction = _latents(dtype=dtype).flip(0).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = flow_losses(prediction, sample)
    losses.mean().backward()

    assert {sample.noisy.dtype, sample.velocity.dtype, losses.dtype} == {torch.float32}
    assert torch.equal(sample.noisy, noised(x0.float(), levels, _noise(x0.float(), range(4))).noisy)
    assert torch.equal(losses.detach(), flow_losses(prediction.detach().float(), sample))
    assert prediction.grad.dtype == dtype


def test_first_frame_mask():
    arguments = {"num_frames": 3, "tokens_per_frame": 2, "seeds": range(400)}
    assert not first_frame_mask(0.0, **arguments).any()
    assert torch.equal(
        first_frame_mask(1.0, **arguments)[5], torch.tensor([True, True, False, False, False, False])
    )
    # 400 draws at one half: 200 with a standard deviation of 10.
    assert 160 < first_frame_mask(0.5, **arguments)[:, 0].sum().item() < 240
    assert not first_frame_mask(1.0, num_frames=1, tokens_per_frame=2, seeds=[0]).any()


def test_buckets_add_up_and_average_over_ranks():
    losses, levels = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.25, 0.3, 1.0])
    terms = bucket_terms("video", losses.requires_grad_(), levels)
    ranks = [bucket_terms("video", losses[i : i + 2], levels[i : i + 2]) for i in (0, 2)]
    averaged = {name: (ranks[0][name] + ranks[1][name]).item() / 2 for name in terms}

    assert sum(terms[f"loss/video_s{k}_part"].item() for k in range(4)) == losses.mean().item()
    assert averaged == {name: value.item() for name, value in terms.items()}
    means = {"loss/video_s0": 1.0, "loss/video_s1": 2.5, "loss/video_s3": 4.0}
    assert with_quotients({"loss/total": 2.0, **averaged}) == {"loss/total": 2.0, **means}
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_BLC": torch.zeros(2, 3)}, r"latents must be \[B,L,C\]"),
        ({"noise_levels_B": torch.zeros(3)}, "one noise level for each of 2 samples and noise"),
        ({"noise_BLC": torch.zeros(1, 3, 4)}, "one noise level for each of 2 samples and noise"),
        ({"is_clean_BL": torch.zeros(2, 4, dtype=torch.bool)}, r"is_clean_BL must be bool \[2, 3\]"),
        ({"is_token_BL": torch.zeros(2, 3)}, r"is_token_BL must be bool \[2, 3\], got torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    arguments = {
        "latent_BLC": torch.zeros(2, 3, 4),
        "noise_levels_B": torch.zeros(2),
        "noise_BLC": torch.zeros(2, 3, 4),
    } | change
    with pytest.raises(DataError, match=message):
        noised(**arguments)


def test_a_prediction_of_another_shape_is_refused():
    sample = noised(_latents(), torch.zeros(4), _noise(_latents(), range(4)))
    with pytest.raises(DataError, match=r"latent's shape \[4, 6, 8\], got \[4, 6, 4\]"):
        flow_losses(torch.zeros(4, 6, 4), sample)


def test_configuration_rules():
    assert FlowConfig().audio_weight == 0.25
    with pytest.raises(ConfigError, match="got 0 for both"):
        FlowConfig(video_weight=0.0, audio_weight=0.0)
    with pytest.raises(ConfigError, match=r"high_tokens: must exceed low_tokens \(1024\), got 1024"):
        NoiseLevelConfig(high_tokens=1024)
    with pytest.raises(ConfigError, match=r"max_shift: must not be below min_shift \(0\.5\), got 0\.1"):
        NoiseLevelConfig(max_shift=0.1)
