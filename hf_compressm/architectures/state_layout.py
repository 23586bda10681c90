"""
Where the state of a layer lies, as data.

An axis of a parameter is a row of entries: numbers of entries that have nothing to do with the state, and runs of N
entries that belong to the N states of one group of heads. From this follow the shapes at another size, the size that a
saved tensor has, the entries that a cut keeps, and the attributes that hold the same size.

Example:

```python
>>> from hf_compressm.architectures.state_layout import StateAxis, States, per_head, runs

>>> # the rows of Mamba-2's in_proj: gate and input, B and C of two groups, time steps of four heads
>>> axis = StateAxis("in_proj.weight", 0, (32, *runs("B", 2), *runs("C", 2), 4), others=(16,))
>>> axis.shape(8), axis.shape(3)
((68, 16), (48, 16))

>>> # rows of Qwen3-Next's in_proj_qkvz: q, k, v and z of a key head side by side
>>> per_head(2, "q", "k", 6)
(States(role='q', group=0), States(role='k', group=0), 6, States(role='q', group=1), States(role='k', group=1), 6)

```

Source of the idea: `Group` of Torch-Pruning, Fang et al., 2023, "DepGraph" (arXiv 2301.12900).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DimensionError
from .changes import AttributeChange, ParameterChange
from .moment_maps.axis import AxisMap, AxisSelection, rows_of_identity
from .parameters import successor


class States(NamedTuple):
    """
    A run of N entries, one for each state.

    Args:
        role (`str`, *optional*, defaults to `""`): What the entries are, such as `"B"`; maps may differ by it.
        group (`int`, *optional*, defaults to 0): Which group of heads the states belong to; each keeps its own.
    """

    role: str = ""
    group: int = 0


Entries = tuple["int | States", ...]
"""What lies along an axis, in order: numbers of entries that no cut changes, and runs of states."""


def runs(role: str = "", groups: int = 1) -> Entries:
    """One run of states for each of some groups, one after the other."""
    return tuple(States(role, group) for group in range(groups))


def per_head(heads: int, *parts: int | str) -> Entries:
    """
    Rows interleaved per head: all parts of the first head, then all parts of the second, and so on.

    Args:
        heads (`int`): The number of heads; each is a group.
        parts (`int` or `str`): What one head has: a number of entries that stay, or the role of a run of its states.
    """
    return tuple(part if isinstance(part, int) else States(part, head) for head in range(heads) for part in parts)


def _length(entries: Entries, size: int) -> int:
    return sum(size if isinstance(entry, States) else entry for entry in entries)


def _size(entries: Entries, length: int) -> int | None:
    """The state size at which the entries have a length, or None where there is none."""
    size, rest = divmod(length - _length(entries, 0), _length(entries, 1) - _length(entries, 0))
    return size if rest == 0 and size > 0 else None


@dataclass(frozen=True)
class StateAxis:
    """
    The axis of a parameter along which its state lies.

    Args:
        parameter (`str`): The parameter's name inside the layer's module, such as `"in_proj.weight"`.
        axis (`int`): Which axis it is, from 0.
        entries (`Entries`): What lies along it, in order.
        others (`tuple[int, ...]`, *optional*, defaults to `()`): The lengths of the other axes, in order.
        batched (`bool`, *optional*, defaults to `False`): Whether the entries along axis 0 have states of their own, as
            the channels of S4D have. Then every run belongs to all groups, one group an entry.
    """

    parameter: str
    axis: int
    entries: Entries
    others: tuple[int, ...] = ()
    batched: bool = False

    def __post_init__(self) -> None:
        if not any(isinstance(entry, States) for entry in self.entries):
            raise DimensionError(f"the axis of {self.parameter} has no run of states: its entries are {self.entries}.")
        if not 0 <= self.axis <= len(self.others) or (self.batched and self.axis == 0):
            raise DimensionError(
                f"axis {self.axis} of {self.parameter} must be from {int(self.batched)} to {len(self.others)}, the "
                "number of its other axes."
            )

    @property
    def roles(self) -> list[str]:
        """The roles of its runs of states, in order."""
        return list(dict.fromkeys(entry.role for entry in self.entries if isinstance(entry, States)))

    def length(self, size: int) -> int:
        """How many entries the axis has at a state size."""
        return _length(self.entries, size)

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of the parameter at a state size."""
        return (*self.others[: self.axis], self.length(size), *self.others[self.axis :])

    def size_of(self, shape: Sequence[int]) -> int | None:
        """The state size that a shape of the parameter implies, or None where no size has it."""
        return _size(self.entries, shape[self.axis]) if len(shape) == len(self.others) + 1 else None

    def kept(self, states: Tensor | Mapping[str, Tensor], size: int) -> Tensor:
        """
        The entries that stay when some states are kept.

        Args:
            states (`torch.Tensor` of shape `(r,)` or `(groups, r)`, int64): The kept states, one row for all groups or
                one for each; or, where runs of different roles keep different ones, such tensors by role.
            size (`int`): The present state size N.

        Returns:
            `torch.Tensor`: `(length,)` int64, or `(groups, length)` for a batched axis.
        """
        parts, start = [], 0
        by_role = states if isinstance(states, Mapping) else dict.fromkeys(self.roles, states)
        like = by_role[self.roles[0]]
        for entry in self.entries:
            if isinstance(entry, States):
                of_role = by_role[entry.role]
                parts.append(start + (of_role if of_role.ndim == 1 or self.batched else of_role[entry.group]))
                start += size
            else:
                stays = torch.arange(start, start + entry, device=like.device)
                parts.append(stays.expand(*like.shape[:-1], -1) if self.batched else stays)
                start += entry
        return torch.cat(parts, dim=-1)

    def matrix(self, by_role: Mapping[str, Tensor]) -> Tensor:
        r"""
        A map of the whole axis: the identity where entries stay, and a matrix for each run of states.

        Args:
            by_role (`Mapping[str, torch.Tensor]`): For each role, `(r, N)` for all groups or `(groups, r, N)`; float64.

        Returns:
            `torch.Tensor`: `(new length, old length)` float64, or `(groups, new length, old length)` for a batched axis
            with a matrix for each group.
        """
        like = next(iter(by_role.values()))
        if self.batched and like.ndim == 3:
            single = StateAxis(self.parameter, 0, self.entries)
            each = zip(*by_role.values())
            return torch.stack([single.matrix(dict(zip(by_role, matrices))) for matrices in each])
        blocks = []
        for entry in self.entries:
            if isinstance(entry, States):
                block = by_role[entry.role]
                blocks.append(block if block.ndim == 2 else block[entry.group])
            else:
                blocks.append(torch.eye(entry, dtype=like.dtype, device=like.device))
        return torch.block_diag(*blocks)

    def take(self, tensor: Tensor, entries: Tensor) -> Tensor:
        """
        Some entries of the parameter, or of a tensor of its shape.

        Args:
            tensor (`torch.Tensor`): The tensor.
            entries (`torch.Tensor`): What [`~StateAxis.kept`] gave.
        """
        if entries.ndim == 1:
            return tensor.index_select(self.axis, entries)
        shape = [1] * tensor.ndim
        shape[0], shape[self.axis] = entries.shape
        return tensor.take_along_dim(entries.reshape(shape), dim=self.axis)

    def selection(self, states: Tensor | Mapping[str, Tensor], size: int) -> AxisMap | AxisSelection:
        """How a gradient moves when the parameter keeps the entries of some states, as [`~StateAxis.kept`] has them."""
        entries, length = self.kept(states, size), self.length(size)
        if entries.ndim == 1:
            return AxisSelection(self.axis, entries, length)
        return AxisMap(self.axis, rows_of_identity(entries, length), entries)


