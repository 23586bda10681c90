"""What a reduction is: the parameters, attributes and sizes that another state size changes in a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from .contract import StateSpaceLayer


class StateForm(NamedTuple):
    """
    The form of a layer's state; in JSON a list of both numbers.

    Args:
        size (`int`): States per channel, N.
        projected (`int`): How many entries B and C have where they are projected; more than `size` where the layer
            mixes them.
    """

    size: int
    projected: int

    @property
    def is_mixed(self) -> bool:
        """Whether the layer mixes states."""
        return self.size < self.projected


@dataclass(frozen=True)
class ParameterChange:
    """
    One parameter and what takes its place.

    Args:
        old (`torch.nn.Parameter`): The parameter as it is in the model.
        new (`torch.nn.Parameter`): Its replacement, with the same dtype, device, `requires_grad` and attributes.
        moment_map ([`AxisMap`], [`AxisSelection`] or [`ModalMap`], *optional*): How optimizer moments move; when unset
            they are reset.
        optimizer_state (`dict`, *optional*): State that the optimizer takes for the new parameter instead of moving
            what it has, as when a cut is taken back.
    """

    old: nn.Parameter
    new: nn.Parameter
    moment_map: Any = None
    optimizer_state: dict[str, Any] | None = None


ABSENT: Any = object()
"""Stands for the value of an attribute that is not there."""


@dataclass(frozen=True)
class AttributeChange:
    """
    A plain attribute and its new value.

    Args:
        owner (`object`): A module or a config.
        name (`str`): The attribute's name: that of a size, or `__class__`.
        value (`object`): The new value, of the type that the owner expects (a Python `int` in a config), or
            [`ABSENT`], where the attribute goes.
    """

    owner: Any
    name: str
    value: Any

    def write(self) -> None:
        """Give the attribute its new value, or take it away."""
        if self.value is not ABSENT:
            setattr(self.owner, self.name, self.value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


@dataclass(frozen=True)
class ParameterAddition:
    """
    A parameter that a module did not have.

    Args:
        module (`torch.nn.Module`): The module that gets it.
        name (`str`): Its name in the module.
        new (`torch.nn.Parameter`): The parameter.
        beside (`torch.nn.Parameter`): One of the model's that is trained like it; the new one joins its group in the
            optimizer.
    """

    module: nn.Module
    name: str
    new: nn.Parameter
    beside: nn.Parameter


@dataclass(frozen=True)
class ParameterRemoval:
    """
    A parameter that a module no longer has.

    Args:
        module (`torch.nn.Module`): The module that loses it.
        name (`str`): Its name in the module.
    """

    module: nn.Module
    name: str


@dataclass(frozen=True)
class LayerReduction:
    """
    Everything that another state size changes in one layer, built and not yet written.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
        parameters (`Sequence[ParameterChange]`): Its parameters that are replaced.
        attributes (`Sequence[AttributeChange]`): Sizes and classes in the layer's modules that follow.
        state_size (`int`): The layer's new state size.
        projected_size (`int`, *optional*): How many entries B and C then have where they are projected, where that is
            not the state size.
        added (`Sequence[ParameterAddition]`): Parameters that the layer's modules did not have.
        removed (`Sequence[ParameterRemoval]`): Parameters that they no longer have.
    """

    layer: StateSpaceLayer
    parameters: Sequence[ParameterChange]
    attributes: Sequence[AttributeChange]
    state_size: int
    projected_size: int | None = None
    added: Sequence[ParameterAddition] = ()
    removed: Sequence[ParameterRemoval] = ()

    @property
    def form(self) -> StateForm:
        """State size and projected size of the layer after it."""
        return StateForm(self.state_size, self.projected_size or self.state_size)
