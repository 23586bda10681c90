"""All or nothing: write the reductions of several layers into a model together, or take them all back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from ...architectures import (
    ABSENT,
    AttributeChange,
    LayerReduction,
    ParameterAddition,
    ParameterChange,
    ParameterRemoval,
)
from ...architectures.parameters import own_parameters
from ...errors import UnsupportedModelError


class Change(Protocol):
    """A prepared change of some state: everything that could fail has been done before it exists."""

    def commit(self) -> None:
        """Write the change."""
        ...

    def rollback(self) -> None:
        """Put back what was there before [`commit`]; harmless where nothing or only a part was written."""
        ...


class ModelChange:
    """
    New parameters, sizes and classes for several layers of one model.

    Parameters are replaced by identity in every module that holds them, so ties survive.

    Args:
        model (`torch.nn.Module`): The model that holds the layers.
        reductions (`Sequence[LayerReduction]`): What the layers built.
        config_changes (`Sequence[AttributeChange]`, *optional*): What the model's configs say of the new sizes.

    Raises:
        [`~errors.UnsupportedModelError`]: a parameter that would be replaced is not registered in any module of the
            model, so that its replacement would never be used.
    """

    def __init__(
        self,
        model: nn.Module,
        reductions: Sequence[LayerReduction],
        config_changes: Sequence[AttributeChange] = (),
    ) -> None:
        self.parameters: list[ParameterChange] = [change for reduction in reductions for change in reduction.parameters]
        self._slots = _slots_of(model, self.parameters)
        self.added: list[ParameterAddition] = [new for reduction in reductions for new in reduction.added]
        self.removed: list[ParameterRemoval] = [gone for reduction in reductions for gone in reduction.removed]
        self._gone = [(gone.module, gone.name, own_parameters(gone.module)[gone.name]) for gone in self.removed]
        self._modules = list(model.modules())
        attributes = [change for reduction in reductions for change in reduction.attributes]
        self._attributes = [*attributes, *config_changes]
        self._old_attributes = [replace(c, value=getattr(c.owner, c.name, ABSENT)) for c in self._attributes]

    @property
    def removed_parameters(self) -> list[nn.Parameter]:
        """The parameters that the model loses."""
        return [parameter for _, _, parameter in self._gone]

    def parameters_after(self) -> list[nn.Parameter]:
        """The model's parameters after the commit, in the order of `model.parameters()`."""
        replaced = {id(change.old): change.new for change in self.parameters}
        gone = {id(parameter) for _, _, parameter in self._gone}
        found: dict[int, nn.Parameter] = {}
        for module in self._modules:
            present = [p for p in own_parameters(module).values() if p is not None and id(p) not in gone]
            for parameter in [*present, *(new.new for new in self.added if new.module is module)]:
                parameter = replaced.get(id(parameter), parameter)
                found.setdefault(id(parameter), parameter)
        return list(found.values())

    def commit(self) -> None:
        """Put the new parameters, sizes and classes in place."""
        for module, name, _, new in self._slots:
            setattr(module, name, new)
        for module, name, _ in self._gone:
            own_parameters(module).pop(name, None)
        for addition in self.added:
            addition.module.register_parameter(addition.name, addition.new)
        for change in self._attributes:
            change.write()

    def rollback(self) -> None:
        """Put the old parameters, sizes and classes back."""
        # Backwards, so that an attribute that several layers share ends at its first value.
        for change in reversed(self._old_attributes):
            change.write()
        for addition in self.added:
            own_parameters(addition.module).pop(addition.name, None)
        for module, name, old in self._gone:
            own_parameters(module)[name] = old
        for module, name, old, _ in self._slots:
            setattr(module, name, old)


def commit_together(changes: Sequence[Change], then: Sequence[Change] = ()) -> None:
    """
    Commit several changes; where one fails, roll all of them back and raise what it raised.

    Args:
        changes (`Sequence[Change]`): Prepared changes, for example of a model and of its optimizer.
        then (`Sequence[Change]`, *optional*): Changes that look at what the others have written, or have put back: they
            come after them both ways.
    """
    try:
        for change in [*changes, *then]:
            change.commit()
    except BaseException:
        roll_back_together(changes, then)
        raise


def roll_back_together(changes: Sequence[Change], then: Sequence[Change] = ()) -> None:
    """
    Take several committed changes back, the last one first.

    Args:
        changes (`Sequence[Change]`): The changes.
        then (`Sequence[Change]`, *optional*): Changes that look at what the others have put back; they come after them.
    """
    for change in [*reversed(changes), *reversed(then)]:
        change.rollback()


def _slots_of(
    model: nn.Module, changes: Sequence[ParameterChange]
) -> list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
    """Every (module, name) that holds a parameter which changes, with its old and its new value."""
    by_identity = {id(change.old): change for change in changes}
    slots: dict[int, list[tuple[nn.Module, str, Any, Any]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in own_parameters(module).items():
            change = by_identity.get(id(parameter))
            if change is not None:
                slots[id(change.old)].append((module, name, change.old, change.new))
    missing = [change for change in changes if id(change.old) not in slots]
    if missing:
        shapes = ", ".join(str(tuple(change.old.shape)) for change in missing)
        raise UnsupportedModelError(
            f"{len(missing)} parameter(s) of shape {shapes} belong to a layer but are registered in no module of "
            f"{type(model).__name__}; give the whole model that holds the layers."
        )
    return [slot for parameter_slots in slots.values() for slot in parameter_slots]
