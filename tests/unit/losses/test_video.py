"""VideoVAELoss: worked numbers, weights, names, formats."""

import urllib.request

import pytest
import torch

from aiprod_ds.config.losses import PerceptualConfig, VideoVAELossConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses import PerceptualLoss, VideoVAELoss


@pytest.fixture
def fallback(monkeypatch, tmp_path):
    """The L2 fallback, reached through a network that is really unreachable."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen reads the proxies once per process
    return PerceptualLoss(PerceptualConfig(fallback="l2"))


def _inputs(dtype=torch.float32):
    x = torch.rand(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.9
    mean, logvar = torch.full((1, 2, 1, 2, 2), 2.0), torch.zeros(1, 2, 1, 2, 2)
    return [tensor.to(dtype) for tensor in (x + 0.5, x, mean, logvar)]


def test_worked_number_of_the_docstring():
    loss = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0, kl_weight=0.1, haar_weight=1.0), None)

    terms = loss(*_inputs())

    # fp32 means of 96 numbers.
    assert terms.total.item() == pytest.approx(0.693443, abs=2e-6)
    assert {name: pytest.approx(value.item(), abs=2e-6) for name, value in terms.terms.items()} == {
        "loss/total": 0.693443,
        "loss/reconstruction_l1": 0.5,
        "loss/kl": 0.166667,
        "loss/haar": 0.176777,
        "latent/mean": 2.0,
        "latent/std": 0.0,
        "latent/collapsed_share": 0.0,
    }


def test_defaults_are_the_documented_ones(fallback):
    terms = VideoVAELoss(VideoVAELossConfig(), fallback)(*_inputs())

    # L1 0.5 + 1.0 * MSE 0.25 (fallback) + 1e-6 * 16/96; Haar measured only.
    assert terms.total.item() == pytest.approx(0.75 + 1e-6 / 6, abs=2e-6)
    assert terms.terms["loss/perceptual"].item() == pytest.approx(0.25, abs=1e-6)
    assert terms.terms["loss/haar"].item() > 0


def test_terms_of_weight_zero_are_measured_and_not_trained(fallback):
    inputs = _inputs()
    inputs[2].requires_grad_()
    inputs[0].requires_grad_()
    config = VideoVAELossConfig(perceptual_weight=0.0, kl_weight=0.0)

    terms = VideoVAELoss(config, fallback)(*inputs)
    terms.total.backward()

    assert torch.equal(terms.total.detach(), terms.terms["loss/reconstruction_l1"])
    assert terms.terms["loss/kl"].item() > 0
    assert terms.terms["loss/perceptual"].item() > 0
    assert inputs[2].grad is None
    assert inputs[0].grad is not None


def test_mse_reconstruction_has_its_own_name():
    terms = VideoVAELoss(VideoVAELossConfig(reconstruction="mse", perceptual_weight=0.0), None)(*_inputs())

    assert terms.terms["loss/reconstruction_mse"].item() == pytest.approx(0.25, abs=1e-6)
    assert "loss/reconstruction_l1" not in terms.terms


def test_kl_reduction_is_selectable():
    terms = VideoVAELoss(VideoVAELossConfig(kl_reduction="mean", perceptual_weight=0.0), None)(*_inputs())

    assert terms.terms["loss/kl"].item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(fallback, dtype):
    inputs = _inputs(dtype)
    loss = VideoVAELoss(VideoVAELossConfig(kl_weight=0.1, haar_weight=0.1), fallback)
    expected = loss(*(tensor.float() for tensor in inputs))
    inputs[0].requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(*inputs)
    terms.total.backward()

    assert {value.dtype for value in terms.terms.values()} == {torch.float32}
    assert {name: value.item() for name, value in terms.terms.items()} == {
        n: v.item() for n, v in expected.terms.items()
    }
    assert inputs[0].grad.dtype == dtype


def test_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 1, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, logvar = (torch.randn(1, 2, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0, kl_weight=0.1, haar_weight=0.1), None)

    assert torch.autograd.gradcheck(
        lambda y, m, v: loss(y, x, m, v).total,
        (y.requires_grad_(), mean.requires_grad_(), logvar.requires_grad_()),
    )


def test_a_weight_without_a_network_is_refused():
    with pytest.raises(
        ConfigError, match=r"perceptual_weight: must be 0 without a perceptual network, got 1\.0"
    ):
        VideoVAELoss(VideoVAELossConfig(), None)


def test_shapes_that_differ_are_refused():
    loss = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0), None)
    _, x, mean, logvar = _inputs()
    with pytest.raises(DataError, match=r"of one shape, got \[1, 3, 1, 4, 4\] and \[1, 3, 2, 4, 4\]"):
        loss(x[:, :, :1], x, mean, logvar)


def test_the_loss_holds_no_parameters(fallback):
    loss = VideoVAELoss(VideoVAELossConfig(), fallback)

    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
