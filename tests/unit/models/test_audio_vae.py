"""The waveform wrapper on diffusers' Oobleck and on modules of the tests' own: facts, noise, cropping,
precision, weight norm."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.audio_vae import AudioFacts, AudioVAE, audio_facts, audio_strides, wrap_audio_vae
from aiprod_ds.models.posterior import draw_latent
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.weight_norm import compute_weights_in_forward

TINY_OOBLECK = {
    # Not 8: bf16 convolutions of 8 channels with stride 4 and kernel 8 are wrong in oneDNN of torch 2.14.1 on
    # a CPU with AMX.
    "encoder_hidden_size": 16,
    "downsampling_ratios": [2, 4, 4],
    "channel_multiples": [1, 2, 4],
    "decoder_channels": 16,
    "decoder_input_channels": 8,
    "audio_channels": 2,
    "sampling_rate": 16_000,
}
UNKNOWN = ModelConfig(source="unused")


def _oobleck() -> nn.Module:
    return build_model(ModelConfig(source="AutoencoderOobleck", config=TINY_OOBLECK), seed=0)


class PaddingVAE(nn.Module):
    """Works in whole latents of 6 samples, so it pads; encode returns a pair, decode a tensor. Declares
    nothing."""

    hop = 6

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, 4, kernel_size=6, stride=6)
        self.up = nn.ConvTranspose1d(2, 1, kernel_size=6, stride=6)

    def encode(self, wave_BCN: Tensor) -> tuple[Tensor, Tensor]:
        padding = -wave_BCN.shape[-1] % self.hop
        mean, logvar = self.down(nn.functional.pad(wave_BCN, (0, padding))).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.up(latent)
        return decoded


class Unmeasurable(PaddingVAE):
    """Reads a value, which shapes on the meta device do not have."""

    def __init__(self, **declared: int) -> None:
        super().__init__()
        self.config = declared

    def encode(self, wave_BCN: Tensor) -> tuple[Tensor, Tensor]:
        assert wave_BCN.sum().item() < 1e9
        return super().encode(wave_BCN)


class Fixed(nn.Module):
    """A deterministic autoencoder whose decoder returns what it was made with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def encode(self, wave_BCN: Tensor) -> Tensor:
        return wave_BCN

    def decode(self, latent: Tensor) -> SimpleNamespace:  # noqa: ARG002  # the output is known before
        return SimpleNamespace(sample=self.output)


@pytest.fixture
def wave_BCN() -> Tensor:  # noqa: N802  # the suffix states the shape
    return torch.rand(3, 2, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_oobleck_tells_its_rate_channels_and_hop() -> None:
    assert audio_facts(_oobleck()) == AudioFacts(sample_rate_hz=16_000, channels=2, hop=32)
    full = build_model(ModelConfig(source="AutoencoderOobleck"), seed=0, device="meta")
    assert audio_facts(full) == AudioFacts(sample_rate_hz=44_100, channels=2, hop=2048)
    assert audio_strides(full, UNKNOWN) == ModelStrides(spatial=1, temporal=2048, is_causal=False)


def test_the_configuration_has_the_last_word() -> None:
    config = ModelConfig(source="unused", temporal_stride=64)
    assert audio_strides(_oobleck(), config) == ModelStrides(spatial=1, temporal=64, is_causal=False)


def test_a_custom_module_is_measured_and_left_as_it_was() -> None:
    vae = PaddingVAE().train()
    vae.audio_channels = 1
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    assert audio_facts(vae) == AudioFacts(sample_rate_hz=None, channels=1, hop=6)
    assert vae.training
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_what_cannot_be_measured_is_taken_as_declared_or_asked_for() -> None:
    assert audio_facts(Unmeasurable(hop_length=512)).hop == 512
    with pytest.raises(
        ConfigError,
        match=r"hop of Unmeasurable is neither declared nor measurable\. Set model\.temporal_stride",
    ):
        audio_facts(Unmeasurable())


def test_the_reconstruction_is_cropped_to_the_input() -> None:
    torch.manual_seed(0)
    vae = PaddingVAE()
    wave_BCN = torch.rand(2, 1, 64)
    reconstruction, mean, logvar = AudioVAE(vae)(wave_BCN)
    assert mean.shape == (2, 2, 11)
    assert logvar.shape == mean.shape
    assert torch.equal(reconstruction, vae.decode(mean)[..., :64])


@pytest.mark.parametrize(("channels", "samples"), [(1, 60), (2, 70)])
def test_a_shorter_or_otherwise_shaped_reconstruction_is_refused(channels: int, samples: int) -> None:
    vae = Fixed(torch.zeros(1, channels, samples))
    with pytest.raises(
        EngineError, match=rf"at least its length \(1, 1, 64\), got \(1, {channels}, {samples}\)"
    ):
        AudioVAE(vae)(torch.zeros(1, 1, 64))


def test_a_deterministic_autoencoder_has_no_logvar() -> None:
    wave_BCN = torch.rand(1, 1, 64)
    reconstruction, mean, logvar = AudioVAE(Fixed(wave_BCN))(wave_BCN, [1])
    assert logvar is None
    assert torch.equal(mean, wave_BCN)
    assert torch.equal(reconstruction, wave_BCN)


def test_a_model_without_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="must offer encode and decode, got Linear without encode"):
        wrap_audio_vae(nn.Linear(1, 1))


