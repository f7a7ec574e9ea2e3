"""What DeepSpeed 0.19.8 does that this project works around. A failure here means that an upgrade changed it:
see the remedy.

All cases run in one call on two CPU ranks; the tests read its report. Each docstring names the remedy. The
last test starts the launcher itself.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aiprod_ds.engine import dist
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.processes import free_port, kill_session

pytestmark = [pytest.mark.upstream, pytest.mark.dist]


@pytest.fixture(scope="session")
def report() -> dict[str, Any]:
    first, second = run_on_ranks(observe_everything, ranks=2, timeout_seconds=600)
    return {**first, "of_rank_1": second}


def test_zero_0_with_fp16_never_multiplies_the_loss(report: dict[str, Any]) -> None:
    """Remedy: `config.deepspeed` refuses fp16 at stage 0."""
    assert report["fp16_update_stage_1_over_stage_0"] == pytest.approx(256, rel=0.1), (
        "the scale; weights are fp16"
    )


def test_torch_autocast_fp16_reports_the_scaled_norm(report: dict[str, Any]) -> None:
    """Remedy: `config.deepspeed` refuses torch_autocast."""
    assert report["autocast_norm_over_true_norm"] > 100


def test_torch_autocast_leaves_a_flag_behind(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown` resets it."""
    assert report["autocast_flag_after_destroy"]


