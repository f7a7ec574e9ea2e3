"""How many digits the losses keep: fp32 against fp64 at a realistic size, and gradients that survive half
precision."""

import pytest
import torch

from aiprod_ds.config.losses import AudioVAELossConfig, VideoVAELossConfig
from aiprod_ds.losses import AudioVAELoss, VideoVAELoss
from aiprod_ds.losses.flow import draw_noise, flow_losses, noised

VIDEO = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0, haar_weight=0.1), None)
AUDIO = AudioVAELoss(AudioVAELossConfig(mel_weight=15.0), sample_rate_hz=44100)


def _inputs(data_shape, latent_shape):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(data_shape, generator=generator) * 2 - 1
    reconstruction = (target + 0.05 * torch.randn(data_shape, generator=generator)).clamp(-1, 1)
    return [reconstruction, target, *(torch.randn(latent_shape, generator=generator) for _ in range(2))]


CASES = {
    "video": (VIDEO, _inputs((1, 3, 9, 128, 128), (1, 16, 2, 4, 4))),
    "audio": (AUDIO, _inputs((2, 2, 32768), (2, 16, 16))),
}


@pytest.mark.parametrize("name", CASES)
def test_fp32_agrees_with_fp64(name):
    loss, inputs = CASES[name]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [
            tensor.detach().clone().to(dtype).requires_grad_(index != 1)
            for index, tensor in enumerate(inputs)
        ]
        terms = loss(*leaves)
        terms.total.backward()
        results.append((terms.terms, leaves[0].grad.double()))
    (narrow, narrow_gradient), (wide, wide_gradient) = results

    for term, value in wide.items():
        # Sums of about 1e5 numbers with fp32 rounding 6e-8 each: the error of a mean is far below 1e-5.
        assert narrow[term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), term
    # Single elements change sign where an L1 is at its kink; as vectors the gradients agree.
    assert (narrow_gradient - wide_gradient).norm() / wide_gradient.norm() < 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [2.0**16])
def test_scaled_gradients_survive_fp16(name, scale):
    loss, inputs = CASES[name]
    leaves = [tensor.detach().half().requires_grad_(index != 1) for index, tensor in enumerate(inputs)]

    (loss(*leaves).total * scale).backward()

    # A loss scale of 65536, DeepSpeed's first one, neither overflows nor flushes the reconstruction's
    # gradient.
    assert torch.isfinite(leaves[0].grad).all()
    assert (leaves[0].grad != 0).float().mean() > 0.9


def test_flow_loss_in_fp32_agrees_with_fp64():
    latent, prediction = torch.randn(2, 2, 4096, 128, generator=torch.Generator().manual_seed(0))
    levels, noise = torch.tensor([0.3, 0.9]), draw_noise(latent.shape[1:], seeds=[0, 1])
    losses = [
        flow_losses(prediction.to(t), noised(latent.to(t), levels.to(t), noise.to(t)))
        for t in (torch.float32, torch.float64)
    ]

    # Noise is drawn in fp32 for both; a mean of 5e5 squares.
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-6, atol=0)
