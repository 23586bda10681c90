"""The optimizer follows a cut: its groups hold the new parameters, with moments that moved along."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import ParameterAddition, ParameterChange, StateSpaceLayer
from ...errors import UnsupportedModelError
from .changes import ModelChange
from .optimizer_moments import carry_state, fits
from .optimizer_parts import lasting_state, optimizer_parts, parameter_lists, unwrap_optimizer

logger = logging.getLogger(__name__)


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
        self._parts = optimizer_parts(optimizer)
        self._lists = parameter_lists(self._parts)
        self._groups = [list(parameters) for parameters in self._lists]
        require_trained(optimizer, [change.old for change in changes])
        self._new_groups = _groups_after(self._groups, changes, added, removed, order, self._refusing_groups())
        _require_trainable(self._parts, added)
        outgoing = [*(change.old for change in changes), *removed]
        found = [(part, state) for part in self._parts if (state := lasting_state(part)) is not None]
        self._keepers, self._states = [part for part, _ in found], [state for _, state in found]
        self._old_states = [{old: state[old] for old in outgoing if old in state} for state in self._states]
        self._new_states = [self._states_after(old, changes, moments) for old in self._old_states]
        self._add_restored_states(changes)

    def _refusing_groups(self) -> list[int]:
        """The groups, by number, whose optimizer takes matrices alone."""
        refusing = {id(ps) for ps in parameter_lists([part for part in self._parts if _takes_matrices_alone(part)])}
        return [number for number, parameters in enumerate(self._lists) if id(parameters) in refusing]

    def _states_after(
        self, old: dict[nn.Parameter, Any], changes: Sequence[ParameterChange], moments: str
    ) -> dict[nn.Parameter, Any]:
        return {c.new: self._state_after(c, old[c.old], moments) for c in changes if c.old in old}

    def _add_restored_states(self, changes: Sequence[ParameterChange]) -> None:
        known = {id(new) for states in self._new_states for new in states}
        for change in changes:
            if change.optimizer_state and id(change.new) not in known and self._states:
                # The last that holds it: the innermost one.
                places = [place for place, part in enumerate(self._keepers) if _holds(part, change.old)]
                self._new_states[places[-1] if places else 0][change.new] = dict(change.optimizer_state)

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
        self._warn_of_states_out_of_reach()
        for parameters, new in zip(self._lists, self._new_groups):
            # In place, as some optimizers keep a second reference to the list.
            parameters[:] = new
        for state, old, new in zip(self._states, self._old_states, self._new_states):
            for parameter in old:
                state.pop(parameter, None)
            state.update(new)
        for part in self._parts:
            require_matching_states(part)

    def rollback(self) -> None:
        """Put the old parameters and their state back."""
        for parameters, old in zip(self._lists, self._groups):
            parameters[:] = old
        held = {id(parameter) for parameters in self._groups for parameter in parameters}
        for state, old in zip(self._states, self._old_states):
            for parameter in [p for p in state if isinstance(p, nn.Parameter) and id(p) not in held]:
                del state[parameter]
            state.update(old)

    def _warn_of_states_out_of_reach(self) -> None:
        """Report what an optimizer keeps of a cut parameter where it cannot be written to."""
        reached = {id(p) for parameters in parameter_lists(self._keepers) for p in parameters}
        outgoing = {id(p) for group in self._groups for p in group} - {id(p) for g in self._new_groups for p in g}
        for part in self._parts:
            if lasting_state(part) is not None:
                continue
            shown = getattr(part, "state", None)
            known = {id(parameter) for parameter in shown} if isinstance(shown, Mapping) else outgoing
            if (known & outgoing) - reached:
                logger.warning(
                    "%s does not keep its state in a dictionary that can be written to; what it knows of the "
                    "parameters that are cut is lost, and starts afresh.",
                    type(part).__name__,
                )


def _holds(part: Any, parameter: nn.Parameter) -> bool:
    return any(parameter is held for group in part.param_groups for held in group["params"])


def _groups_after(
    groups: Sequence[Sequence[nn.Parameter]],
    changes: Sequence[ParameterChange],
    added: Sequence[ParameterAddition],
    removed: Sequence[nn.Parameter],
    order: Sequence[nn.Parameter],
    refusing: Sequence[int] = (),
) -> list[list[nn.Parameter]]:
    """
    The parameters of each group after a cut; what is no matrix goes into no group in `refusing`, if there is another.

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
        if addition.new.ndim != 2 and any(group is after[number] for number in refusing):
            group = next((after[i] for i in range(len(after)) if i not in refusing), group)
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
    parts, optimizer = optimizer_parts(optimizer), unwrap_optimizer(optimizer)
    if any(isinstance(part, torch.optim.LBFGS) for part in parts):
        raise UnsupportedModelError(
            "LBFGS keeps one flat history of all parameters, which a cut cannot follow. Train with another optimizer, "
            "or compress after the training."
        )
    held = {id(parameter) for parameters in parameter_lists(parts) for parameter in parameters}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    strays = [parameter for parameter in trained if id(parameter) not in held]
    if strays:
        raise UnsupportedModelError(
            f"{len(strays)} of the {len(trained)} parameters that would be cut are not in {type(optimizer).__name__}, "
            "so that their replacements would not be trained. Give the optimizer that trains all of them, freeze them "
            "with requires_grad_(False), or, where it trains flattened or partitioned copies (DeepSpeed), compress "
            "in a run without that wrapper."
        )


