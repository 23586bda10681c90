"""Optimizer parameter groups in which state-space parameters have a learning rate of their own and no weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from ..errors import ConfigurationError
from ..validation import is_number

# Parameters of the dynamics: of a model of ours by the layer's own list, of Mamba and Mamba-2 by their names.
_DYNAMICS_OF_SELECTIVE_LAYERS = frozenset({"A_log", "dt_bias"})


def state_space_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, state_space_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """
    Parameter groups for an optimizer that is given to the plain Trainer.

    State-space parameters (LRU: poles, gamma and B; S4D: poles and time steps; Mamba: `A_log` and `dt_bias`) get
    `state_space_lr_factor` times the learning rate and no weight decay. All others are grouped as by the Trainer:
    weight decay for all but biases and normalisation; parameters that are tagged `_no_weight_decay` have none either.
    Source of the rule: the settings of Smith et al., 2023 (S5, arXiv 2208.04933), which CompreSSM uses for the LRU.

    Args:
        model (`torch.nn.Module`): The model; parameters without a gradient are left out.
        learning_rate (`float`): Learning rate, positive.
        weight_decay (`float`, *optional*, defaults to 0.0): Weight decay, not negative.
        state_space_lr_factor (`float`, *optional*, defaults to 1.0): Factor on the learning rate of state-space
            parameters, positive.

    Returns:
        `list[dict]`: At most three groups with `params`, `lr` and `weight_decay`; none is empty.

    Raises:
        [`~errors.ConfigurationError`]: a number is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from hf_compressm.models.sequence import LRUConfig, LRUForSequenceClassification
    >>> model = LRUForSequenceClassification(LRUConfig(input_size=1, hidden_size=8, state_size=16))
    >>> groups = state_space_parameter_groups(model, 1e-3, weight_decay=0.05, state_space_lr_factor=0.25)
    >>> [(group["lr"], group["weight_decay"]) for group in groups]
    [(0.001, 0.05), (0.001, 0.0), (0.00025, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)  # Trainer(..., optimizers=(optimizer, None))

    ```
    """
    _require_rates(learning_rate, weight_decay, state_space_lr_factor)
    dynamics = _state_space_parameters(model)
    decayed = _names_with_weight_decay(model)
    members: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "dynamics": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            has_decay = name in decayed and not getattr(parameter, "_no_weight_decay", False)
            kind = "dynamics" if id(parameter) in dynamics else "decayed" if has_decay else "plain"
            members[kind].append(parameter)
    rates = {"dynamics": learning_rate * state_space_lr_factor}
    return [
        {
            "params": parameters,
            "lr": rates.get(kind, learning_rate),
            "weight_decay": weight_decay if kind == "decayed" else 0.0,
        }
        for kind, parameters in members.items()
        if parameters
    ]


def _names_with_weight_decay(model: nn.Module) -> set[str]:
    """The Trainer's own rule, and no copy of it; the method reads nothing of the Trainer and is called without one."""
    # Private API of transformers.
    return set(Trainer.get_decay_parameter_names(None, model))


def _require_rates(learning_rate: Any, weight_decay: Any, state_space_lr_factor: Any) -> None:
    for name, value, least in (
        ("learning_rate", learning_rate, "above 0"),
        ("weight_decay", weight_decay, "0 or more"),
        ("state_space_lr_factor", state_space_lr_factor, "above 0"),
    ):
        if not is_number(value) or value < 0 or (value == 0 and least == "above 0"):
            raise ConfigurationError(f"{name} is {value!r}; give a number {least}.")


def _state_space_parameters(model: nn.Module) -> set[int]:
    """The identities of all parameters that hold a layer's dynamics."""
    found = set()
    for module in model.modules():
        names = frozenset(getattr(type(module), "state_space_parameters", _DYNAMICS_OF_SELECTIVE_LAYERS))
        found |= {id(parameter) for name, parameter in module.named_parameters(recurse=False) if name in names}
    return found
