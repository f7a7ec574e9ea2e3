"""The weights of each repeated block in a few flat parameters, which an engine then reduces, shards and
updates.

DeepSpeed 0.19.8 runs Python and about eleven kernels for every parameter in every update; LTX-Video 2B has
715 of them, and 43 if those of a block are one. Owns which parameters become flat, and the change of a module
to flat ones and back. A block computes with views of them (`flat_views`); where a member lies is
`flat_layout`. Parameters outside of blocks stay as they are: they are few, and models read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from aiprod_ds.engine.flat_layout import FlatLayout, in_runs, lay_out
from aiprod_ds.engine.flat_views import IN_FLAT_PARAMETER, BlockHooks, FlatSplit
from aiprod_ds.engine.layout import whole_shape
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.engine.recompute import repeated_blocks
from aiprod_ds.errors import EngineError

FlatMode = Literal["auto", "on", "off"]
# 2 GiB of masters: a gradient and its copy in DeepSpeed's bucket stay small beside the model.
MAX_ELEMENTS = 500_000_000

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
Partition = Callable[[Sequence[nn.Parameter], nn.Parameter], None]
_Key = tuple[int | None, torch.dtype, torch.device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How parameters are read and made where they may be partitioned.

    Attributes:
        gather: Gives a context in which parameters are whole.
        partition: Shares out new parameters as another one is; nothing if that one is not partitioned.
    """

    gather: Gather = lambda _: nullcontext()
    partition: Partition = lambda _, __: None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A parameter that becomes part of a flat one."""

    name: str
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter

    @property
    def numel(self) -> int:
        return whole_shape(self.parameter).numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A block, the parameters of it that become flat, and those that cannot, with the reason."""

    name: str
    block: nn.Module
    members: dict[_Key, list[_Member]]
    left_out: list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FlatBlock:
    """A block with flat parameters.

    Attributes:
        block: The module.
        layouts: Of its flat parameters.
        splits: The same, with the modules that the members belong to.
        orders: Names of the parameters of each of these modules, as they were registered.
    """

    block: nn.Module
    layouts: tuple[FlatLayout, ...]
    splits: tuple[FlatSplit, ...]
    orders: tuple[tuple[nn.Module, tuple[str, ...]], ...]


class FlatParameters:
    """The flat parameters of a module; the module has them from construction to `restore`.

    Args:
        module: Changed in place.
        groups: Of its trained parameters; no flat parameter has members of two groups.
        mode: `on` is an error where `auto` leaves something as it is; `off` leaves everything.
        includes_frozen: Whether frozen parameters become flat too.
        max_elements: Of a flat parameter, unless a single member has more.
        sharding: Of a module that is partitioned already.

    Attributes:
        layouts: By the names that flat parameters have in `module.named_parameters()`.
        notes: What stays as it is inside of blocks, and why.

    Raises:
        EngineError: If `on` and there are no blocks, or a parameter of theirs cannot be a view; nothing is
            changed.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        mode: FlatMode = "auto",
        includes_frozen: bool = False,
        max_elements: int = MAX_ELEMENTS,
        sharding: Sharding = Sharding(),
    ) -> None:
        self._sharding = sharding
        self._hooks: list[BlockHooks] = []
        found = () if mode == "off" else tuple(_candidates(module, groups, includes_frozen=includes_frozen))
        self.notes = ("off, as configured",) if mode == "off" else tuple(_notes(found))
        if mode == "on" and self.notes:
            raise EngineError(
                f"engine.flat_parameters: cannot be on, got {'; '.join(self.notes[:3])}. Set auto or off."
            )
        self._blocks = [self._flatten(candidate, max_elements) for candidate in found if candidate.members]
        self.layouts: Mapping[str, FlatLayout] = {
            layout.name: layout for block in self._blocks for layout in block.layouts
        }

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks that have flat parameters."""
        return [each.block for each in self._blocks]

    def groups(self, module: nn.Module, groups: Sequence[ParameterGroup]) -> list[list[nn.Parameter]]:
        """Returns the trained parameters as they are now, in groups as those of `__init__`, flat ones first.

        An engine that lays a group out in one buffer then has every flat parameter where it is aligned,
        whatever the sizes of the others.
        """
        homes = {member.name: name for name, layout in self.layouts.items() for member in layout.members}
        parameters = dict(module.named_parameters())
        found = []
        for group in groups:
            names = dict.fromkeys(homes.get(name, name) for name in group.names)
            found.append(
                [parameters[name] for name in sorted(names, key=lambda name: name not in self.layouts)]
            )
        return found

    def attach(self, *, is_traced: bool) -> None:
        """Lets blocks run: from now on their forward finds its weights.

        Args:
            is_traced: Whether torch.compile may trace how it finds them, where it compiles more than a
                forward.
        """
        self._hooks = [BlockHooks(each.block, each.splits, is_traced=is_traced) for each in self._blocks]

    def detach(self) -> None:
        """Takes back what `attach` did; blocks have no weights then."""
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = []

    def restore(self) -> None:
        """Gives the module its parameters back, with the flat ones' values and type, and in their order.

        Collective if they are partitioned.
        """
        self.detach()
        for each in self._blocks:
            for layout, split in zip(each.layouts, each.splits, strict=True):
                self._unflatten(each.block, layout, split)
            for owner, order in each.orders:
                _reorder(owner, order)
        self._blocks = []
        self.layouts = {}

    def _flatten(self, candidate: _Candidate, max_elements: int) -> _FlatBlock:
        layouts: list[FlatLayout] = []
        splits: list[FlatSplit] = []
        owners = dict.fromkeys(member.owner for members in candidate.members.values() for member in members)
        orders = tuple((owner, tuple(owner._parameters)) for owner in owners)
        runs = [
            [members[index] for index in run]
            for members in candidate.members.values()
            for run in in_runs([member.numel for member in members], limit=max_elements)
        ]
        for members in runs:
            attribute = f"flat_parameter_{len(layouts)}"
            layout = lay_out(
                f"{candidate.name}.{attribute}",
                [(member.name, whole_shape(member.parameter)) for member in members],
            )
            self._move(candidate.block, attribute, layout, members)
            layouts.append(layout)
            splits.append(FlatSplit.of(attribute, layout, [(each.owner, each.attribute) for each in members]))
        return _FlatBlock(block=candidate.block, layouts=tuple(layouts), splits=tuple(splits), orders=orders)

    @torch.no_grad()
    def _move(self, block: nn.Module, attribute: str, layout: FlatLayout, members: Sequence[_Member]) -> None:
        first = members[0].parameter
        with self._sharding.gather([member.parameter for member in members]):
            values = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
            for place, member in zip(layout.members, members, strict=True):
                values[place.start :][: place.numel].copy_(member.parameter.flatten())
        flat = nn.Parameter(values, requires_grad=first.requires_grad)
        for member in members:
            del member.owner._parameters[member.attribute]
            setattr(member.owner, member.attribute, IN_FLAT_PARAMETER)
        block.register_parameter(attribute, flat)
        self._sharding.partition([flat], first)

    @torch.no_grad()
    def _unflatten(self, block: nn.Module, layout: FlatLayout, split: FlatSplit) -> None:
        flat = block._parameters.pop(split.attribute)
        assert flat is not None, "it was registered when the block became flat"
        with self._sharding.gather([flat]):
            whole = flat.detach()  # keeps what was gathered
            restored = [
                nn.Parameter(
                    whole[member.start :][: member.numel].view(member.shape), requires_grad=flat.requires_grad
                )
                for member in layout.members
            ]
        for view, parameter in zip(split.views, restored, strict=True):
            del view.owner.__dict__[view.attribute]  # it would hide the parameter
            view.owner._parameters[view.attribute] = parameter
        self._sharding.partition(restored, flat)


