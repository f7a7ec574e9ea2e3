"""The gradient at a decoder's last layer against autograd's own, with respect to the weight itself.

Exact but for the order of additions: in fp32 within 1e-5 of the norm, in bf16 and fp16 within what the last
operations round.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.models.audio_vae import AudioVAE
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_ltx_vae, tiny_oobleck
from aiprod_ds.trainers.adversarial.last_layer import LastLayer, find_last_layer, is_layer


class _Tail(nn.Module):
    """A module like `VideoVAE` whose decoder ends in some layer and something after it."""

    def __init__(self, layer: nn.Module, tail: Callable[[Tensor], Tensor], *, calls: int = 1) -> None:
        super().__init__()
        self.body, self.last = nn.Conv1d(2, 4, 3, padding=1), layer
        self._tail, self._calls = tail, calls

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.body(clips))
        parts = [self.last(part) for part in hidden.chunk(self._calls, dim=-1)]
        return self._tail(torch.cat(parts, dim=-1)), hidden, hidden


CASES: dict[str, Callable[[], _Tail]] = {
    "convolution": lambda: _Tail(nn.Conv1d(4, 2, 3, padding=1), lambda found: found),
    "circular": lambda: _Tail(nn.Conv1d(4, 2, 3, padding=1, padding_mode="circular"), torch.tanh),
    "transposed": lambda: _Tail(
        nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1), lambda found: found[..., ::2]
    ),
    "clamped": lambda: _Tail(nn.Conv1d(4, 2, 3, padding=1), lambda found: found.clamp(-0.2, 0.2)),
    "normalised": lambda: _Tail(weight_norm(nn.Conv1d(4, 2, 3, padding=1)), torch.tanh),
    "in_pieces": lambda: _Tail(nn.Conv1d(4, 2, 3, padding=1), torch.tanh, calls=3),
}


def _measure(module: nn.Module, layer: LastLayer, clips: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient that is measured and autograd's, of <slope, output>."""
    with layer.recording(module) as record:
        output = module(clips)[0]
    found = layer.weight_gradient(record, slope.float())
    weight = module.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    if not weight.requires_grad or not weight.is_leaf:
        raise AssertionError("compare normalised weights apart")
    (expected,) = torch.autograd.grad(output, weight, slope.to(output.dtype))
    return found, expected.float()


@pytest.mark.parametrize("case", [name for name in CASES if name != "normalised"])
def test_it_is_autograds(case: str) -> None:
    torch.manual_seed(0)
    module, clips = CASES[case](), torch.randn(3, 2, 12)
    layer = LastLayer(module, "last")
    slope = 1e-6 * torch.randn_like(module(clips)[0])
    found, expected = _measure(module, layer, clips, slope)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))
    assert float(expected.norm()) > 0


def test_of_a_normalised_weight_it_is_that_of_the_weight_as_used() -> None:
    torch.manual_seed(0)
    module, clips = CASES["normalised"](), torch.randn(3, 2, 12)
    layer, plain = LastLayer(module, "last"), CASES["convolution"]()
    plain._tail = torch.tanh
    with torch.no_grad():
        plain.body.load_state_dict(module.body.state_dict())
        plain.last.weight.copy_(module.last.weight)  # type: ignore[operator, union-attr]
        plain.last.bias.copy_(module.last.bias)  # type: ignore[operator, union-attr]
    slope = torch.randn(3, 2, 12)
    with layer.recording(module) as record:
        module(clips)
    _, expected = _measure(plain, LastLayer(plain, "last"), clips, slope)
    torch.testing.assert_close(layer.weight_gradient(record, slope), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_gradients_too_small_for_16_bits_are_measured(dtype: torch.dtype, tolerance: float) -> None:
    """1e-9 is 0 in fp16."""
    torch.manual_seed(0)
    module, clips = CASES["circular"](), torch.randn(3, 2, 12)
    slope = 1e-9 * torch.randn(3, 2, 12)
    _, expected = _measure(module, LastLayer(module, "last"), clips, slope)
    module.to(dtype)
    layer = LastLayer(module, "last")
    with layer.recording(module) as record:
        module(clips.to(dtype))
    found = layer.weight_gradient(record, slope)
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_the_last_layer_of_published_classes_is_found_and_measured() -> None:
    torch.manual_seed(0)
    ltx = VideoVAE(AutoencoderKLLTXVideo(**tiny_ltx_vae()))
    clips = torch.randn(1, 3, 9, 32, 32)
    assert find_last_layer(ltx, clips.to("meta")) == "vae.decoder.conv_out.conv"
    _require_autograds(ltx, "vae.decoder.conv_out.conv", clips, "weight")
    tiny = VideoVAE(TinyVideoVAE())
    assert find_last_layer(tiny, torch.empty(1, 3, 5, 16, 16, device="meta")) == "vae.leave"


def test_the_last_layer_of_oobleck_is_measured_through_its_weight_norm() -> None:
    """d L / d g = sum of d L / d w * v / ||v|| over a row, from the definition of weight norm."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(source="AutoencoderOobleck", config=tiny_oobleck()), seed=0)
    module = AudioVAE(model)
    clips = 0.1 * torch.randn(2, 2, 64)
    name = find_last_layer(module, clips.to("meta"))
    assert name is not None
    layer = LastLayer(module, name)
    with layer.recording(module) as record:
        output = module(clips)[0]
    slope = torch.randn_like(output)
    found = layer.weight_gradient(record, slope)
    own = module.get_submodule(name)
    (at_gain,) = torch.autograd.grad(output, own.get_parameter("weight_g"), slope)
    direction = own.get_parameter("weight_v")
    direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1)
    expected = (found * direction).sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(at_gain, expected.detach(), rtol=1e-4, atol=1e-5)


def _require_autograds(module: nn.Module, name: str, clips: Tensor, weight: str) -> None:
    layer = LastLayer(module, name)
    with layer.recording(module) as record:
        output = module(clips)[0]
    slope = torch.randn_like(output)
    found = layer.weight_gradient(record, slope)
    (expected,) = torch.autograd.grad(output, module.get_submodule(name).get_parameter(weight), slope)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))


def test_the_graph_stays_and_hooks_go() -> None:
    module, clips = CASES["clamped"](), torch.randn(3, 2, 12)
    layer = LastLayer(module, "last")
    with layer.recording(module) as record:
        output = module(clips)[0]
    first = layer.weight_gradient(record, torch.ones_like(output))
    assert torch.equal(layer.weight_gradient(record, torch.ones_like(output)), first)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert not module._forward_hooks
    assert not module.last._forward_hooks


def test_a_model_that_needs_values_has_no_layer_to_be_found() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv1d(1, 1, 1)

        def forward(self, clips: Tensor) -> Tensor:
            found: Tensor = self.last(clips) + torch.zeros(3)
            return found

    assert find_last_layer(Drawing(), torch.empty(1, 1, 3, device="meta")) is None
    assert is_layer(Drawing(), "last")
    assert not is_layer(Drawing(), "first")
