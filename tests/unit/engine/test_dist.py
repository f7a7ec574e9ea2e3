"""The process-group helpers on one process, with and without a group; two ranks are in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as torch_dist

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError


@pytest.fixture(params=[False, True], ids=["no group", "group of one"])
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _clear(monkeypatch)
    if request.param:
        assert dist.initialize() == torch.device("cpu")
        assert dist.initialize() == torch.device("cpu"), "a second call changes nothing"
    yield
    dist.shutdown()
    assert not torch_dist.is_initialized()


def _clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("group")
def test_one_process_is_its_own_world() -> None:
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.barrier()
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(dist.reduce_mean(value), value)
    assert dist.reduce_mean(value) is not value
    assert dist.broadcast_object({"a": 1}) == {"a": 1}
    assert dist.gather_objects("x") == ["x"]
    assert dist.all_agree(True)
    assert not dist.all_agree(False)


def test_a_launcher_that_leaves_out_a_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _clear(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="got no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        dist.initialize()


def test_the_group_is_left_only_after_success(monkeypatch: pytest.MonkeyPatch) -> None:
    _clear(monkeypatch)
    with pytest.raises(ValueError, match="body"), dist.process_group():
        raise ValueError("body")
    assert torch_dist.is_initialized(), "no collective after an error"
    dist.shutdown()
