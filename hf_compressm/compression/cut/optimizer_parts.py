"""The optimizers that an optimizer is made of: one, or several behind one face (Muon with AdamW, say)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ...errors import UnsupportedModelError


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """
    The innermost optimizer of nested wrappers that hold it in their attribute `optimizer` or `base_optimizer`.

    Raises:
        [`~errors.UnsupportedModelError`]: there is no object with parameter groups inside.
    """
    while (inner := getattr(optimizer, "optimizer", getattr(optimizer, "base_optimizer", None))) is not None:
        optimizer = inner
    if not hasattr(optimizer, "param_groups") and not any(_is_optimizer(value) for value in _held_by(optimizer)):
        raise UnsupportedModelError(
            f"the optimizer is a {type(optimizer).__name__} without parameter groups; give a torch.optim.Optimizer."
        )
    return optimizer


def optimizer_parts(optimizer: Any) -> list[Any]:
    """
    Every object, inside an optimizer or a wrapper of it, that has parameter groups: itself and those that it holds.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.
    """
    found: list[Any] = []

    def visit(candidate: Any) -> None:
        if any(candidate is part for part in found):
            return
        if hasattr(candidate, "param_groups"):
            found.append(candidate)
        for value in _held_by(candidate):
            if _is_optimizer(value):
                visit(value)

    visit(unwrap_optimizer(optimizer))
    return found


def parameter_lists(parts: list[Any]) -> list[list[Any]]:
    """The list of parameters of every group of some optimizers, each list once."""
    lists = [group["params"] for part in parts for group in part.param_groups]
    return list({id(parameters): parameters for parameters in lists}.values())


def lasting_state(part: Any) -> MutableMapping[Any, Any] | None:
    """
    The mapping in which an optimizer keeps its state by parameter; None where it has none that can be written to.

    A property that puts several together into a new dictionary at each look is none: what is written there is lost.

    Args:
        part (`torch.optim.Optimizer`): The optimizer.
    """
    state = getattr(part, "state", None)
    return state if isinstance(state, MutableMapping) and state is part.state else None


def state_of(optimizer: Any, parameter: Any) -> Mapping[str, Any] | None:
    """
    What an optimizer keeps of a parameter, or None.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.
        parameter (`torch.nn.Parameter`): The parameter.
    """
    states = (lasting_state(part) for part in optimizer_parts(optimizer))
    return next((state[parameter] for state in states if state is not None and parameter in state), None)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer) or (
        not isinstance(value, type) and hasattr(value, "param_groups") and callable(getattr(value, "step", None))
    )


def _held_by(holder: Any) -> Iterator[Any]:
    for name, value in getattr(holder, "__dict__", {}).items():
        if name in ("state", "param_groups"):
            continue
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value