def test_destroy_leaves_root_hooks_that_keep_the_engine_alive(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown`."""
    assert report["engine_alive_after_destroy"]


def test_zero_3_keeps_the_whole_module_alive(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown`."""
    assert report["module_alive_after_destroy"]


def test_a_second_zero_3_engine_keeps_the_backward_functions_of_the_first(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown`."""
    assert report["backward_functions_kept"]


def test_zero_3_leaves_its_linear_behind(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown`."""
    assert report["linear_replaced_after_destroy"]


@pytest.mark.parametrize("stage", range(4))
def test_a_parameter_unfrozen_after_initialize_never_trains(report: dict[str, Any], stage: int) -> None:
    """Remedy: the trainable set changes only by a new engine."""
    assert report["unfrozen_movement"][stage] == 0.0


def test_latest_is_written_before_other_ranks_have_finished(report: dict[str, Any]) -> None:
    """Remedy: its checkpoints are not used."""
    assert report["latest_before_rank_1"]


def test_the_shared_memory_op_is_built_unless_it_is_called_incompatible(report: dict[str, Any]) -> None:
    """Remedy: `leave_out_shared_memory_op`."""
    assert report["shared_memory_op"] == {"first": True, "left_out": True}


def test_shared_memory_is_never_given_back() -> None:
    """Remedy: `leave_out_shared_memory_op`."""
    import deepspeed

    source = (
        Path(deepspeed.__file__)
        .parent.joinpath("ops", "csrc", "cpu", "comm", "shm.cpp")
        .read_text(encoding="utf-8")
    )
    assert source.count("shared_close(") == 1, "its definition, and no call"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_places_in_flat_partitions_are_where_masters_are(report: dict[str, Any], stage: int) -> None:
    """Relied on by `deepspeed_state.trained_shards`: both ranks' parts, put together by these places, are the
    parameter."""
    assert report["places_lead_to_masters"][stage - 1] == [True] * 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_there_is_no_optimizer_state_before_the_first_update(report: dict[str, Any], stage: int) -> None:
    """Relied on by `EngineShards`: a checkpoint from before it has no moments."""
    assert report["states_before_the_first_update"][stage - 1] == 0


def test_optimizer_state_of_later_groups_is_not_linked(report: dict[str, Any]) -> None:
    """Remedy: never used; reading goes by shards (`EngineParameters`)."""
    assert report["linked_groups"] == [True, False]


def test_setting_an_uneven_parameter_under_zero_3_fails_on_the_last_rank_only(report: dict[str, Any]) -> None:
    """Remedy: never used; writing goes by shards."""
    assert (report["set_uneven"], report["of_rank_1"]["set_uneven"]) == ("set", "RuntimeError")


def test_setting_a_master_leaves_the_16_bit_weight(report: dict[str, Any]) -> None:
    """Remedy: whoever writes masters refreshes the 16-bit weights."""
    assert report["set_master_changes_weight"] is False


def test_growing_the_loss_scale_halves_that_update(report: dict[str, Any]) -> None:
    """Remedy: `scale_growth_after_update`."""
    assert report["update_at_growth_over_update_before"] == pytest.approx(0.5, rel=0.05)


def test_overflow_at_the_minimum_scale_raises_a_bare_exception(report: dict[str, Any]) -> None:
    """Remedy: `count_overflows_at_minimum`."""
    assert report["minimum_scale"] == "Exception"


def test_zero_0_with_bf16_counts_a_step_at_construction(report: dict[str, Any]) -> None:
    """Remedy: `prepare`."""
    assert report["adam_step_before_the_first_update"] == 1


def test_round_robin_gradients_map_parameters_to_other_masters(report: dict[str, Any]) -> None:
    """Remedy: `config.deepspeed` refuses it."""
    assert report["round_robin_masters_right"] is False


def test_an_overflow_with_an_offloaded_optimizer_is_never_over(report: dict[str, Any]) -> None:
    """Remedy: `clean_up_after_update`."""
    assert report["applied_around_overflow"] == [True, False, False, False]


def test_an_offloaded_adam_does_not_resume_bitwise(report: dict[str, Any]) -> None:
    """Remedy: `restart_bias_correction`."""
    assert 6 in report["updates_after_which_a_resumed_adam_differs"]


def test_checkpointing_grows_a_global_list_under_zero_3(report: dict[str, Any]) -> None:
    """Remedy: `clean_up_after_update`."""
    assert report["forward_stack"][1] > report["forward_stack"][0]


def test_a_forward_alone_leaves_zero_3_with_all_weights_gathered(report: dict[str, Any]) -> None:
    """Remedy: `full_teardown` forgets them."""
    assert report["gathered_after"] == {"update": 0, "forward": 6}


def test_a_second_zero_3_engine_on_a_module_uses_torchs_linear(report: dict[str, Any]) -> None:
    """Remedy: `prepare` puts DeepSpeed's in place."""
    assert report["linear_replaced"] == [True, False]


def test_a_second_zero_3_engine_does_not_cast_what_was_added_to_the_module(report: dict[str, Any]) -> None:
    """Remedy: `cast_added_parameters`."""
    assert report["rebuilt_with_added_fp32"] == "AssertionError"


def test_weights_that_zero_3_keeps_gathered_do_not_follow_their_masters(report: dict[str, Any]) -> None:
    """Remedy: `refresh_weights` gathers them anew."""
    assert report["gathered_weight_follows"] is False


def test_zero_0_in_fp32_clips_as_the_configuration_says_at_each_step(report: dict[str, Any]) -> None:
    """Remedy: `set_clip_norm` writes there; the optimizers of all other stages and precisions have a
    `clip_grad`."""
    assert report["has_clip_grad"] == {"0 fp32": False, "0 bf16": True, "1 fp32": True, "3 fp32": True}
    assert report["clipped_norm"] == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_copied_and_converted_for_the_step(report: dict[str, Any], stage: int) -> None:
    """Remedies: `keep_gradients_in_place` and `step_by`."""
    assert report[f"copied_gradients_{stage}"] == {"in_place": 0, "step_dtypes": ["torch.float32"]}


def test_the_launcher_reports_success_and_leaves_ranks_behind_when_it_is_killed(tmp_path: Path) -> None:
    """Remedy: `testing.dist` asks for a result of every rank and kills the session; training writes its own
    marker."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(f'{os.getpid()} {os.getppid()}')\n"
        "time.sleep(120)\n"
    )
    places = tmp_path / "pids"
    places.mkdir()
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,
        "--num_accelerators",
        "2",
    ]
    command += ["--master_port", str(free_port()), "--no_local_rank", str(script), str(places)]
    runner = subprocess.Popen(
        command,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        pids = _wait_for(
            lambda: [path.read_text().split() for path in places.iterdir() if path.read_text()], count=2
        )
        os.kill(int(pids[0][1]), signal.SIGKILL)
        assert runner.wait(30) == 0
        assert all(_is_alive(int(pid)) for pid, _ in pids)
    finally:
        kill_session(runner.pid)
        runner.wait()
    _wait_for(lambda: [pid for pid, _ in pids if not _is_alive(int(pid))], count=2)


def _wait_for(look: Callable[[], list[Any]], *, count: int) -> list[Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(found := look()) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not {count} in time: {look()}")


def _is_alive(pid: int) -> bool:
    """A killed process whose parent has not asked for it is a zombie, not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Below runs on the ranks, on DeepSpeed as it is: no engine of ours.


class Net(nn.Module):
    """33 is odd, so two ranks share it unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 33)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.second = nn.Linear(33, 8)
        self.recompute = False
        self.shift: Tensor
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.second(torch.tanh(self.frozen(hidden))) + self.shift.to(x.dtype)


def test_pdsh_gets_arguments_unquoted_or_in_double_quotes_only() -> None:
    """Remedy: `cluster.command.quote_for_pdsh`."""
    assert _pdsh_arguments(["a;b", "$(x) y", 'say "hi" now', "a\\b c"]) == [
        "a;b",
        '"$(x) y"',
        '"say \\"hi\\" now"',
        '"a\\b c"',
    ]


def test_pdsh_exports_values_in_double_quotes_and_drops_core_binding() -> None:
    """Remedy: `cluster.environment` refuses what is alive there; `launch --bind-cores` is refused with
    pdsh."""
    runner = _pdsh_runner([])
    runner.add_export("A", "two words; $(x)")
    command, stop, _ = runner.get_cmd({}, {"a": [0], "b": [0]})
    assert 'export A="two words; $(x)"; ' in " ".join(command)
    assert not any("bind" in part for part in command)
    assert "pkill -f " in stop, "every deepspeed run of the user, not only this one"


def _pdsh_arguments(arguments: list[str]) -> list[str]:
    parsed: list[str] = _pdsh_runner(arguments).user_arguments
    return parsed


def _pdsh_runner(arguments: list[str]) -> Any:
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    return PDSHRunner(parse_args(["--bind_cores_to_rank", "--module", "aiprod_ds", *arguments]), "e30=")


def observe_everything() -> dict[str, Any]:
    import deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    observed: dict[str, Any] = (
        _observe_shared_memory_op()
    )  # first: no engine may have made DeepSpeed's communication yet
    for observe in (
        _observe_fp16, _observe_lifetime, _observe_zero_3_lifetime, _observe_unfreezing, _observe_latest, _observe_places,  # noqa: E501
        _observe_access, _observe_scaler, _observe_new_ones, _observe_masters, _observe_rebuilding,
        _observe_clipping, _observe_copies,
        _observe_offloaded_adam, _observe_autocast,
    ):  # fmt: skip
        observed |= observe()
        gc.collect()
    return observed


def _observe_copies() -> dict[str, Any]:
    return {f"copied_gradients_{stage}": _copied_gradients(stage) for stage in (1, 2)}


def _copied_gradients(stage: int) -> dict[str, Any]:
    net, given = Net().to(torch.bfloat16), set[int]()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda own: given.add(own.grad.data_ptr()))
    engine = _engine(stage, module=net, bf16={"enabled": True})
    step, dtypes = engine.basic_optimizer.step, list[str]()

    def watched(*_: Any) -> Any:
        dtypes.extend(
            str(master.grad.dtype)
            for group in engine.basic_optimizer.param_groups
            for master in group["params"]
        )
        return step()

    engine.basic_optimizer.step = watched
    loss = engine(torch.randn(2, 8).to(torch.bfloat16)).float().pow(2).mean()
    engine.backward(loss)
    taken = [each for group in engine.optimizer.averaged_gradients.values() for each in group]
    engine.step()
    engine.destroy()
    return {"in_place": sum(each.data_ptr() in given for each in taken), "step_dtypes": sorted(set(dtypes))}


def _engine(
    stage: int,
    *,
    module: nn.Module | None = None,
    sgd: bool = False,
    zero: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    import deepspeed

    net = Net() if module is None else module
    matrices = [
        parameter for parameter in net.parameters() if parameter.requires_grad and len(_shape(parameter)) > 1
    ]
    vectors = [
        parameter for parameter in net.parameters() if parameter.requires_grad and len(_shape(parameter)) == 1
    ]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    persistence = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    if sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [parameter for group in groups for parameter in group["params"]], lr=1e-2
        )
    elif zero and "offload_optimizer" in zero:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **persistence, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
        "steps_per_print": 10**9,
        **config,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _update(engine: Any, factor: float = 1.0, dtype: torch.dtype | None = None) -> Any:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(dist.rank()))
    kinds = (
        {True: torch.float16}
        if engine.fp16_enabled()
        else {True: torch.bfloat16}
        if engine.bfloat16_enabled()
        else {}
    )
    loss = engine(x.to(dtype or kinds.get(True, torch.float32))).float().pow(2).mean() * factor
    engine.backward(loss)
    engine.step()
    return engine


def _close(engine: Any) -> None:
    from aiprod_ds.engine.deepspeed_internals import full_teardown

    full_teardown(engine)


def _outcome(call: Callable[[], Any], done: str) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001  # whatever upstream raises is what is recorded
        return type(error).__name__
    return done


def _shared_folder() -> Path:
    return Path(dist.broadcast_object(tempfile.mkdtemp()))


def _remove(folder: Path) -> None:
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(folder)


def _observe_shared_memory_op() -> dict[str, Any]:
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from aiprod_ds.engine.deepspeed_internals import leave_out_shared_memory_op

    first = bool(deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME])
    leave_out_shared_memory_op()
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    left_out = deepspeed.comm.comm.cdb.shm_comm_op is None
    return {"shared_memory_op": {"first": first, "left_out": left_out}}


def _observe_fp16() -> dict[str, Any]:
    movement = []
    for stage in (0, 1):
        engine = _engine(stage, sgd=True, fp16={"enabled": True, "loss_scale": 256})
        for group in engine.optimizer.param_groups:
            group["lr"] = 1.0
        before = engine.module.first.weight.detach().float().clone()
        _update(engine)
        movement.append((engine.module.first.weight.detach().float() - before).norm().item())
        _close(engine)
    return {"fp16_update_stage_1_over_stage_0": movement[1] / max(movement[0], 1e-12)}


def _observe_autocast() -> dict[str, Any]:
    from deepspeed.runtime import torch_autocast

    norms = []
    for config in ({}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}):
        engine = _engine(1, **config)
        norms.append(float(_update(engine, dtype=torch.float32).get_global_grad_norm()))
        engine.destroy()
    flag = torch_autocast.TORCH_AUTOCAST_INITIALIZED
    _close(engine)
    return {"autocast_norm_over_true_norm": norms[1] / norms[0], "autocast_flag_after_destroy": flag}


def _observe_lifetime() -> dict[str, Any]:
    module = Net()
    engine = _update(_engine(1, module=module))
    reference = weakref.ref(engine)
    engine.destroy()
    del engine
    gc.collect()
    return {"engine_alive_after_destroy": reference() is not None and module is not None}


def _observe_zero_3_lifetime() -> dict[str, Any]:
    module = Net()
    first = _update(_engine(3, module=module))
    kept = module.first.pre_bwd_fn
    first.destroy()
    replaced = torch.nn.functional.linear is not torch._C._nn.linear
    second = _update(_engine(3, module=module))
    same = module.first.pre_bwd_fn is kept
    _close(first)
    _close(second)

    engine = _update(_engine(3))
    reference = weakref.ref(engine.module)
    engine.destroy()
    del engine
    gc.collect()
    alive = reference()
    return {
        "backward_functions_kept": same,
        "linear_replaced_after_destroy": replaced,
        "module_alive_after_destroy": alive is not None,
    }


def _observe_unfreezing() -> dict[str, Any]:
    import deepspeed

    movement = []
    for stage in range(4):
        engine = _update(_engine(stage))
        weight = engine.module.frozen.weight
        with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
            before = weight.detach().clone()
        weight.requires_grad_(True)
        _update(_update(engine))
        with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
            movement.append((weight.detach() - before).abs().max().item())
        weight.requires_grad_(False)
        del weight
        _close(engine)
    return {"unfrozen_movement": movement}


def _observe_latest() -> dict[str, Any]:
    import deepspeed

    engine, folder, seen = _update(_engine(1)), _shared_folder(), []
    save, barrier = engine.checkpoint_engine.save, deepspeed.comm.barrier

    def slow_save(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.0)
        return save(*args, **kwargs)

    def watching_barrier(*args: Any, **kwargs: Any) -> Any:
        ours = folder / "tag" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        theirs = folder / "tag" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        seen.append((folder / "latest").exists() and ours.exists() and not theirs.exists())
        return barrier(*args, **kwargs)

    if dist.rank() == 1:
        engine.checkpoint_engine.save = slow_save
    deepspeed.comm.barrier = watching_barrier
    engine.save_checkpoint(str(folder), tag="tag")
    deepspeed.comm.barrier = barrier
    _close(engine)
    _remove(folder)
    return {"latest_before_rank_1": seen[-1]}


def _observe_places() -> dict[str, Any]:
    right, states = [], []
    for stage in (1, 2, 3):
        engine = _engine(stage)
        states.append(len(engine.basic_optimizer.state))
        trained = [
            (name, parameter)
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        ]
        parts = dist.gather_objects(
            [_part_of_master(engine.optimizer, parameter) for _, parameter in trained]
        )
        wanted = Net()
        right.append(
            [
                torch.cat([part for _, part in sorted(own, key=lambda pair: pair[0])])[
                    : parameter.numel()
                ].equal(parameter.flatten())
                for own, parameter in zip(
                    zip(*parts, strict=True), map(wanted.get_parameter, dict(trained)), strict=True
                )
            ]
        )
        _close(engine)
    return {"places_lead_to_masters": right, "states_before_the_first_update": states}


def _part_of_master(optimizer: Any, parameter: Any) -> tuple[int, Tensor]:
    """Returns what this rank's flat partition has of a parameter, and its first element."""
    if hasattr(parameter, "ds_id"):
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return parameter.ds_zero_partition_rank * length, flat.detach().narrow(0, offset, length).clone()
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    group = next(
        i
        for i, members in enumerate(optimizer.bit16_groups)
        if any(parameter is member for member in members)
    )
    place = mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[group]
    return mapping.lp_fragment_address.start, flat.detach().narrow(0, place.start, place.numel).clone()


def _observe_access() -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param

    engine = _update(_engine(1))
    net = engine.module
    linked = [
        _outcome(lambda p=p: safe_get_full_optimizer_state(p, "exp_avg"), "read") == "read"
        for p in (net.first.weight, net.first.bias)
    ]
    # A failure on one rank alone would leave the other in a collective, so the ranks agree before the next
    # case.
    linked = [all(answers) for answers in zip(*dist.gather_objects(linked), strict=True)]
    _close(engine)
    engine = _update(_engine(3))
    uneven = _outcome(lambda: safe_set_full_fp32_param(engine.module.first.bias, torch.zeros(33)), "set")
    dist.barrier()
    _close(engine)
    engine = _engine(1, bf16={"enabled": True})
    weight = engine.module.first.weight
    before = weight.detach().clone()
    safe_set_full_fp32_param(weight, torch.full((33, 8), 3.0))
    changed = not torch.equal(weight, before)
    _close(engine)
    return {"linked_groups": linked, "set_uneven": uneven, "set_master_changes_weight": changed}


def _observe_scaler() -> dict[str, Any]:
    dynamic = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1, "hysteresis": 1}
    engine = _engine(1, sgd=True, fp16=dynamic)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-4  # so small that both updates see the same gradient
    moved = []
    for _ in range(2):
        before = engine.optimizer.single_partition_of_fp32_groups[0].detach().clone()
        _update(engine)
        moved.append((engine.optimizer.single_partition_of_fp32_groups[0].detach() - before).norm().item())
    _close(engine)
    engine = _engine(1, sgd=True, fp16=dynamic | {"initial_scale_power": 0})
    minimum = _outcome(lambda: _update(engine, factor=float("nan")), "skipped")
    _close(engine)
    return {"update_at_growth_over_update_before": moved[1] / moved[0], "minimum_scale": minimum}


def _observe_new_ones() -> dict[str, Any]:
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import safe_get_full_fp32_param

    engine = _engine(0, bf16={"enabled": True})
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    _close(engine)
    four = nn.Sequential(
        *(nn.Linear(4, 4) for _ in range(4))
    )  # two tensors on two ranks would keep their order
    engine = _engine(2, module=four, zero={"round_robin_gradients": True})
    right = all(
        torch.equal(safe_get_full_fp32_param(p), p) for p in engine.module.parameters() if p.requires_grad
    )
    _close(engine)
    offload = {"offload_optimizer": {"device": "cpu"}}
    engine = _engine(2, zero=offload, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    applied = [_update(engine, factor=factor).was_step_applied() for factor in (1.0, float("nan"), 1.0, 1.0)]
    _close(engine)
    engine = _engine(3)
    engine.module.recompute = True
    _update(engine)
    start = len(parameter_offload.FWD_MODULE_STACK)
    for _ in range(3):
        _update(engine)
    end = len(parameter_offload.FWD_MODULE_STACK)
    _close(engine)
    return {
        "adam_step_before_the_first_update": max(steps),
        "round_robin_masters_right": right,
        "applied_around_overflow": applied,
        "forward_stack": [start, end],
    }


def _observe_masters() -> dict[str, Any]:
    engine = _update(_engine(3, zero={"stage3_param_persistence_threshold": 40}))
    with torch.no_grad():
        for sub_group, master in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            master.fill_(3.0)
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    bias = engine.module.first.bias
    assert bias.numel() == 33, "gathered, for it is below the threshold"
    follows = bool((bias == 3.0).all())
    _close(engine)
    return {"gathered_weight_follows": follows}


def _observe_rebuilding() -> dict[str, Any]:
    module, replaced = Net(), []
    engine = _engine(3, module=module, bf16={"enabled": True})
    replaced.append(torch.nn.functional.linear is not torch._C._nn.linear)
    gathered = {"update": _count_gathered(_update(engine).module)}
    with torch.no_grad():
        engine(torch.ones(2, 8, dtype=torch.bfloat16))
    gathered["forward"] = _count_gathered(module)
    assert not module.ds_inflight_param_registry, (
        "a registry of gatherings under way, on the module: empty on a CPU"
    )
    _close(engine)
    engine = _engine(3, module=module, bf16={"enabled": True})
    replaced.append(torch.nn.functional.linear is not torch._C._nn.linear)
    _close(engine)
    module.added = nn.Linear(8, 8)
    built = _outcome(lambda: _engine(3, module=module, bf16={"enabled": True}), "built")
    return {"gathered_after": gathered, "linear_replaced": replaced, "rebuilt_with_added_fp32": built}


def _count_gathered(module: nn.Module) -> int:
    return sum(parameter.ds_status.name == "AVAILABLE" for parameter in module.parameters())


def _observe_clipping() -> dict[str, Any]:
    present = {}
    for stage, config in ((0, {}), (0, {"bf16": {"enabled": True}}), (1, {}), (3, {})):
        engine = _engine(stage, **config)
        present[f"{stage} {'bf16' if config else 'fp32'}"] = hasattr(engine.optimizer, "clip_grad")
        _close(engine)
    engine = _engine(0, sgd=True)  # its learning rate is 1e-2
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    engine._config.gradient_clipping = 0.01
    _update(engine)
    moved = torch.cat(
        [(parameter.detach() - old).flatten() for parameter, old in zip(trained, before, strict=True)]
    )
    _close(engine)
    return {"has_clip_grad": present, "clipped_norm": moved.norm().item() / 1e-2}


def _observe_offloaded_adam() -> dict[str, Any]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def build() -> tuple[nn.Parameter, Any]:
        weight = nn.Parameter(torch.ones(1000))
        return weight, DeepSpeedCPUAdam([weight], lr=1e-2, betas=(0.9, 0.95))

    def update(weight: nn.Parameter, optimizer: Any, number: int) -> None:
        weight.grad = torch.randn(1000, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    different = []
    weight, optimizer = build()
    for number in range(10):
        again, resumed = build()
        again.data.copy_(weight.data)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        update(again, resumed, number)
        update(weight, optimizer, number)
        if not torch.equal(weight, again):
            different.append(number)
    return {"updates_after_which_a_resumed_adam_differs": different}