def test_noise_belongs_to_the_clip_and_not_to_its_batch(wave_BCN: Tensor) -> None:
    module = AudioVAE(_oobleck())
    seeds = [11, 12, 13]
    together = module(wave_BCN, seeds)[0]
    alone = torch.cat([module(wave_BCN[[i]], [seeds[i]])[0] for i in range(3)])
    # A convolution may add in another order for another batch: a few ulp; other noise moves the result by far
    # more.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together - module(wave_BCN, [1, 2, 3])[0]).abs().amax(dim=(1, 2)).min() > 1e-3
    with pytest.raises(EngineError, match=r"one seed per sample \(3\), got 2"):
        module(wave_BCN, [1, 2])


def test_oobleck_without_its_hooks_computes_the_same(wave_BCN: Tensor) -> None:
    # Oracle: diffusers' own forward with the hooks, bit for bit.
    original = _oobleck()
    expected = original(wave_BCN).sample
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in original.named_parameters()}
    module = AudioVAE(_oobleck())
    reconstruction, mean, logvar = module(wave_BCN)
    assert torch.equal(reconstruction, expected)
    posterior = original.encode(wave_BCN).latent_dist
    assert torch.equal(mean, posterior.mean)
    torch.testing.assert_close(
        logvar, posterior.logvar, rtol=1e-5, atol=1e-6
    )  # the same formula, rounded elsewhere
    reconstruction.square().mean().backward()
    assert list(module.vae.state_dict()) == list(original.state_dict())
    for name, parameter in module.vae.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_near_fp32_with_finite_gradients(wave_BCN: Tensor, dtype: torch.dtype) -> None:
    module = AudioVAE(_oobleck())
    exact, half = module(wave_BCN)[0], copy.deepcopy(module).to(dtype)
    reconstruction, mean, logvar = half(wave_BCN.to(dtype), [1, 2, 3])
    assert reconstruction.dtype == dtype
    assert mean.dtype == logvar.dtype == torch.float32
    (reconstruction.float().abs().mean() + mean.mean() + logvar.mean()).backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in half.parameters())
    # Relative L2 distance after some 40 layers that each round to 8 resp. 11 bits; measured: 0.0123 and
    # 0.0014.
    distance = ((half(wave_BCN.to(dtype))[0].float() - exact).norm() / exact.norm()).item()
    assert distance < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_a_narrow_posterior_has_finite_gradients_in_fp16() -> None:
    # A deviation of softplus(-12) + 1e-4 = 1.06e-4: its square underflows in fp16, so diffusers' logarithm of
    # it is -inf.
    diffusers = pytest.importorskip("diffusers.models.autoencoders.autoencoder_oobleck")
    parameters = torch.full((1, 2, 3), -12.0, dtype=torch.float16, requires_grad=True)
    posterior = diffusers.OobleckDiagonalGaussianDistribution(parameters)
    assert posterior.logvar.isinf().all(), "otherwise the workaround can go"
    _, _, logvar = draw_latent(posterior, None)
    assert logvar is not None
    torch.testing.assert_close(
        logvar, torch.full((1, 1, 3), 2 * torch.log(torch.tensor(1.0614e-4)).item()), rtol=0, atol=1e-3
    )
    logvar.sum().backward()
    assert parameters.grad is not None
    assert parameters.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_normalised_weights_follow_their_parameters_and_leave_nothing_behind() -> None:
    layer = weight_norm(nn.Linear(3, 2), dim=0)
    compute_weights_in_forward(layer)
    assert "weight" not in vars(layer)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([[2.0], [3.0]]))
    # Oracle: the formula, row by row.
    expected = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight, expected)
    compute_weights_in_forward(layer)
    torch.testing.assert_close(layer.weight, expected)
    assert sorted(layer.state_dict()) == ["bias", "weight_g", "weight_v"]


def test_a_normalised_model_can_be_copied_and_saved(tmp_path: Any, wave_BCN: Tensor) -> None:
    module = AudioVAE(_oobleck())
    expected = module(wave_BCN)[0]
    twin = copy.deepcopy(module)
    assert torch.equal(twin(wave_BCN)[0], expected)
    module.vae.save_pretrained(tmp_path)
    loaded = build_model(ModelConfig(source="AutoencoderOobleck", pretrained=str(tmp_path)), seed=1)
    assert torch.equal(AudioVAE(loaded)(wave_BCN)[0], expected)


def test_activation_checkpointing_recomputes_the_blocks_of_oobleck_exactly(wave_BCN: Tensor) -> None:
    module = AudioVAE(_oobleck())
    forwards: list[str] = []
    for name, part in module.named_modules():
        if type(part).__name__ in {"OobleckEncoderBlock", "OobleckDecoderBlock"}:
            part.res_unit1.register_forward_hook(lambda *_, name=name: forwards.append(name))

    def gradients() -> list[Tensor]:
        forwards.clear()
        module.zero_grad()
        module(wave_BCN, [1, 2, 3])[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    plain, once = gradients(), len(forwards)
    set_recompute(module, enabled=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert (once, len(forwards)) == (6, 12)
    set_recompute(module, enabled=False)
    gradients()
    assert len(forwards) == 6
