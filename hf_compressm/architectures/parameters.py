"""Which parameters can be cut, and what takes the place of one that is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def successor(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """
    A parameter that takes the place of another: new values, the same dtype, device, `requires_grad` and attributes.

    Args:
        old (`torch.nn.Parameter`): The parameter that is replaced.
        values (`torch.Tensor`): The new values, any float dtype and shape.
    """
    new = nn.Parameter(
        values.detach().to(dtype=old.dtype, device=old.device).contiguous().clone(), requires_grad=old.requires_grad
    )
    # Optimizer hints such as `_no_weight_decay` and `_optim` live in the instance's dictionary.
    new.__dict__.update(old.__dict__)
    return new


# Apple's GPUs.
_WITHOUT_DOUBLE_PRECISION = frozenset({"mps"})


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """
    A module's own parameters by name, as the module holds them: what is written here is written into the module.

    Args:
        module (`torch.nn.Module`): The module.
    """
    # Private API of torch.
    return module._parameters


def with_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """
    A shallow copy of a module in which some parameters are others; the module stays as it is.

    Args:
        module (`torch.nn.Module`): The module.
        parameters (`Mapping[str, torch.nn.Parameter]`): The other parameters by name.
    """
    other = copy.copy(module)
    # Private API of torch.
    other._parameters = {**own_parameters(module), **parameters}
    return other


def why_not_reducible(parameter: Any) -> str | None:
    """
    Why a parameter cannot be cut, as the second half of a sentence, or None.

    Args:
        parameter (`Any`): What a module has under the name of a parameter.
    """
    if not isinstance(parameter, nn.Parameter):
        kind = type(parameter).__name__
        return f"is a {kind} and not a parameter (a parametrisation, an adapter or a quantised module holds it)"
    if hasattr(parameter, "ds_id"):
        return (
            "is partitioned by DeepSpeed, as all is that is loaded while the arguments of a ZeRO-3 run are known (for "
            "train_in_segments, load the model before you make them)"
        )
    # Sharded and quantised tensors are subclasses whose shape or values are not those that the layer computes with.
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        return f"holds a {type(parameter.data).__name__}, a sharded or quantised form"
    if not parameter.is_floating_point():
        return f"has dtype {parameter.dtype}, a quantised form"
    if _has_gradient_hooks(parameter):
        return "has hooks on its gradient, which its replacement would not have; remove them"
    if parameter.device.type in _WITHOUT_DOUBLE_PRECISION:
        return (
            f"is on the device {parameter.device.type}, which has no double precision, and a cut is computed in it; "
            "move the model to the CPU to compress it (or train there, with use_cpu=True)"
        )
    if parameter.is_meta:
        return "is on the meta device and has no values (it may be offloaded)"
    return None


def _has_gradient_hooks(parameter: nn.Parameter) -> bool:
    # Private API of torch.
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def has_hook_of_accelerate(module: nn.Module) -> bool:
    """Whether a module runs through a hook of accelerate, as where a model is spread over several devices."""
    # Private API of accelerate.
    return hasattr(module, "_hf_hook")
