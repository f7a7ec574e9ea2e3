"""The checks of configuration and losses: each number is computed by the public class and by its formula on
inputs for which the formula is short.

Shapes: B batch, C channels, T frames, H height, W width, N samples.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from aiprod_ds.config.losses import (
    AudioVAELossConfig,
    PerceptualConfig,
    SpectralConfig,
    VideoVAELossConfig,
)
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.losses import AudioVAELoss, PerceptualLoss, SpectralLoss, VideoVAELoss
from aiprod_ds.losses.vgg import LAYERS, WEIGHTS_NAME, WeightsUnavailableError, local_weights
from aiprod_ds.validate.check import require_close, require_equal

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RANKS = 2


def vae_configuration() -> str:
    """Checks the default curriculum of a video VAE, as its plan derives it for two ranks."""
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": "runs/validate",
            "model": {"source": "AutoencoderKLLTXVideo"},
            "data": {"train": "clips"},
            "curriculum": {"preset": "default"},
        }
    )
    plan = plan_run(config, world_size=_RANKS, strides=ModelStrides(spatial=32, temporal=8))
    shapes = [
        (phase.buckets[0].height, phase.buckets[0].width, phase.buckets[0].frames) for phase in plan.phases
    ]
    # 8 and 16 frames become 1 + 8 k
    require_equal("shapes of the phases", shapes, [(256, 256, 9), (512, 512, 17), (1024, 1024, 49)])
    batches = [
        (phase.buckets[0].micro_batch_size, phase.buckets[0].accumulation, phase.buckets[0].global_batch_size)
        for phase in plan.phases
    ]
    require_equal(
        "micro-batch, accumulation and global batch", batches, [(16, 1, 32), (8, 2, 32), (4, 4, 32)]
    )
    return "shapes and batches of the default curriculum on 2 ranks"


def video_loss() -> str:
    """Checks reconstruction, KL and the perceptual term without a network: a clip of 96 elements that is off
    by 0.5, with a latent of 8 elements of mean 2 and log-variance 0."""
    config = VideoVAELossConfig(
        perceptual_weight=2.0, kl_weight=0.1, haar_weight=1.0, perceptual=PerceptualConfig(mode="l2")
    )
    target_BCTHW = torch.linspace(-0.5, 0.4, 96).view(1, 3, 2, 4, 4)
    loss = VideoVAELoss(config, PerceptualLoss(config.perceptual))
    terms = loss(
        target_BCTHW + 0.5, target_BCTHW, torch.full((1, 8, 1, 1, 1), 2.0), torch.zeros(1, 8, 1, 1, 1)
    )
    kl, haar = 8 * 2.0 / 96, 0.5 * 8**0.5 / 8  # of the eight bands only the low one differs
    expected = 0.5 + 2.0 * 0.25 + 0.1 * kl + haar
    require_close("L1 + 2 MSE + 0.1 KL + Haar", float(terms.total), expected)
    return f"L1, MSE, KL and Haar bands sum to {expected:.6f}"


def audio_loss() -> str:
    """Checks waveform, spectral distance and KL: silence against one sample of height 1, a latent of 3
    channels of mean 2 and log-variance 0."""
    target, reconstruction = _silence_and_a_click()
    config = AudioVAELossConfig(spectral=SpectralConfig(fft_sizes=(256,)))
    terms = AudioVAELoss(config)(reconstruction, target, torch.full((1, 3, 4), 2.0), torch.zeros(1, 3, 4))
    expected = 0.1 / 1024 + _click_in_a_spectrum() + 1e-4 * 3 * 2.0
    require_close("0.1 L1 + spectral + 1e-4 KL", float(terms.total), expected)
    return f"L1, spectral distance and KL sum to {expected:.6f}"


def spectral_loss() -> str:
    """Checks the distance of a click from silence, and that of a sine from itself."""
    loss = SpectralLoss(SpectralConfig(fft_sizes=(256,)))
    target, reconstruction = _silence_and_a_click()
    require_close("a click", float(loss(reconstruction, target)), _click_in_a_spectrum())
    phase_N = 2 * math.pi * 32 * torch.arange(4096) / 256  # the centre of a bin
    sine_BN = 0.25 * torch.sin(phase_N).unsqueeze(0)
    logarithm = SpectralLoss(SpectralConfig(fft_sizes=(256,), log="log1p"))
    equal = float(logarithm(sine_BN, sine_BN.clone()))
    require_close("a sine and itself", equal, 0.0)
    return f"a click is {_click_in_a_spectrum():.6f} from silence"


def _silence_and_a_click() -> tuple[Tensor, Tensor]:
    target_BN = torch.zeros(1, 1024)
    click_BN = target_BN.clone()
    click_BN[0, 512] = 1.0
    return target_BN, click_BN


def _click_in_a_spectrum() -> float:
    """Returns the distance by hand: of 17 frames three see the click, with the window's 1, 0.5 and 0.5, in
    all bins alike; 1e-8 stands under the root, 1e-5 before the logarithm."""
    seen = [math.sqrt(weight**2 + 1e-8) for weight in (1.0, 0.5, 0.5)]
    silent = math.sqrt(1e-8)
    heights = sum(value - silent for value in seen) / 17
    logarithms = sum(math.log((value + 1e-5) / (silent + 1e-5)) for value in seen) / 17
    return heights + logarithms


def perceptual_loss() -> str:
    """Checks the distance through VGG16, and what takes its place."""
    return f"{_perceptual_with_vgg16()}; {_perceptual_without_network()}"


def vgg_note() -> str:
    """Returns what to do if VGG16's weights are not on this machine; empty if they are."""
    try:
        local_weights(None)
    except WeightsUnavailableError:
        return f"Before training with perceptual_weight: put {WEIGHTS_NAME} into the torch hub cache."
    return ""


