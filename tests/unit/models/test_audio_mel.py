"""The mel front end and diffusers' LTX-2 audio VAE behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.audio_vae import AudioFacts, audio_facts, audio_strides, wrap_audio_vae
from aiprod_ds.models.mel_vae import LogMel, MelVAE
from aiprod_ds.models.registry import build_model

TINY_LTX2 = {"base_channels": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "latent_channels": 4}


def _tiny() -> nn.Module:
    return build_model(ModelConfig(source="AutoencoderKLLTX2Audio", config=TINY_LTX2), seed=0)


@pytest.fixture
def wave_BCN() -> Tensor:  # noqa: N802  # the suffix states the shape
    return torch.rand(2, 2, 640 * 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_spectrogram_is_torchaudios(wave_BCN: Tensor) -> None:
    # Oracle: torchaudio's transform with the same settings; both use fp32, so only the order of sums differs.
    transform = MelSpectrogram(
        16_000,
        n_fft=1024,
        hop_length=160,
        n_mels=64,
        power=1.0,
        norm="slaney",
        mel_scale="slaney",
        f_min=0.0,
        f_max=8_000.0,
    )
    expected_BCTM = transform(wave_BCN).clamp(min=1e-5).log().transpose(2, 3)
    mel_BCTM = LogMel(sample_rate_hz=16_000, hop=160, num_bands=64)(wave_BCN)
    assert mel_BCTM.shape == (2, 2, 17, 64)
    torch.testing.assert_close(mel_BCTM, expected_BCTM, rtol=0, atol=1e-5)


def test_silence_is_the_floor_and_stays_fp32_under_autocast() -> None:
    mel = LogMel(sample_rate_hz=16_000, hop=160, num_bands=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        silence_BCTM = mel(torch.zeros(1, 1, 1600, dtype=torch.bfloat16))
    assert silence_BCTM.dtype == torch.float32
    torch.testing.assert_close(silence_BCTM, torch.full((1, 1, 11, 64), math.log(1e-5)))


def test_ltx2_tells_its_rate_channels_and_hop() -> None:
    vae = build_model(ModelConfig(source="AutoencoderKLLTX2Audio", config=TINY_LTX2), seed=0, device="meta")
    assert audio_facts(vae) == AudioFacts(sample_rate_hz=16_000, channels=2, hop=640)
    assert audio_strides(vae, ModelConfig(source="unused")) == ModelStrides(
        spatial=1, temporal=640, is_causal=False
    )


def test_the_spectrogram_goes_through_the_model(wave_BCN: Tensor) -> None:
    vae = _tiny()
    module = wrap_audio_vae(vae)
    assert isinstance(module, MelVAE)
    mel_BCTM, mean, logvar = module(wave_BCN)
    assert mel_BCTM.shape == module.mel(wave_BCN).shape == (2, 2, 17, 64)
    assert mean.shape == logvar.shape == (2, 4, 5, 16)  # 1 + 16 / 4 frames and 64 / 4 bands
    assert torch.equal(mel_BCTM, vae(module.mel(wave_BCN)).sample)  # oracle: the model's own forward
    assert not torch.equal(mel_BCTM, module(wave_BCN, [1, 2])[0])
    assert not [name for name in module.state_dict() if not name.startswith("vae.")]


def test_a_16_bit_model_gets_a_full_precision_spectrogram(wave_BCN: Tensor) -> None:
    module = wrap_audio_vae(_tiny()).to(torch.bfloat16)
    mel_BCTM, mean, _ = module(wave_BCN, [1, 2])
    assert mel_BCTM.dtype == torch.bfloat16
    assert mean.dtype == torch.float32
    assert module.mel(wave_BCN).dtype == torch.float32


def test_activation_checkpointing_finds_blocks_inside_plain_containers(wave_BCN: Tensor) -> None:
    module = wrap_audio_vae(_tiny())
    forwards: list[int] = []
    module.vae.encoder.down[0].block[0].conv1.register_forward_hook(lambda *_: forwards.append(1))

    def gradients() -> list[Tensor]:
        forwards.clear()
        module.zero_grad()
        module(wave_BCN, [1, 2])[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]

    plain = gradients()
    assert len(forwards) == 1
    set_recompute(module, enabled=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert len(forwards) == 2


class Flat(nn.Module):
    """Declares itself a mel model of some kind; decodes to the given number of frames."""

    def __init__(self, frames: int, **declared: int) -> None:
        super().__init__()
        self.frames = frames
        self.config = declared
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, mel_BCTM: Tensor) -> Tensor:
        return mel_BCTM * self.weight

    def decode(self, latent: Tensor) -> Tensor:
        return latent[:, :, : self.frames]


def test_a_smaller_spectrogram_is_refused_and_a_longer_one_cropped(wave_BCN: Tensor) -> None:
    declared = {"sample_rate": 16_000, "mel_hop_length": 160, "mel_bins": 64}
    assert wrap_audio_vae(Flat(17, **declared))(wave_BCN)[0].shape == (2, 2, 17, 64)
    with pytest.raises(
        EngineError, match=r"at least the frames of the spectrogram \(2, 2, 17, 64\), got \(2, 2, 16, 64\)"
    ):
        wrap_audio_vae(Flat(16, **declared))(wave_BCN)


def test_what_a_mel_model_does_not_say_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="must say sample_rate in its configuration, got none from Flat"):
        wrap_audio_vae(Flat(1, mel_bins=64))
    with pytest.raises(ConfigError, match="must say temporal_compression_ratio"):
        audio_facts(Flat(1, mel_bins=64, mel_hop_length=160))
