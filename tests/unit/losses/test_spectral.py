"""SpectralLoss: closed forms, a loop in numpy, auraloss, invariances, padding, silence."""

import math

import numpy as np
import pytest
import torch

from aiprod_ds.config.losses import SpectralConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses import SpectralLoss
from aiprod_ds.losses.spectral import magnitude

ONE_SIZE = SpectralConfig(fft_sizes=(256,))


def _waves(channels=1, samples=1024, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, samples)
    return [(torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype) for _ in range(2)]


def test_worked_number_of_the_docstring():
    silence = torch.zeros(1, 1, 1024, dtype=torch.float64)
    click = silence.clone()
    click[..., 512] = 1.0

    magnitude_term = (2 - 3e-4) / 17
    log_term = (math.log(1.00001 / 1.1e-4) + 2 * math.log(0.50001 / 1.1e-4)) / 17
    # S is sqrt(w^2 + 1e-8) and not w: relative 1e-8.
    assert SpectralLoss(ONE_SIZE)(click, silence).item() == pytest.approx(magnitude_term + log_term, rel=1e-7)
    assert magnitude_term + log_term == pytest.approx(1.644620, abs=1e-6)


def test_a_sine_reads_a_quarter_of_the_fft_size():
    samples = torch.arange(2048, dtype=torch.float64)
    sine = 0.5 * torch.sin(2 * math.pi * 16 / 256 * samples)
    spectrum = magnitude(sine.view(1, 1, -1), 256)[0, 0]

    # Periodic Hann on a whole number of periods: three bins, nothing elsewhere; frames that touch the ends
    # excluded.
    expected = torch.zeros(129, dtype=torch.float64)
    expected[15:18] = 0.5 * 256 * torch.tensor([1 / 8, 1 / 4, 1 / 8], dtype=torch.float64)
    torch.testing.assert_close(spectrum[:, 4], expected, rtol=1e-6, atol=1.1e-4)


@pytest.mark.parametrize("log", ["log", "log1p"])
def test_agrees_with_a_loop_in_numpy(log):
    y, x = _waves()
    config = SpectralConfig(fft_sizes=(512, 64), log=log)
    expected = np.mean([_numpy_distance(y.numpy(), x.numpy(), size, log) for size in (512, 64)])

    # fp64 on both sides.
    assert SpectralLoss(config)(y, x).item() == pytest.approx(expected, rel=1e-9)


def test_agrees_with_auraloss():
    auraloss = pytest.importorskip("auraloss")
    # Silence around the noise makes reflection and zeros the same at the ends.
    y, x = (torch.nn.functional.pad(wave, (2048, 2048)) for wave in _waves(samples=8192, dtype=torch.float32))
    reference = auraloss.freq.MultiResolutionSTFTLoss(
        fft_sizes=[1024, 256],
        hop_sizes=[256, 64],
        win_lengths=[1024, 256],
        w_sc=0.0,
        w_log_mag=1.0,
        w_lin_mag=1.0,
    )

    # auraloss clamps the power at 1e-8 and takes the plain log; ours adds 1e-8 and 1e-5. On noise with
    # magnitudes near 10 that changes a few quiet bins.
    ours = SpectralLoss(SpectralConfig(fft_sizes=(1024, 256)))(y, x)
    assert ours.item() == pytest.approx(reference(y, x).item(), rel=1e-4)


def test_zero_at_identity_and_symmetric():
    y, x = _waves(channels=2)
    loss = SpectralLoss()

    assert loss(x, x).item() == 0.0
    assert loss(y, x).item() == pytest.approx(loss(x, y).item(), rel=1e-12)


def test_invariances():
    y, x = _waves(channels=2)
    loss = SpectralLoss()
    value = loss(y, x).item()

    assert loss(-y, x).item() == pytest.approx(value, rel=1e-12)  # polarity
    assert loss(y.flip(0), x.flip(0)).item() == pytest.approx(value, rel=1e-12)  # order of clips
    assert loss(y.flip(1), x.flip(1)).item() == pytest.approx(value, rel=1e-12)  # left and right


def test_sum_and_difference_hear_a_swapped_polarity_of_one_channel():
    _, x = _waves(channels=2)
    one_flipped = x * torch.tensor([[[1.0], [-1.0]]])

    assert SpectralLoss(SpectralConfig(sum_difference=False))(one_flipped, x).item() == pytest.approx(
        0.0, abs=1e-12
    )
    assert SpectralLoss()(one_flipped, x).item() > 0.1


def test_sum_and_difference_are_two_more_channels():
    y, x = _waves(channels=2)

    def widen(wave):
        return torch.cat([wave, wave.sum(1, keepdim=True) / 2**0.5, -wave.diff(dim=1) / 2**0.5], dim=1)

    # A batch of four mono clips each is their mean.
    expected = SpectralLoss()(widen(y).flatten(0, 1), widen(x).flatten(0, 1))
    assert SpectralLoss()(y, x).item() == pytest.approx(expected.item(), rel=1e-12)