def _perceptual_with_vgg16() -> str:
    """Checks the distance in VGG16's features against torchvision's own layers, with the published weights
    where they are on this machine, else with random ones."""
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_validate_") as folder:
        file, says = _weights(Path(folder))
        config = PerceptualConfig(mode="vgg", weights=str(file))
        loss = PerceptualLoss(config, allow_unverified_weights=True)
        layers = _vgg16()
        state = torch.load(file, map_location="cpu", weights_only=True)
        features = {key: value for key, value in state.items() if key.startswith("features.")}
        layers.load_state_dict({key.removeprefix("features."): value for key, value in features.items()})
    generator = torch.Generator().manual_seed(0)
    target_BCTHW, other_BCTHW = (torch.rand(1, 3, 1, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = _feature_distance(layers, other_BCTHW[:, :, 0], target_BCTHW[:, :, 0])
        got = float(loss(other_BCTHW, target_BCTHW))
        same = float(loss(target_BCTHW, target_BCTHW))
    require_close("mean over five layers of the squared difference", got / expected, 1.0, tolerance=1e-4)
    require_equal("a clip and itself", same, 0.0)
    return says


def _perceptual_without_network() -> str:
    """Checks what takes the place of the network: the mean squared error."""
    loss = PerceptualLoss(PerceptualConfig(mode="l2"))
    target_BCTHW = torch.zeros(1, 3, 2, 8, 8)
    require_close("mean squared error", float(loss(target_BCTHW + 0.5, target_BCTHW)), 0.25)
    require_equal("what is computed", loss.active_mode, "l2")
    return "without a network, clips 0.5 apart are 0.25 apart"


def _weights(folder: Path) -> tuple[Path, str]:
    try:
        return local_weights(None), "VGG16 with the published weights"
    except WeightsUnavailableError:
        file = folder / WEIGHTS_NAME
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Module()
            network.features = _vgg16()
        torch.save(network.state_dict(), file)
        return file, "VGG16 with random weights"


def _vgg16() -> nn.Sequential:
    layers: nn.Sequential = make_layers(list(_VGG16))
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return layers


def _feature_distance(layers: nn.Sequential, other_NCHW: Tensor, target_NCHW: Tensor) -> float:
    shift = torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1)
    scale = torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1)
    outputs = [((image_NCHW + 1) / 2 - shift) / scale for image_NCHW in (other_NCHW, target_NCHW)]
    distances = []
    for index, layer in enumerate(layers):
        outputs = [layer(output) for output in outputs]
        if index in LAYERS.values():
            distances.append((outputs[0] - outputs[1]).square().mean())
    return float(torch.stack(distances).mean())
