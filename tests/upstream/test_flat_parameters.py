"""What DeepSpeed 0.19.8 does to flat parameters under ZeRO-3, and to `torch.nn.functional.linear`. A failure
here means that an upgrade changed it: see the remedy.

All cases run in one call on one CPU rank; the tests read its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from aiprod_ds.engine.flat_parameters import FlatParameters
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.testing.dist import run_on_ranks

pytestmark = [pytest.mark.upstream, pytest.mark.dist]


@pytest.fixture(scope="session")
def report() -> dict[str, Any]:
    return run_on_ranks(observe_everything, ranks=1)[0]


def test_a_leaf_module_reduces_before_a_flat_parameter_has_its_gradient(report: dict[str, Any]) -> None:
    """Remedy: `unhook_parts` in place of leaf modules."""
    assert report["gradient_norm"] == {"plain": pytest.approx(report["true_norm"], rel=1e-5), "leaf": 0.0}


def test_parts_without_parameters_have_hooks(report: dict[str, Any]) -> None:
    """Remedy: `unhook_parts`."""
    assert report["hooks_of_parts"] > 0


def test_the_replaced_dictionaries_keep_parameters_alive(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown` drops them."""
    assert report["replaced_dictionaries"] == [["flat_parameter_0", "flat_parameter_1"]] * 2


def test_partitions_of_a_group_share_their_memory(report: dict[str, Any]) -> None:
    """Remedy: `separate_partitions`."""
    assert report["storages_of_partitions"] == 1


def test_the_setting_leaves_the_linear_of_torch_alone(report: dict[str, Any]) -> None:
    """Relied on by `keep_linear`."""
    assert report["linear_replaced"] == {"by_default": True, "memory_efficient_linear: false": False}


def test_its_linear_is_an_autograd_function_where_it_is_compiled(report: dict[str, Any]) -> None:
    """Remedy: `_memory_efficient_linear` is torch's own there. On a GPU (inductor of torch 2.11) gradients of
    weights are lost in such a function."""
    assert report["functions_in_graph"] == {"deepspeed": 1, "ours": 0, "torch": 0}


# Below runs on the rank.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.down(self.up(hidden).relu())
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


def observe_everything() -> dict[str, Any]:
    return {
        "true_norm": _true_norm(),
        "gradient_norm": {"plain": _gradient_norm(is_leaf=False), "leaf": _gradient_norm(is_leaf=True)},
        **_observe_engine(),
        "linear_replaced": {
            "by_default": _is_linear_replaced(),
            "memory_efficient_linear: false": _is_linear_replaced(memory_efficient_linear=False),
        },
        "functions_in_graph": _functions_in_graph(),
    }


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _loss(run: Any) -> Tensor:
    loss: Tensor = run(torch.ones(4, 3)).square().mean()
    return loss


def _flat(net: Net) -> FlatParameters:
    names = tuple(name for name, _ in net.named_parameters())
    groups = [ParameterGroup(names=names, is_decayed=True)]
    return FlatParameters(net, groups, mode="on", max_elements=200)


def _initialize(net: Net, **zero: Any) -> Any:
    import deepspeed

    from aiprod_ds.engine.deepspeed_internals import leave_out_shared_memory_op, quiet_logs

    quiet_logs()
    leave_out_shared_memory_op()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            **zero,
        },
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _true_norm() -> float:
    net = _net()
    _loss(net).backward()
    first = net.blocks[0].up
    return float(torch.cat([first.weight.grad.flatten(), first.bias.grad]).norm())


def _gradient_norm(*, is_leaf: bool) -> float:
    """Returns the norm of the gradient that the optimizer has for the first flat parameter: of a linear
    layer."""
    from deepspeed.utils import set_z3_leaf_module

    from aiprod_ds.engine.deepspeed_internals import full_teardown

    net = _net()
    flat = _flat(net)
    for block in net.blocks:
        set_z3_leaf_module(block, is_leaf)
    engine = _initialize(net, reduce_bucket_size=10)  # what waits in a bucket may still be added to
    flat.attach(is_traced=False)
    engine.backward(_loss(engine))
    first = net.blocks[0].flat_parameter_0
    norm = float(engine.optimizer.get_fp32_grad_for_param(first).norm())
    full_teardown(engine)
    return norm


def _observe_engine() -> dict[str, Any]:
    from aiprod_ds.engine.deepspeed_internals import full_teardown

    net = _net()
    _flat(net)
    engine = _initialize(net)
    parts = [part for block in net.blocks for part in block.modules() if part is not block]
    partitions: list[Any] = list(net.parameters())
    found = {
        "hooks_of_parts": sum(len(part._forward_hooks) for part in parts),
        "storages_of_partitions": len({each.ds_tensor.untyped_storage().data_ptr() for each in partitions}),
        "replaced_dictionaries": [list(vars(block)["_original_parameters"]) for block in net.blocks],
    }
    full_teardown(engine)
    return found


def _is_linear_replaced(**zero: Any) -> bool:
    from aiprod_ds.engine.deepspeed_internals import full_teardown

    engine = _initialize(_net(), **zero)
    replaced = torch.nn.functional.linear is not torch._C._nn.linear
    full_teardown(engine)
    return replaced


def _functions_in_graph() -> dict[str, int]:
    """Returns how many autograd functions torch.compile finds in a linear layer, by whose linear it has."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    from aiprod_ds.engine.deepspeed_internals import _memory_efficient_linear

    found = {}
    own = torch.nn.functional.linear
    linears = {"deepspeed": zero3_linear_wrap, "ours": _memory_efficient_linear, "torch": own}
    for name, function in linears.items():
        torch._dynamo.reset()
        graphs: list[fx.GraphModule] = []

        def keep(graph: fx.GraphModule, _: Sequence[Tensor], into: Any = graphs) -> Any:
            into.append(graph)
            return graph.forward

        torch.nn.functional.linear = function
        try:
            torch.compile(nn.Linear(3, 2), backend=keep)(torch.ones(1, 3))
        finally:
            torch.nn.functional.linear = own
        nodes = [node for graph in graphs for node in graph.graph.nodes]
        found[name] = sum("autograd_function" in str(node.target) for node in nodes)
    return found


def test_the_throughput_timer_waits_for_the_device_by_default() -> None:
    """Remedy: `deepspeed_dictionary` turns it off."""
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    found = DeepSpeedThroughputTimerConfig()
    assert found.enabled
    assert found.synchronized