def require_trained_layers(optimizer: Any, layers: Iterable[StateSpaceLayer]) -> None:
    """
    [`require_trained`] for all that a cut may replace in some layers.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.
        layers (`Iterable[StateSpaceLayer]`): The layers.

    Raises:
        [`~errors.UnsupportedModelError`]: as above.
    """
    replaced = [{**layer.state_parameters(), **layer.rescaled_parameters()} for layer in layers]
    require_trained(optimizer, [parameter for of_layer in replaced for parameter in of_layer.values()])


def _takes_matrices_alone(part: Any) -> bool:
    return isinstance(part, getattr(torch.optim, "Muon", ()))


def _require_trainable(parts: Sequence[Any], added: Sequence[ParameterAddition]) -> None:
    unfit = [addition for addition in added if addition.new.requires_grad and addition.new.ndim != 2]
    if unfit and all(_takes_matrices_alone(part) for part in parts):
        raise UnsupportedModelError(
            f"Muon trains matrices only, and the cut adds {unfit[0].name!r} of shape {tuple(unfit[0].new.shape)}. "
            "Train with another optimizer, or set stock=True."
        )


def drop_stale_states(optimizer: Any) -> int:
    """
    Forget the state of parameters whose size has changed behind the optimizer's back, as a loaded checkpoint does.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.

    Returns:
        `int`: Parameters whose state was dropped.
    """
    states = [state for part in optimizer_parts(optimizer) if (state := lasting_state(part)) is not None]
    dropped: set[int] = set()
    for state in {id(state): state for state in states}.values():
        stale = [
            parameter
            for parameter, of_one in state.items()
            if isinstance(parameter, Tensor) and not all(fits(name, of_one[name], parameter) for name in of_one)
        ]
        for parameter in stale:
            del state[parameter]
            dropped.add(id(parameter))
    return len(dropped)


def require_matching_states(optimizer: torch.optim.Optimizer) -> None:
    """
    Check that every moment fits its parameter.

    The fused optimizers of torch check no shapes themselves and read or write beyond a tensor's end.

    Raises:
        `AssertionError`: a known moment has another shape than its parameter, which is an error of this library.
    """
    held = getattr(optimizer, "state", {})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in held.get(parameter, {}).items():
                if not fits(name, value, parameter):
                    raise AssertionError(
                        f"{name} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
                    )
