"""Small models whose gradients are compared with those of plain autograd: a transformer of each family, and
VAEs.

Owns the models, the loss of a numbered micro-batch, the oracle and the comparison; what computes the other
gradients is the test's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.vae import prepare_vae
from aiprod_ds.testing.families import adapted_transformer, tiny_batch, tiny_transformer, velocities
from aiprod_ds.testing.tiny import tiny_ltx_vae, tiny_oobleck

TRANSFORMERS = tuple(family.name for family in FAMILIES)
VAES = ("ltx_vae", "oobleck")
_STRIDES = ModelStrides(spatial=32, temporal=8)
_LORA = LoraConfig(rank=4, alpha=6.0, targets=("to_q", "to_k", "to_v", "to_out.0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to train.

    Attributes:
        module: In fp32; depends on nothing but the name.
        batch: Gives the tensors of a numbered micro-batch, on the device.
        loss_of: Gives the loss of such tensors, 0-dim fp32, computed by what is called as the module is.
    """

    module: nn.Module
    batch: Callable[[int], dict[str, Tensor]]
    loss_of: Callable[[Callable[..., Any], Mapping[str, Tensor]], Tensor]

    def loss(self, run: Callable[..., Any], number: int) -> Tensor:
        """Returns the loss of a numbered micro-batch."""
        return self.loss_of(run, self.batch(number))


def subject(name: str, *, has_adapters: bool = False, device: torch.device | None = None) -> Subject:
    """Returns the model of that name, of `TRANSFORMERS` or `VAES`; with adapters, only they are trained."""
    found = _subject(name, has_adapters=has_adapters)
    found.module.to(device)

    def batch(number: int) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in found.batch(number).items()}

    return Subject(module=found.module, batch=batch, loss_of=found.loss_of)


def _subject(name: str, *, has_adapters: bool) -> Subject:
    if name == "ltx_vae":
        return _vae("AutoencoderKLLTXVideo", tiny_ltx_vae(), (1, 3, 9, 32, 32))
    if name == "oobleck":
        return _vae("AutoencoderOobleck", tiny_oobleck(), (1, 2, 256))
    family_type = next(family for family in FAMILIES if family.name == name)
    plain = tiny_transformer(family_type)
    transformer = adapted_transformer(family_type, _LORA) if has_adapters else plain
    family = find_family(plain, _STRIDES)

    def loss(run: Callable[..., Any], tensors: Mapping[str, Tensor]) -> Tensor:
        return velocities(run, family, tensors).float().square().mean()

    module = DiffusionModule(transformer, family)
    return Subject(module=module, batch=lambda number: tiny_batch(seed=number), loss_of=loss)


def plain_gradients(trained: Subject, numbers: range) -> dict[str, Tensor]:
    """Returns the gradients of the mean loss over the micro-batches `numbers`, in fp32, by eager autograd."""
    for number in numbers:
        (trained.loss(trained.module, number) / len(numbers)).backward()  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {}
    for name, parameter in trained.module.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
    return found


def gradient_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns ||found - expected|| / ||expected|| of every parameter.

    The denominator is at least a hundredth of what a parameter of that size has on average: where a gradient
    vanishes, as that of a bias before a softmax, all of it is rounding.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    numel = sum(value.numel() for value in expected.values())
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    errors = {}
    for name, value in expected.items():
        least = 1e-2 * total * (value.numel() / numel) ** 0.5
        error = (found[name].float() - value).norm() / torch.maximum(value.norm(), least)
        errors[name] = float(error)
    return errors


class _Reconstruction(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        vae: Any = self.vae
        posterior = vae.encode(given).latent_dist
        scale = posterior.logvar if hasattr(posterior, "logvar") else posterior.scale
        return vae.decode(posterior.mean).sample, scale


def _vae(class_name: str, settings: Mapping[str, Any], shape: tuple[int, ...]) -> Subject:
    import diffusers

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Oobleck has torch's old weight norm
        torch.manual_seed(0)
        module = _Reconstruction(prepare_vae(getattr(diffusers, class_name)(**settings)))

    def batch(number: int) -> dict[str, Tensor]:
        return {"given": torch.randn(shape, generator=torch.Generator().manual_seed(number))}

    def loss(run: Callable[..., Any], tensors: Mapping[str, Tensor]) -> Tensor:
        given = tensors["given"]
        decoded, scale = run(given.to(next(module.parameters()).dtype))
        total: Tensor = (decoded.float() - given).square().mean() + scale.float().square().mean()
        return total

    return Subject(module=module, batch=batch, loss_of=loss)