def _candidates(
    module: nn.Module, groups: Sequence[ParameterGroup], *, includes_frozen: bool
) -> Iterator[_Candidate]:
    group_of = {name: index for index, group in enumerate(groups) for name in group.names}
    names = {id(part): name for name, part in module.named_modules()}
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for block in dict.fromkeys(repeated_blocks(module)):
        found = _Candidate(name=names[id(block)], block=block, members={}, left_out=[])
        for path, parameter in block.named_parameters():
            if not (parameter.requires_grad or includes_frozen):
                continue
            name = f"{found.name}.{path}"
            parent, _, attribute = path.rpartition(".")
            owner = block.get_submodule(parent)
            reason = _reason_against(owner, parameter, uses[id(parameter)])
            if reason is not None:
                found.left_out.append((name, reason))
                continue
            key = group_of.get(name), parameter.dtype, parameter.device
            member = _Member(name=name, owner=owner, attribute=attribute, parameter=parameter)
            found.members.setdefault(key, []).append(member)
        yield found


def _reason_against(owner: nn.Module, parameter: nn.Parameter, num_uses: int) -> str | None:
    """Returns why a parameter cannot be a view; None if it can."""
    if num_uses > 1:
        return "the model has it in several places"
    if isinstance(owner, nn.RNNBase):
        return f"{type(owner).__name__} keeps a list of its weights"
    if type(parameter) is not nn.Parameter:
        return f"it is of type {type(parameter).__name__}"
    if not (parameter.is_floating_point() and parameter.is_contiguous()):
        return "its elements are not contiguous floating-point numbers"
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "it has hooks"
    return None


def _notes(found: Sequence[_Candidate]) -> Iterator[str]:
    if not found:
        yield "the model has no repeated blocks"
    elif not any(candidate.members for candidate in found):
        yield "nothing in the model's repeated blocks can be flat"
    reasons: dict[str, list[str]] = {}
    for candidate in found:
        for name, reason in candidate.left_out:
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more stay as they are" if len(names) > 1 else " stays as it is"
        yield f"{names[0]}{more}: {reason}"


def _reorder(owner: nn.Module, order: Sequence[str]) -> None:
    """Lets the parameters of a module stand in `order` again; dictionaries keep the order of insertion."""
    parameters = dict(owner._parameters.items())
    owner._parameters.clear()
    for name in sorted(parameters, key=lambda name: order.index(name) if name in order else len(order)):
        owner._parameters[name] = parameters[name]
