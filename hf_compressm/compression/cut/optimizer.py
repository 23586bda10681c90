"""The optimizer follows a cut: its groups hold the new parameters, with moments that moved along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import ParameterAddition, ParameterChange
from ...errors import UnsupportedModelError
from .changes import ModelChange
from .optimizer_moments import carry_state, fits


class OptimizerChange:
    """
    What a cut changes in an optimizer, computed before anything is written.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper such as `AcceleratedOptimizer` that holds the
            real one in its attribute `optimizer`.
        changes (`Sequence[ParameterChange]`): The parameters that are replaced.
        moments (`str`, *optional*, defaults to `"carry"`): `"carry"`, `"slice"` or `"reset"`, see [`CompreSSMConfig`].
        added (`Sequence[ParameterAddition]`, *optional*): Parameters that the model gets.
        removed (`Sequence[torch.nn.Parameter]`, *optional*): Parameters that it loses.
        order (`Sequence[torch.nn.Parameter]`, *optional*): All parameters of the model after the cut. What is added
            takes its place in a group by it, where an optimizer that is made of the cut model would have it: saved
            states go by the place.

    Raises:
        [`~errors.UnsupportedModelError`]: the optimizer keeps its parameters in a form of its own (DeepSpeed), so that
            their replacement would not be trained.
    """

    def __init__(
        self,
        optimizer: Any,
        changes: Sequence[ParameterChange],
        moments: str = "carry",
        added: Sequence[ParameterAddition] = (),
        removed: Sequence[nn.Parameter] = (),
        order: Sequence[nn.Parameter] = (),
    ) -> None:
        self._optimizer = unwrap_optimizer(optimizer)
        self._groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self._new_groups = _groups_after(self._groups, changes, added, removed, order)
        require_trained(self._optimizer, [change.old for change in changes])
        _require_trainable(self._optimizer, added)
        outgoing = [*(change.old for change in changes), *removed]
        self._old_states = {old: self._optimizer.state[old] for old in outgoing if old in self._optimizer.state}
        self._new_states = {
            change.new: self._state_after(change, self._old_states.get(change.old, {}), moments)
            for change in changes
            if change.old in self._old_states or change.optimizer_state
        }

    @classmethod
    def of(cls, optimizer: Any, change: ModelChange, moments: str = "carry") -> OptimizerChange:
        """
        What a change of a model means for its optimizer.

        Args:
            optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.
            change ([`~compression.apply.ModelChange`]): The change, before it is committed.
            moments (`str`, *optional*, defaults to `"carry"`): As above.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter that comes or is replaced would not be trained.
        """
        removed, order = change.removed_parameters, change.parameters_after()
        return cls(optimizer, change.parameters, moments, change.added, removed, order)

    def _state_after(self, change: ParameterChange, state: dict[str, Any], moments: str) -> dict[str, Any]:
        if change.optimizer_state is not None:
            return dict(change.optimizer_state)
        if moments == "reset":
            return {}
        if moments == "slice" and change.moment_map is not None:
            change = replace(change, moment_map=change.moment_map.sliced())
        return carry_state(state, change, type(self._optimizer).__name__)

    def commit(self) -> None:
        """Let the parameter groups hold the new parameters, with their carried state."""
        for group, parameters in zip(self._optimizer.param_groups, self._new_groups):
            # In place, as some optimizers keep a second reference to the list.
            group["params"][:] = parameters
        for old in self._old_states:
            self._optimizer.state.pop(old, None)
        self._optimizer.state.update(self._new_states)
        require_matching_states(self._optimizer)

    def rollback(self) -> None:
        """Put the old parameters and their state back."""
        for group, parameters in zip(self._optimizer.param_groups, self._groups):
            group["params"][:] = parameters
        held = {id(parameter) for parameters in self._groups for parameter in parameters}
        for parameter in [p for p in self._optimizer.state if isinstance(p, nn.Parameter) and id(p) not in held]:
            del self._optimizer.state[parameter]
        self._optimizer.state.update(self._old_states)


def _groups_after(
    groups: Sequence[Sequence[nn.Parameter]],
    changes: Sequence[ParameterChange],
    added: Sequence[ParameterAddition],
    removed: Sequence[nn.Parameter],
    order: Sequence[nn.Parameter],
) -> list[list[nn.Parameter]]:
    """
    The parameters of each group after a cut.

    Raises:
        [`~errors.UnsupportedModelError`]: an added parameter would not be trained.
    """
    replaced, gone = {id(change.old): change.new for change in changes}, {id(parameter) for parameter in removed}
    after = [[replaced.get(id(p), p) for p in parameters if id(p) not in gone] for parameters in groups]
    place = {id(parameter): number for number, parameter in enumerate(order)}
    for addition in added:
        beside = replaced.get(id(addition.beside), addition.beside)
        group = next((group for group in after if any(parameter is beside for parameter in group)), None)
        if group is None:
            if addition.new.requires_grad:
                raise UnsupportedModelError(
                    f"the cut adds a parameter {addition.name!r}, and the optimizer does not train the one that it "
                    "goes with. Give the optimizer that trains all parameters, or set stock=True."
                )
            continue
        number = place.get(id(addition.new), len(place))
        later = (i for i, parameter in enumerate(group) if place.get(id(parameter), -1) > number)
        group.insert(next(later, len(group)), addition.new)
    return after


def require_trained(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """
    Check that an optimizer trains parameters that may be cut, in a form that a cut can follow.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.
        parameters (`Iterable[torch.nn.Parameter]`): What may be cut; frozen ones need no optimizer.

    Raises:
        [`~errors.UnsupportedModelError`]: a parameter is in no group of the optimizer, so that its replacement would
            not be trained, or the optimizer keeps one flat history of all parameters (L-BFGS).
    """
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedModelError(
            "LBFGS keeps one flat history of all parameters, which a cut cannot follow. Train with another optimizer, "
            "or compress after the training."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    strays = [parameter for parameter in trained if id(parameter) not in held]
    if strays:
        raise UnsupportedModelError(
            f"{len(strays)} of the {len(trained)} parameters that would be cut are not in {type(optimizer).__name__}, "
            "so that their replacements would not be trained. Give the optimizer that trains all of them, freeze them "
            "with requires_grad_(False), or, where it trains flattened or partitioned copies (DeepSpeed), compress "
            "in a run without that wrapper."
        )


def _require_trainable(optimizer: torch.optim.Optimizer, added: Sequence[ParameterAddition]) -> None:
    muon = getattr(torch.optim, "Muon", ())
    unfit = [addition for addition in added if addition.new.requires_grad and addition.new.ndim != 2]
    if unfit and isinstance(optimizer, muon):
        raise UnsupportedModelError(
            f"Muon trains matrices only, and the cut adds {unfit[0].name!r} of shape {tuple(unfit[0].new.shape)}. "
            "Train with another optimizer, or set stock=True."
        )


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """
    The innermost optimizer of nested wrappers that hold it in their attribute `optimizer` or `base_optimizer`.

    Raises:
        [`~errors.UnsupportedModelError`]: there is no object with parameter groups inside.
    """
    while (inner := getattr(optimizer, "optimizer", getattr(optimizer, "base_optimizer", None))) is not None:
        optimizer = inner
    if not hasattr(optimizer, "param_groups"):
        raise UnsupportedModelError(
            f"the optimizer is a {type(optimizer).__name__} without parameter groups; give a torch.optim.Optimizer."
        )
    return optimizer


def drop_stale_states(optimizer: Any) -> int:
    """
    Forget the state of parameters whose size has changed behind the optimizer's back, as a loaded checkpoint does.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.

    Returns:
        `int`: Parameters whose state was dropped.
    """
    optimizer = unwrap_optimizer(optimizer)
    stale = [
        parameter
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor) and not all(fits(name, state[name], parameter) for name in state)
    ]
    for parameter in stale:
        del optimizer.state[parameter]
    return len(stale)


def require_matching_states(optimizer: torch.optim.Optimizer) -> None:
    """
    Check that every moment fits its parameter.

    The fused optimizers of torch check no shapes themselves and read or write beyond a tensor's end.

    Raises:
        `AssertionError`: a known moment has another shape than its parameter, which is an error of this library.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if not fits(name, value, parameter):
                    raise AssertionError(
                        f"{name} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
                    )
