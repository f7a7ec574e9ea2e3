"""Activation checkpointing changes memory and nothing else: same losses, same gradients, same keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.tiny import two_width_ltx_vae


class Block(nn.Module):
    forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        Block.forwards += 1
        return x + self.dropout(torch.tanh(self.linear(x * self.scale))) * gain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gain=0.5)
        return x


def _run(module: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    torch.manual_seed(1)
    Block.forwards = 0
    module.zero_grad()
    loss = module(torch.randn(4, 8)).pow(2).mean()
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, Block.forwards


def test_losses_and_gradients_are_bitwise_equal_and_blocks_run_twice() -> None:
    net = Net()
    loss, gradients, forwards = _run(net)
    set_recompute(net, enabled=True)
    checkpointed_loss, checkpointed_gradients, checkpointed_forwards = _run(net)
    assert torch.equal(loss, checkpointed_loss)
    assert all(torch.equal(gradients[name], checkpointed_gradients[name]) for name in gradients)
    assert (forwards, checkpointed_forwards) == (3, 6)


@pytest.mark.parametrize(("every", "forwards"), [(1, 6), (2, 5), (3, 4), (9, 4)])
def test_every_nth_block_is_recomputed_with_the_same_gradients(every: int, forwards: int) -> None:
    net = Net()
    loss, gradients, _ = _run(net)
    set_recompute(net, enabled=True, every=every)
    own_loss, own_gradients, own_forwards = _run(net)
    assert torch.equal(loss, own_loss)
    assert all(torch.equal(gradients[name], own_gradients[name]) for name in gradients)
    assert own_forwards == forwards


def test_blocks_are_found_while_some_are_recomputed() -> None:
    net = Net()
    set_recompute(net, enabled=True, every=2)
    assert list(repeated_blocks(net)) == list(net.blocks)


def test_another_share_replaces_the_one_before() -> None:
    net = Net()
    for every in (1, 2, 3):
        set_recompute(net, enabled=True, every=every)
    assert _run(net)[2] == 4


def test_it_can_be_repeated_and_undone() -> None:
    net = Net()
    keys = list(net.state_dict())
    set_recompute(net, enabled=True)
    set_recompute(net, enabled=True)
    assert list(net.state_dict()) == keys
    assert isinstance(net.blocks[0], Block)
    set_recompute(net, enabled=False)
    assert type(net.blocks[0]) is Block
    assert _run(net)[2] == 3


def test_a_deep_copy_runs_its_own_weights() -> None:
    net = Net()
    set_recompute(net, enabled=True)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert _run(net)[0] != _run(twin)[0]


def test_nothing_is_recomputed_without_gradients() -> None:
    net = Net()
    set_recompute(net, enabled=True)
    Block.forwards = 0
    with torch.no_grad():
        net(torch.randn(2, 8))
    assert Block.forwards == 3


def test_given_blocks_are_used_instead_of_the_search() -> None:
    net = Net()
    set_recompute(net, enabled=True, blocks=[net.blocks[1]])
    assert _run(net)[2] == 4


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(EngineError, match="needs repeated blocks in the model, got Linear without any"):
        set_recompute(nn.Linear(2, 2), enabled=True)


def test_a_model_without_blocks_may_stay_off() -> None:
    set_recompute(nn.Linear(2, 2), enabled=False)


def test_a_diffusers_model_inside_another_module_uses_its_own_switch() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(**two_width_ltx_vae())

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, video: Tensor) -> Tensor:
            return self.vae(video).sample

    net = Wrapper().train()
    video = torch.randn(1, 3, 9, 16, 16)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        net(video).pow(2).mean().backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    plain = gradients()
    set_recompute(net, enabled=True)
    assert vae.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    set_recompute(net, enabled=True, every=2)
    assert not vae.is_gradient_checkpointing
    assert "checkpointing" in " ".join(vars(type(vae.encoder.down_blocks[0])))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    set_recompute(net, enabled=True)
    assert type(vae.encoder.down_blocks[0]).__mro__[1] is nn.Module
    set_recompute(net, enabled=False)
    assert not vae.is_gradient_checkpointing