def test_mono_without_a_channel_axis():
    y, x = _waves()
    assert SpectralLoss()(y[:, 0], x[:, 0]).item() == SpectralLoss()(y, x).item()


def test_a_padded_clip_counts_as_if_it_stood_alone():
    y, x = _waves(samples=1024)
    lengths = [1024, 700]
    loss = SpectralLoss()
    alone = [loss(y[i : i + 1, :, :n], x[i : i + 1, :, :n]).item() for i, n in enumerate(lengths)]

    # fp64; only the order of the sums differs.
    assert loss(y, x, num_samples=lengths).item() == pytest.approx(sum(alone) / 2, rel=1e-12)


def test_padding_has_no_effect_even_if_it_is_not_a_number():
    y, x = _waves(samples=1024)
    expected = SpectralLoss()(y, x, num_samples=[700, 1024])
    y[0, :, 700:] = float("nan")
    x[0, :, 700:] = float("inf")
    y.requires_grad_()
    value = SpectralLoss()(y, x, num_samples=[700, 1024])
    value.backward()

    assert value.item() == expected.item()
    assert torch.isfinite(y.grad).all()
    assert y.grad[0, :, 700:].abs().sum() == 0


def test_a_longer_reconstruction_is_cropped_and_a_shorter_one_refused():
    y, x = _waves(samples=1024)
    longer = torch.cat([y, torch.ones(2, 1, 100, dtype=y.dtype)], dim=2)

    assert SpectralLoss()(longer, x).item() == SpectralLoss()(y, x).item()
    with pytest.raises(DataError, match=r"at least its length, got \[2, 1, 1000\] for \[2, 1, 1024\]"):
        SpectralLoss()(y[..., :1000], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_silence_gives_finite_gradients(dtype):
    for target in (torch.zeros(1, 2, 512), _waves(2, 512, 1, torch.float32)[0]):
        y = torch.zeros(1, 2, 512, dtype=dtype, requires_grad=True)
        SpectralLoss()(y, target.to(dtype)).backward()

        assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("log", ["log", "log1p"])
def test_gradient_agrees_with_finite_differences(log):
    y, x = _waves(channels=2, samples=40, batch=1)
    loss = SpectralLoss(SpectralConfig(fft_sizes=(16, 8), log=log))

    assert torch.autograd.gradcheck(lambda wave: loss(wave, x), (y.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    y, x = _waves(dtype=dtype)
    expected = SpectralLoss()(y.float(), x.float())
    y.requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = SpectralLoss()(y, x)
    value.backward()

    assert value.dtype == torch.float32
    assert torch.equal(value.detach(), expected)
    assert y.grad.dtype == dtype


def test_clips_shorter_than_the_window_work():
    y, x = _waves(samples=100)
    assert math.isfinite(SpectralLoss()(y, x).item())


@pytest.mark.parametrize("lengths", [[1024], [0, 5], [5, 1025]])
def test_impossible_lengths_are_refused(lengths):
    y, x = _waves()
    with pytest.raises(DataError, match="num_samples must be 2 numbers from 1 to 1024"):
        SpectralLoss()(y, x, num_samples=lengths)


def test_wrong_shapes_are_refused():
    with pytest.raises(DataError, match=r"target must be \[B,N\] or \[B,C,N\] and not empty, got \[5\]"):
        SpectralLoss()(torch.zeros(1, 5), torch.zeros(5))


def test_configuration_rules():
    assert SpectralConfig(fft_sizes=[1024]).fft_sizes == (1024,)
    with pytest.raises(ConfigError, match="multiple of 4"):
        SpectralConfig(fft_sizes=(1022,))
    with pytest.raises(ConfigError, match="log_epsilon: has no effect with log1p"):
        SpectralConfig(log="log1p", log_epsilon=1e-3)


def _numpy_distance(y, x, size, log):
    values = [_numpy_magnitude(wave, size) for wave in (y, x)]
    logs = [np.log1p(value) if log == "log1p" else np.log(value + 1e-5) for value in values]
    return np.abs(values[0] - values[1]).mean() + np.abs(logs[0] - logs[1]).mean()


def _numpy_magnitude(wave, size):
    hop = size // 4
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    padded = np.pad(wave, [(0, 0), (0, 0), (size // 2, size // 2)])
    starts = range(0, padded.shape[-1] - size + 1, hop)
    frames = np.stack([np.fft.rfft(padded[..., start : start + size] * window) for start in starts])
    return np.sqrt(np.abs(frames) ** 2 + 1e-8)
