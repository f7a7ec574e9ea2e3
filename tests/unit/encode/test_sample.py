"""Decoding against the VAEs' own forward, the approximate sound against the spectrogram, and sampling from
saved folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from aiprod_ds.codec.decoders import AudioDecoder, LatentDecoder, VideoDecoder
from aiprod_ds.codec.encoders import AudioEncoder, VideoEncoder
from aiprod_ds.config.encode import AudioEncoderConfig, VideoEncoderConfig
from aiprod_ds.config.load import load_sample_config
from aiprod_ds.config.model import LoraConfig, ModelConfig
from aiprod_ds.config.sample import PreviewConfig, SampleConfig
from aiprod_ds.encode.sample import run_sampling
from aiprod_ds.errors import CheckpointError, ConfigError, DataError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.lora import adapter_tensors, add_lora, save_peft
from aiprod_ds.models.mel_inverse import approximate_sound
from aiprod_ds.models.mel_vae import LogMel
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.tiny import tiny_ltx_vae

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LTX = tiny_ltx_vae(patch_size=4, scaling=(True, True, True, False))
OOBLECK = {
    "audio_channels": 1,
    "sampling_rate": 16_000,
    "encoder_hidden_size": 16,
    "decoder_channels": 8,
    "decoder_input_channels": 8,
    "downsampling_ratios": [4, 8],
    "channel_multiples": [1, 2],
}
MEL = {"base_channels": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "latent_channels": 4}
VOCODER = {
    "in_channels": 128,
    "hidden_channels": 32,
    "out_channels": 2,
    "upsample_kernel_sizes": [16, 15],
    "upsample_factors": [16, 15],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3, 5]],
}
T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def _rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _tone(seconds: float, *, pitch_hz: float) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * pitch_hz * torch.arange(round(seconds * 16_000)) / 16_000)[None]


def _audio_decoder(model: ModelConfig, vocoder: ModelConfig | None = None) -> AudioDecoder:
    return AudioDecoder(model, vocoder=vocoder, precision="fp32", seed=0)


@pytest.fixture
def saved_vae(tmp_path: Path) -> ModelConfig:
    """A folder with a VAE and the statistics of its latents, as a run exports it."""
    vae: Any = build_model(ModelConfig(source="AutoencoderKLLTXVideo", config=LTX), seed=0)
    vae.save_pretrained(tmp_path / "vae")
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    (tmp_path / "vae" / "latent_statistics.json").write_text(json.dumps(statistics))
    return ModelConfig(source="AutoencoderKLLTXVideo", pretrained=str(tmp_path / "vae"))


def test_decoding_undoes_encoding_with_its_normalisation(saved_vae: ModelConfig) -> None:
    video_CTHW = _rand(3, 9, 32, 64)
    latents = VideoEncoder(VideoEncoderConfig(model=saved_vae, precision="fp32"), seed=0, device=CPU).encode(
        video_CTHW
    )
    decoder = VideoDecoder(saved_vae, precision="fp32", seed=0)
    found = decoder.decode(latents, device=CPU)
    with torch.no_grad():
        expected = (
            build_model(saved_vae, seed=0).eval()(video_CTHW[None]).sample[0]
        )  # oracle: the model's own forward, mode
    # Dividing by the deviation and multiplying again rounds once each, and 20 layers carry it on.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert decoder.latent_shape(frames=9, height=32, width=64) == tuple(latents.shape)


def test_a_decoder_that_takes_a_noise_level_gets_0() -> None:
    config = ModelConfig(source="AutoencoderKLLTXVideo", config={**LTX, "timestep_conditioning": True})
    latents = _rand(4, 2, 1, 2)
    found = VideoDecoder(config, precision="fp32", seed=0).decode(latents, device=CPU)
    with torch.no_grad():
        vae: Any = build_model(config, seed=0).eval()
        torch.testing.assert_close(
            found, vae.decode(latents[None], torch.zeros(1)).sample[0], rtol=0, atol=1e-6
        )


def test_a_waveform_vae_makes_sound_at_its_rate() -> None:
    model = ModelConfig(source="AutoencoderOobleck", config=OOBLECK)
    wave_CN = _rand(1, 32 * 50)
    latents = AudioEncoder(AudioEncoderConfig(model=model, precision="fp32"), seed=0, device=CPU).encode(
        wave_CN
    )
    sound = _audio_decoder(model).decode(latents, device=CPU)
    with torch.no_grad():
        vae: Any = build_model(model, seed=0).eval()
        expected = vae.decode(vae.encode(wave_CN[None]).latent_dist.mean).sample[0]
    assert sound.sample_rate_hz == 16_000
    torch.testing.assert_close(sound.samples, expected, rtol=0, atol=1e-5)
    assert _audio_decoder(model).latent_shape(32 * 50 / 16_000) == tuple(latents.shape)


def test_a_mel_vae_makes_sound_with_or_without_a_vocoder() -> None:
    model = ModelConfig(source="AutoencoderKLLTX2Audio", config=MEL)
    latents = AudioEncoder(AudioEncoderConfig(model=model, precision="fp32"), seed=0, device=CPU).encode(
        _rand(2, 640 * 8)
    )
    assert _audio_decoder(model).latent_shape(0.32) == tuple(latents.shape) == (4, 8, 16)
    sound = _audio_decoder(model).decode(latents, device=CPU)
    assert (tuple(sound.samples.shape), sound.sample_rate_hz) == (
        (2, 160 * 28),
        16_000,
    )  # 8 latents are 29 frames
    assert bool(sound.samples.isfinite().all())
    vocoder = ModelConfig(source="diffusers.pipelines.ltx2.vocoder:LTX2Vocoder", config=VOCODER)
    spoken = _audio_decoder(model, vocoder).decode(latents, device=CPU)
    assert (tuple(spoken.samples.shape), spoken.sample_rate_hz) == ((2, 240 * 29), 24_000)
    with pytest.raises(
        ConfigError, match=r"vocoder: has no effect for AutoencoderOobleck, which decodes to waveforms"
    ):
        _audio_decoder(ModelConfig(source="AutoencoderOobleck", config=OOBLECK), vocoder)


def test_an_approximation_is_told_in_words() -> None:
    mel, wave = (
        ModelConfig(source="AutoencoderKLLTX2Audio", config=MEL),
        ModelConfig(source="AutoencoderOobleck", config=OOBLECK),
    )
    video, config = ModelConfig(source="aiprod_ds.testing.tiny:TinyVideoVAE"), PreviewConfig()
    (told,) = LatentDecoder(video, mel, config, seed=0).replacements()
    assert "approximated" in told
    assert LatentDecoder(video, wave, config, seed=0).replacements() == ()
    assert LatentDecoder(video, None, config, seed=0).replacements() == ()


@pytest.mark.parametrize("pitch_hz", [300.0, 1000.0])
def test_the_approximate_sound_has_the_spectrogram_it_was_made_of(pitch_hz: float) -> None:
    mel = LogMel(sample_rate_hz=16_000, hop=160, num_bands=64)
    wave_CN = _tone(0.5, pitch_hz=pitch_hz)
    given_CTM = mel(wave_CN[None])[0]
    sound_CN = approximate_sound(given_CTM, sample_rate_hz=16_000, hop=160)
    assert sound_CN.shape == wave_CN.shape
    assert torch.equal(approximate_sound(given_CTM, sample_rate_hz=16_000, hop=160), sound_CN)
    found_CTM = mel(sound_CN[None])[0]
    loud = (
        given_CTM > given_CTM.max() - 3
    )  # bands within 26 dB of the loudest; the others hold leakage of the window
    inner = slice(5, -5)  # the ends are reflected
    # Natural logarithms: 0.25 is 2.2 dB; measured 0.12. Another FFT size or filter bank is off by more, or by
    # a band.
    assert float((found_CTM - given_CTM)[:, inner][loud[:, inner]].abs().mean()) < 0.25
    assert torch.equal(found_CTM[0, 25].argmax(), given_CTM[0, 25].argmax())
    spectrum = torch.fft.rfft(sound_CN[0]).abs()
    assert float(spectrum.argmax()) * 2 == pytest.approx(pitch_hz, abs=50)  # a band is 46 Hz wide down there


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_sound_shorter_than_a_window_and_one_that_is_wild_can_be_made(frames: int) -> None:
    wild_CTM = torch.full((2, frames, 64), 300.0)  # e^300 is infinite in fp32
    sound_CN = approximate_sound(wild_CTM, sample_rate_hz=16_000, hop=160)
    assert sound_CN.shape == (2, 160 * (frames - 1))
    assert bool(sound_CN.isfinite().all())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A whole tiny model, each part saved as its library saves it: what a chain of trainings leaves
    behind."""
    root = tmp_path_factory.mktemp("exported")
    parts: dict[str, Any] = {
        "transformer": build_model(
            ModelConfig(source=LTX2.transformer_class, config=LTX2.tiny_config()), seed=0
        ),
        "vae": build_model(ModelConfig(source="AutoencoderKLLTXVideo", config=LTX), seed=0),
        "audio_vae": build_model(ModelConfig(source="AutoencoderOobleck", config=OOBLECK), seed=0),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["text"] = T5EncoderModel(T5Config(**T5))
    for name, part in parts.items():
        part.save_pretrained(root / name)
    ByT5Tokenizer(extra_ids=0).save_pretrained(str(root / "text"))
    transformer = build_model(
        ModelConfig(source=LTX2.transformer_class, pretrained=str(root / "transformer")), seed=0
    )
    lora = LoraConfig(rank=2)
    add_lora(transformer, lora, allowed=LTX2.lora_targets, seed=0)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    save_peft(adapter_tensors(transformer.state_dict()), lora, root / "lora")
    return {name: str(root / name) for name in (*parts, "lora")}


def _values(folders: dict[str, str], output: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(output),
        "model": {"source": LTX2.transformer_class, "pretrained": folders["transformer"]},
        "precision": "fp32",
        "vae": {"source": "AutoencoderKLLTXVideo", "pretrained": folders["vae"]},
        "audio_vae": {"source": "AutoencoderOobleck", "pretrained": folders["audio_vae"]},
        "text": {"pretrained": folders["text"], "precision": "fp32", "max_tokens": 24},
        "prompts": ["a city at night", "a bunny"],
        "resolution": "64x32",
        "duration": {"seconds": 0.3, "frame_rate_hz": 24.0},
        "sampling": {"num_forwards": 2, "decode_precision": "fp32"},
    }
    return {**values, **changes}


def _sample(folders: dict[str, str], output: Path, **changes: Any) -> Any:
    return run_sampling(
        SampleConfig.model_validate(_values(folders, output, **changes)), source="sample.yaml"
    )


def _sheet(samples: Any) -> bytes:
    """Returns the contact sheet, which depends on the frames exactly."""
    content: bytes = samples.contact_sheet.read_bytes()
    return content


def test_every_prompt_becomes_a_clip_with_sound(folders: dict[str, str], tmp_path: Path) -> None:
    samples = _sample(folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "01.mp4",
        "02.mp4",
        "samples.json",
        "samples.png",
    ]
    assert [path.name for path in samples.clips] == ["01.mp4", "02.mp4"]
    for path in samples.clips:
        with av.open(str(path)) as film:
            assert film.streams.video[0].average_rate == 24
            assert film.streams.audio[0].rate == 16_000
            shapes = {frame.to_ndarray(format="rgb24").shape for frame in film.decode(video=0)}
            film.seek(0)
            seconds = sum(frame.samples for frame in film.decode(audio=0)) / 16_000
        assert shapes == {(320, 160, 3)}  # 64x32, enlarged fivefold
        assert seconds == pytest.approx(9 / 24, abs=0.1)  # AAC writes whole frames of 64 ms
    record = json.loads(samples.record.read_text(encoding="utf-8"))
    assert record["samples"] == [
        {"file": "01.mp4", "prompt": "a city at night"},
        {"file": "02.mp4", "prompt": "a bunny"},
    ]
    assert record["shape"] == {
        "frames": 9,
        "height": 64,
        "width": 32,
        "frame_rate_hz": 24.0,
    }  # 7 frames rounded up
    assert (record["seed"], record["sampling"]["num_forwards"], record["lora"]) == (0, 2, None)


def test_a_sample_depends_on_seed_prompt_number_and_adapter(folders: dict[str, str], tmp_path: Path) -> None:
    prompt = {"prompts": ["a city at night"]}
    first = _sheet(_sample(folders, tmp_path / "a", **prompt))
    assert _sheet(_sample(folders, tmp_path / "b", **prompt)) == first
    for name, change in {
        "c": {"prompts": ["a city at day.."]},
        "d": {"seed": 1},
        "e": {"lora": folders["lora"]},
        "f": {"empty_prompt": "ugly"},
    }.items():
        assert _sheet(_sample(folders, tmp_path / name, **{**prompt, **change})) != first, change


def test_a_transformer_without_sound_needs_no_audio_vae(folders: dict[str, str], tmp_path: Path) -> None:
    model = {"source": LTXVideo.transformer_class, "config": LTXVideo.tiny_config()}
    samples = _sample(folders, tmp_path / "out", model=model, audio_vae=None, prompts=["one"])
    with av.open(str(samples.clips[0])) as film:
        assert not film.streams.audio
    with pytest.raises(
        ConfigError,
        match=r"sample\.yaml: audio_vae: has no effect for the family 'ltx', which makes no sound",
    ):
        _sample(folders, tmp_path / "out", model=model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"audio_vae": None}, ConfigError, r"sample\.yaml: audio_vae: must be given for the family 'ltx2'"),
        (
            {"resolution": "64x40"},
            ConfigError,
            r"resolution: must be a multiple of the VAE's stride 32 both ways, got 64x40",
        ),
        ({"prompts": ["much too long for 24 tokens"]}, DataError, r"must have at most 24 tokens"),
        ({"lora": "no_such_folder"}, CheckpointError, r"no_such_folder: must hold adapter_config\.json"),
        (
            {"model": {"source": "UNet3DConditionModel", "config": {}}},
            ConfigError,
            r"must be a transformer of a known family",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    folders: dict[str, str], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _sample(folders, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists(), "nothing is written before everything is loaded"


def test_a_vae_of_other_channels_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    other = {"source": "AutoencoderKLLTXVideo", "config": {**LTX, "latent_channels": 6}}
    with pytest.raises(
        DataError, match=r"latents: the transformer of 'ltx2' takes 4 values per token, got 6"
    ):
        _sample(folders, tmp_path / "out", vae=other)


def test_a_configuration_is_read_with_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text(
        "output_dir: out\nmodel: {source: A}\nvae: {source: B}\ntext: {pretrained: C}\nprompts: [one]\n"
        "resolution: 64x32\nduration: {seconds: 1.5, frame_rate_hz: 24}\n"
    )
    config = load_sample_config(path, ["seed=4", "sampling.guidance_scale=1"], "elsewhere")
    assert (config.seed, config.output_dir, config.requested_frames, config.frame_rate_hz) == (
        4,
        "elsewhere",
        36,
        24.0,
    )
    assert config.sampling == PreviewConfig(guidance_scale=1.0)
    with pytest.raises(ConfigError) as caught:
        load_sample_config(path, ["duration={frames: 9}", "sampling.guidance_scale=0.5", "prompts=[]"])
    problems = "\n".join(caught.value.problems)
    assert "sampling.guidance_scale" in problems
    assert "prompts" in problems
    with pytest.raises(
        ConfigError,
        match=r"duration\.frame_rate_hz: must be given, because the clips have no rate of their own",
    ):
        load_sample_config(path, ["duration={frames: 9}"])
    with pytest.raises(
        ConfigError, match=r"empty_prompt: has no effect with sampling\.guidance_scale: 1, got text"
    ):
        load_sample_config(path, ["sampling.guidance_scale=1", "empty_prompt=ugly"])
