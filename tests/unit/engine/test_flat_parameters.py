"""Flat parameters of a module that no engine holds: what becomes flat, what a block computes with it, and the
way back.

The oracle of gradients is plain autograd on the module as it was.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.engine.compiled import set_compiled
from aiprod_ds.engine.flat_parameters import FlatParameters
from aiprod_ds.engine.flat_views import placed_blocks, saving_by_place
from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.gradients import TRANSFORMERS, VAES, Subject, gradient_errors, plain_gradients, subject
from aiprod_ds.train.engines import decay_groups

# The same operations on the same numbers; a compiled block may add in another order. Measured: 0 and 6e-7.
EAGER, COMPILED = 0.0, 2e-6


def gradients(trained: Subject, flat: FlatParameters) -> dict[str, Tensor]:
    """Returns the gradients of micro-batch 0, by the names of the module without flat parameters."""
    trained.loss(trained.module, 0).backward()
    found = {}
    for name, parameter in trained.module.named_parameters():
        if parameter.grad is None:
            continue
        layout = flat.layouts.get(name)
        if layout is None:
            found[name] = parameter.grad
            continue
        for member in layout.members:
            found[member.name] = parameter.grad[member.start :][: member.numel].view(member.shape)
    return found


def _weights_in_place(module: nn.Module) -> list[str]:
    return [
        f"{name}.{key}"
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    ]


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = [(name, False) for name in (*TRANSFORMERS, *VAES)] + [(name, True) for name in TRANSFORMERS]


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("name", "has_adapters"), CASES)
def test_gradients_are_those_of_plain_autograd(name: str, has_adapters: bool, recomputes: bool) -> None:
    trained = subject(name, has_adapters=has_adapters)
    expected = plain_gradients(trained, range(1))
    flat = FlatParameters(trained.module, decay_groups(trained.module), mode="on")
    flat.attach(is_traced=True)
    if recomputes:
        set_recompute(trained.module, enabled=True)
    errors = gradient_errors(gradients(trained, flat), expected)
    assert max(errors.values()) <= EAGER, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("name", [*TRANSFORMERS, *VAES])
def test_blocks_that_are_recomputed_by_their_class_find_their_weights(name: str) -> None:
    trained = subject(name)
    expected = plain_gradients(trained, range(1))
    flat = FlatParameters(trained.module, decay_groups(trained.module), mode="on")
    flat.attach(is_traced=True)
    set_recompute(trained.module, enabled=True, blocks=list(repeated_blocks(trained.module)))
    assert max(gradient_errors(gradients(trained, flat), expected).values()) <= EAGER


# dynamo looks at inputs that are no leaves
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("form", ["forward", "call"])
def test_compiled_blocks_have_the_gradients_of_plain_autograd(form: str, recomputes: bool) -> None:
    trained = subject("ltx")
    expected = plain_gradients(trained, range(1))
    flat = FlatParameters(trained.module, decay_groups(trained.module), mode="on")
    blocks = list(repeated_blocks(trained.module))
    if form == "forward":
        set_compiled(blocks, enabled=True, backend="aot_eager")
    else:  # as diffusers' compile_repeated_blocks, which traces the hooks
        for block in blocks:
            block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    flat.attach(is_traced=True)
    if recomputes:
        set_recompute(trained.module, enabled=True)
    for _ in range(2):
        trained.module.zero_grad()
        found = gradients(trained, flat)
        assert max(gradient_errors(found, expected).values()) <= COMPILED
    assert _weights_in_place(trained.module) == []


def test_the_comparison_finds_a_lost_gradient() -> None:
    trained = subject("ltx")
    expected = plain_gradients(trained, range(1))
    found = {name: value.clone() for name, value in expected.items()}
    lost = "transformer.transformer_blocks.1.attn1.to_v.weight"
    found[lost][3] = 0.0
    errors = gradient_errors(found, expected)
    assert [name for name, error in errors.items() if error > COMPILED] == [lost]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 33)
        self.down = nn.Linear(33, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.down(self.up(hidden * self.scale).relu())
        return hidden + mixed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.enter(given)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _flat(net: nn.Module, **settings: Any) -> FlatParameters:
    flat = FlatParameters(net, decay_groups(net), **settings)
    flat.attach(is_traced=True)
    return flat


def test_a_block_has_a_flat_parameter_for_each_group() -> None:
    net = _net()
    groups = decay_groups(net)
    flat = _flat(net)
    assert flat.notes == ()
    assert [name for name, _ in net.named_parameters()] == [
        "enter.weight",
        "enter.bias",
        *(f"blocks.{block}.flat_parameter_{index}" for block in range(2) for index in range(2)),
    ]
    members = {name: [member.name for member in each.members] for name, each in flat.layouts.items()}
    assert members["blocks.1.flat_parameter_0"] == ["blocks.1.scale", "blocks.1.up.bias"]
    assert members["blocks.1.flat_parameter_1"] == ["blocks.1.up.weight", "blocks.1.down.weight"]
    decayed, plain = flat.groups(net, groups)
    # Flat ones lead: weights of odd sizes before them would leave them unaligned in one buffer.
    assert decayed == [net.blocks[0].flat_parameter_1, net.blocks[1].flat_parameter_1, net.enter.weight]
    assert plain == [net.blocks[0].flat_parameter_0, net.blocks[1].flat_parameter_0, net.enter.bias]


def test_a_limit_cuts_a_block_into_several() -> None:
    flat = _flat(_net(), max_elements=300)
    members = [[member.name for member in layout.members] for layout in flat.layouts.values()]
    assert members[:3] == [
        ["blocks.0.scale", "blocks.0.up.bias"],
        ["blocks.0.up.weight"],
        ["blocks.0.down.weight"],
    ]


@pytest.mark.parametrize("includes_frozen", [False, True])
def test_frozen_parameters_become_flat_if_asked(includes_frozen: bool) -> None:
    net = _net()
    for block in net.blocks:
        block.up.requires_grad_(False)
    flat = _flat(net, includes_frozen=includes_frozen)
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    if includes_frozen:
        assert frozen == ["blocks.0.flat_parameter_1", "blocks.1.flat_parameter_1"]
        members = [member.name for member in flat.layouts[frozen[0]].members]
        assert members == ["blocks.0.up.weight", "blocks.0.up.bias"]
    else:
        assert frozen == [f"blocks.{block}.up.{name}" for block in range(2) for name in ("weight", "bias")]


def test_restoring_gives_names_order_and_values_back() -> None:
    net, plain = _net(), _net()
    given = torch.randn(4, 3)
    flat = _flat(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    moved = net(given)
    flat.restore()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(net.state_dict()) == list(plain.state_dict())
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert type(own) is nn.Parameter
        assert own.requires_grad
        assert torch.equal(own, 2.0 * other)
    assert torch.equal(net(given), moved)
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules()) == 0
    assert flat.layouts == {}


def test_a_copy_computes_with_its_own_weights() -> None:
    net = _net()
    given = torch.randn(4, 3)
    _flat(net)
    answer = net(given)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(copied(given), answer)


def test_an_error_inside_a_block_leaves_no_views() -> None:
    net = _net()
    flat = _flat(net)
    with pytest.raises(RuntimeError):
        net.blocks[0](torch.ones(1, 5))
    assert _weights_in_place(net) == []
    assert placed_blocks() == ()
    flat.restore()
    net.blocks[0](torch.ones(1, 8))


def test_weights_are_not_there_between_forwards() -> None:
    net = _net()
    _flat(net)
    with pytest.raises(TypeError, match="must be Tensor, not InFlatParameter"):
        net.blocks[0].up(torch.ones(1, 8))
    assert "(up): Linear(in_features=8, out_features=33, bias=True)" in repr(net)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up.weight = self.blocks[0].up.weight


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.gru = nn.GRU(8, 8)


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].scale.register_hook(torch.neg)


class Strided(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].down.weight = nn.Parameter(torch.ones(33, 8).T)


class Typed(Net):
    def __init__(self) -> None:
        super().__init__()

        class Own(nn.Parameter):
            pass

        self.blocks[1].scale = Own(torch.ones(8))


@pytest.mark.parametrize(
    ("kind", "note", "kept"),
    [
        (Tied, "blocks.0.up.weight and 1 more stay as they are: the model has it in several places", 1),
        (Recurrent, "blocks.0.gru.weight_ih_l0 and 7 more stay as they are: GRU keeps a list", 8),
        (Hooked, "blocks.0.scale stays as it is: it has hooks", 1),
        (Strided, "blocks.1.down.weight stays as it is: its elements are not contiguous", 1),
        (Typed, "blocks.1.scale stays as it is: it is of type Own", 1),
    ],
)
def test_what_cannot_be_a_view_stays_and_is_told(kind: type[Net], note: str, kept: int) -> None:
    net = kind()
    names = {name for name, _ in net.named_parameters()}
    with pytest.raises(EngineError, match="flat_parameters: cannot be on, got blocks"):
        FlatParameters(net, decay_groups(net), mode="on")
    assert {name for name, _ in net.named_parameters()} == names, "an error changes nothing"
    flat = FlatParameters(net, decay_groups(net), mode="auto")
    assert len(flat.notes) == 1
    assert flat.notes[0].startswith(note)
    left = [name for name, _ in net.named_parameters() if name in names and name.startswith("blocks.")]
    assert len(left) == kept


def _subject(net: nn.Module, loss: Callable[..., Tensor]) -> Subject:
    """Returns a model whose loss needs no micro-batch."""
    return Subject(module=net, batch=lambda _: {}, loss_of=loss)


def test_a_parametrized_weight_is_a_view_of_its_original() -> None:
    net = _net()
    for block in net.blocks:
        nn.utils.parametrizations.weight_norm(block.up)
    given = torch.randn(4, 3)
    net(given).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    flat = _flat(net, mode="on")
    trained = _subject(net, lambda run, _: run(given).square().sum())
    assert max(gradient_errors(gradients(trained, flat), expected).values()) <= EAGER


def test_attention_of_torch_takes_views() -> None:
    class Attending(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            mixed = super().forward(hidden)
            return self.attention(mixed, mixed, mixed, need_weights=False)[0]

    net = _net()
    net.blocks = nn.ModuleList(Attending() for _ in range(2))
    given = torch.randn(4, 3)
    net(given).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    flat = _flat(net, mode="on")
    trained = _subject(net, lambda run, _: run(given).square().sum())
    assert max(gradient_errors(gradients(trained, flat), expected).values()) <= EAGER
    with torch.no_grad():
        net.eval()(given)  # its fast path


def test_a_model_without_blocks_stays_as_it_is() -> None:
    net = nn.Linear(2, 2)
    assert FlatParameters(net, decay_groups(net)).notes == ("the model has no repeated blocks",)
    with pytest.raises(EngineError, match="cannot be on, got the model has no repeated blocks"):
        FlatParameters(net, decay_groups(net), mode="on")


def test_blocks_of_which_nothing_is_trained_stay_as_they_are() -> None:
    net = _net()
    net.blocks.requires_grad_(False)
    with pytest.raises(EngineError, match="nothing in the model's repeated blocks"):
        FlatParameters(net, decay_groups(net), mode="on")


def test_off_leaves_everything() -> None:
    net = _net()
    flat = _flat(net, mode="off")
    assert flat.layouts == {}
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in _net().named_parameters()]


def test_views_are_saved_by_their_place() -> None:
    net = _net()
    given = torch.randn(4, 3)
    net(given).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    flat = _flat(net)
    with saving_by_place():
        loss = net(given).square().sum()
    whole = {name: net.get_parameter(name) for name in flat.layouts}
    kept = [weakref.ref(parameter.untyped_storage()) for parameter in whole.values()]
    values = {name: parameter.data.clone() for name, parameter in whole.items()}
    for parameter in whole.values():
        parameter.data = torch.empty(0)
    assert [reference for reference in kept if reference() is not None] == [], "the graph keeps no storage"
    for name, parameter in whole.items():
        parameter.data = values[name]
    trained = _subject(net, lambda *_: loss)
    assert max(gradient_errors(gradients(trained, flat), expected).values()) <= EAGER


def test_a_view_that_is_not_gathered_again_is_an_error() -> None:
    net = _net()
    _flat(net)
    with saving_by_place():
        loss = net(torch.randn(4, 3)).square().sum()
    for parameter in net.blocks.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(EngineError, match="must be gathered before gradients are computed"):
        loss.backward()
