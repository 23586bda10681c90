"""Copies of a model's weights that someone else keeps, such as an average over steps, cut together with the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import StateSpaceLayer, all_changes, find_layers
from ...errors import UnsupportedModelError
from ...systems import Truncation
from .changes import Change, ModelChange


class ModuleCopyChange(ModelChange):
    """
    The cut of a module that is built like the model, for example `torch.optim.swa_utils.AveragedModel.module`.

    Args:
        module (`torch.nn.Module`): The copy; its layers have the names and sizes of the model's.
        truncations (`Mapping[str, Truncation]`): What the model's layers are cut with, by layer name.

    Raises:
        [`~errors.TruncationError`]: the copy's parameters cannot hold a truncation.
    """

    def __init__(self, module: nn.Module, truncations: Mapping[str, Truncation]) -> None:
        layers = find_layers(module)
        reductions = [layer.reduce_alike(truncations[layer.name]) for layer in layers if layer.name in truncations]
        super().__init__(module, reductions, all_changes(module, layers, reductions))


class TensorCopyChange:
    """
    The cut of a dictionary that holds the model's parameters by name.

    Args:
        tensors (`MutableMapping[str, torch.Tensor]`): The copy; values of other names are left alone.
        layers (`Iterable[StateSpaceLayer]`): The model's layers, before they are cut.
        truncations (`Mapping[str, Truncation]`): What they are cut with, by layer name.

    Raises:
        [`~errors.TruncationError`]: the copy's parameters cannot hold a truncation.
    """

    def __init__(
        self,
        tensors: MutableMapping[str, Tensor],
        layers: Iterable[StateSpaceLayer],
        truncations: Mapping[str, Truncation],
    ) -> None:
        self._tensors = tensors
        self._new: dict[str, Tensor] = {}
        for layer in layers:
            held = {**layer.state_parameters(), **layer.rescaled_parameters()}
            names = {name: f"{layer.name}.{name}".lstrip(".") for name in held}
            if layer.name not in truncations or not all(name in tensors for name in names.values()):
                continue
            self._new.update(_reduced_tensors(layer, tensors, names, truncations[layer.name]))
        self._old = {name: tensors[name] for name in self._new if name in tensors}

    def commit(self) -> None:
        """Put the cut tensors in place."""
        self._tensors.update(self._new)

    def rollback(self) -> None:
        """Put the whole tensors back."""
        for name in self._new.keys() - self._old.keys():
            self._tensors.pop(name, None)
        self._tensors.update(self._old)


def _reduced_tensors(
    layer: StateSpaceLayer, tensors: Mapping[str, Tensor], names: Mapping[str, str], truncation: Truncation
) -> dict[str, Tensor]:
    twin = type(layer)(layer.name, copy.deepcopy(layer.module))
    parameters = {**twin.state_parameters(), **twin.rescaled_parameters()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[names[name]])
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    reduction = twin.reduce_alike(truncation)
    paths = {id(module): f"{layer.name}.{path}" for path, module in twin.module.named_modules()}
    added = {f"{paths[id(new.module)].strip('.')}.{new.name}": new.new.detach() for new in reduction.added}
    replaced = {
        names[by_identity[id(change.old)]]: change.new.detach().to(tensors[names[by_identity[id(change.old)]]])
        for change in reduction.parameters
    }
    return {**replaced, **added}


def copy_changes(
    candidates: Iterable[Any],
    model: nn.Module,
    layers: Iterable[StateSpaceLayer],
    truncations: Mapping[str, Truncation],
) -> list[Change]:
    """
    The cuts of those candidates that are copies of the model's weights; all others are left alone.

    Args:
        candidates (`Iterable`): Modules, or dictionaries of tensors by parameter name, that may be copies.
        model (`torch.nn.Module`): The model, before it is cut.
        layers (`Iterable[StateSpaceLayer]`): Its layers.
        truncations (`Mapping[str, Truncation]`): What they are cut with, by layer name.

    Raises:
        [`~errors.TruncationError`]: a copy's parameters cannot hold a truncation.
    """
    layers = list(layers)
    sizes = {layer.name: layer.state_size for layer in layers}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    changes: list[Change] = []
    for candidate in candidates:
        if isinstance(candidate, nn.Module):
            changes += [
                ModuleCopyChange(module, truncations)
                for module in (candidate, getattr(candidate, "module", None))
                if isinstance(module, nn.Module) and module is not model and _sizes_of(module) == sizes
            ]
        elif isinstance(candidate, MutableMapping) and _holds_parameters(candidate, shapes):
            changes.append(TensorCopyChange(candidate, layers, truncations))
    return changes


def _sizes_of(module: nn.Module) -> dict[str, int] | None:
    try:
        return {layer.name: layer.state_size for layer in find_layers(module)}
    except UnsupportedModelError:
        return None


def _holds_parameters(candidate: Mapping[Any, Any], shapes: Mapping[str, torch.Size]) -> bool:
    known = {name: value for name, value in candidate.items() if name in shapes}
    return bool(known) and all(
        isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.shape == shapes[name]
        for name, value in known.items()
    )