@dataclass(frozen=True)
class SizeAttribute:
    """
    An attribute of a module that follows the state size.

    A number is how many entries there are. A tensor has one value for all entries of a run along its last axis, such
    as the multipliers of a projection.

    Args:
        owner (`str`): The name, inside the layer's module, of the module that has it; `""` is the layer's own.
        name (`str`): The attribute's name.
        entries (`Entries`): What it counts, or what lies along its last axis.
    """

    owner: str
    name: str
    entries: Entries

    def change(self, module: nn.Module, size: int) -> AttributeChange:
        """The attribute's value at a state size, for the module of a layer."""
        owner = module.get_submodule(self.owner)
        present = getattr(owner, self.name)
        if not isinstance(present, Tensor):
            return AttributeChange(owner, self.name, _length(self.entries, size))
        found = _size(self.entries, present.shape[-1])
        if found is None:
            raise DimensionError(
                f"{self.owner}.{self.name} has {present.shape[-1]} entries, which is no whole number of states in "
                f"{self.entries}."
            )
        lengths = [found if isinstance(entry, States) else entry for entry in self.entries]
        parts = [
            part[..., :1].expand(*part.shape[:-1], size) if isinstance(entry, States) else part
            for entry, part in zip(self.entries, present.split(lengths, dim=-1))
        ]
        return AttributeChange(owner, self.name, torch.cat(parts, dim=-1))


@dataclass(frozen=True)
class StateLayout:
    """
    Where the state of one layer lies: the axes of its parameters, and the attributes that follow.

    Args:
        axes (`tuple[StateAxis, ...]`): One for each parameter whose shape depends on the state size. A saved size is
            read from the first of them that is there.
        attributes (`tuple[SizeAttribute, ...]`, *optional*, defaults to `()`): What else in the modules holds the size.
    """

    axes: tuple[StateAxis, ...]
    attributes: tuple[SizeAttribute, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, StateAxis]:
        """The axes by parameter name."""
        return {axis.parameter: axis for axis in self.axes}

    def parameters(self, module: nn.Module) -> dict[str, Any]:
        """What a layer's module has under the names of the parameters; None where there is nothing."""
        return {name: attribute_at(module, name) for name in self.by_name}

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters at a state size."""
        return {axis.parameter: axis.shape(size) for axis in self.axes}

    def size_in(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> int | None:
        """
        The state size of a state dict, or None where it does not.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): All or a part (a shard) of a model's tensors.
            prefix (`str`, *optional*): The layer's name in it, with a dot at the end.
        """
        there = (axis for axis in self.axes if prefix + axis.parameter in state_dict)
        return next((axis.size_of(state_dict[prefix + axis.parameter].shape) for axis in there), None)

    def size_changes(self, module: nn.Module, size: int) -> list[AttributeChange]:
        """The values of the attributes at a state size."""
        return [attribute.change(module, size) for attribute in self.attributes]

    def selected(self, module: nn.Module, states: Tensor | Mapping[str, Tensor], size: int) -> list[ParameterChange]:
        """
        The changes of all parameters when a layer keeps some states as they are.

        Args:
            module (`torch.nn.Module`): The layer's module.
            states (`torch.Tensor` of shape `(r,)` or `(groups, r)`, int64): The kept states; by role where runs of
                different roles keep different ones.
            size (`int`): The present state size N.
        """
        return [
            ParameterChange(old, successor(old, axis.take(old, axis.kept(states, size))), axis.selection(states, size))
            for axis, old in zip(self.axes, self.parameters(module).values())
        ]


def attribute_at(module: nn.Module, path: str) -> Any:
    """What a module has under a dotted name, or None."""
    owner, _, name = path.rpartition(".")
    for part in filter(None, owner.split(".")):
        module = getattr(module, part, None)
    return getattr(module, name, None)
