"""Copies of a model's weights that someone else keeps, such as an average over steps, cut together with the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...architectures import StateForm, StateSpaceLayer, all_changes, find_layers
from ...errors import UnsupportedModelError
from ...systems import Truncation
from .changes import Change, ModelChange
from .snapshot import Snapshot


class WeightCopy(Protocol):
    """A copy of the model's weights, at the model's present state sizes."""

    name: str

    def cut(self, truncations: Mapping[str, Truncation]) -> Change:
        """
        Prepare the cut that the model gets.

        Args:
            truncations (`Mapping[str, Truncation]`): What the model's layers are cut with, by layer name.

        Raises:
            [`~errors.TruncationError`]: the copy's parameters cannot hold a truncation.
        """
        ...

    def snapshot_like(self, model: Snapshot) -> Snapshot:
        """What the copy has in the place of that which a snapshot of the model holds."""
        ...

    def restored(self, snapshot: Snapshot) -> Change:
        """
        Prepare the return to the forms and tensors of a snapshot.

        Raises:
            [`~errors.DimensionError`]: a tensor of the snapshot has not the shape that its layer needs.
        """
        ...


class ModuleCopy:
    """
    A module that is built like the model, for example `torch.optim.swa_utils.AveragedModel.module`.

    Args:
        name (`str`): What the copy is called in snapshots.
        module (`torch.nn.Module`): The copy; its layers have the names and sizes of the model's.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module

    def cut(self, truncations: Mapping[str, Truncation]) -> Change:
        """Prepare the cut that the model gets."""
        layers = find_layers(self._module)
        reductions = [layer.reduce_alike(truncations[layer.name]) for layer in layers if layer.name in truncations]
        return ModelChange(self._module, reductions, all_changes(self._module, layers, reductions))

    def snapshot_like(self, model: Snapshot) -> Snapshot:
        """What the copy has in the place of that which a snapshot of the model holds."""
        own = Snapshot.of(find_layers(self._module), whole=model.forms)
        return Snapshot(model.forms, {name: own.parameters[name] for name in model.parameters})

    def restored(self, snapshot: Snapshot) -> Change:
        """Prepare the return to the forms and tensors of a snapshot."""
        layers = find_layers(self._module)
        reductions = snapshot.reductions(layers)
        return ModelChange(self._module, reductions, all_changes(self._module, layers, reductions))


class TensorCopy:
    """
    A dictionary that holds the model's parameters by name.

    Args:
        name (`str`): What the copy is called in snapshots.
        tensors (`MutableMapping[str, torch.Tensor]`): The copy; values of other names are left alone.
        model (`torch.nn.Module`): The model, at the copy's state sizes.
        layers (`Sequence[StateSpaceLayer]`): Its layers; one with a parameter that the copy lacks is left out.
    """

    def __init__(
        self, name: str, tensors: MutableMapping[str, Tensor], model: nn.Module, layers: Sequence[StateSpaceLayer]
    ) -> None:
        self.name = name
        self._tensors = tensors
        self._model = model
        self._layers = [layer for layer in layers if all(n in tensors for n in _names_of(layer))]

    def cut(self, truncations: Mapping[str, Truncation]) -> Change:
        """Prepare the cut that the model gets."""
        new: dict[str, Tensor] = {}
        for layer in self._layers:
            if layer.name in truncations:
                new.update(_reduced_tensors(layer, self._tensors, truncations[layer.name]))
        return TensorCopyChange(self._tensors, new)

    def snapshot_like(self, model: Snapshot) -> Snapshot:
        """What the copy has in the place of that which a snapshot of the model holds."""
        forms = {layer.name: model.forms[layer.name] for layer in self._layers if layer.name in model.forms}
        names = [name for layer in self._layers for name in _names_of(layer, everything=True)]
        held = {name: self._tensors[name] for name in names if name in self._tensors}
        return Snapshot(forms, {name: held[name.lstrip(".")] for name in model.parameters if name.lstrip(".") in held})

    def restored(self, snapshot: Snapshot) -> Change:
        """Prepare the return to the forms and tensors of a snapshot."""
        reductions = snapshot.reductions(self._layers)
        paths = {id(module): path for path, module in self._model.named_modules()}
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        new = {
            names[id(change.old)]: change.new.detach().to(self._tensors[names[id(change.old)]])
            for reduction in reductions
            for change in reduction.parameters
            if names[id(change.old)] in self._tensors
        }
        removed = [gone for reduction in reductions for gone in reduction.removed]
        return TensorCopyChange(self._tensors, new, [f"{paths[id(g.module)]}.{g.name}".lstrip(".") for g in removed])


class TensorCopyChange:
    """
    New values in a dictionary of tensors.

    Args:
        tensors (`MutableMapping[str, torch.Tensor]`): The dictionary.
        new (`Mapping[str, torch.Tensor]`): The values that it gets.
        removed (`Iterable[str]`, *optional*): The names that it loses.
    """

    def __init__(
        self, tensors: MutableMapping[str, Tensor], new: Mapping[str, Tensor], removed: Iterable[str] = ()
    ) -> None:
        self._tensors, self._new, self._removed = tensors, dict(new), list(removed)
        self._old = {name: tensors[name] for name in [*self._new, *self._removed] if name in tensors}

    def commit(self) -> None:
        """Put the new tensors in place."""
        self._tensors.update(self._new)
        for name in self._removed:
            self._tensors.pop(name, None)

    def rollback(self) -> None:
        """Put the old tensors back."""
        for name in self._new.keys() - self._old.keys():
            self._tensors.pop(name, None)
        self._tensors.update(self._old)


def _names_of(layer: StateSpaceLayer, everything: bool = False) -> dict[str, nn.Parameter]:
    """A layer's parameters by their names in the model: those of its state, or all that a cut may replace."""
    held = {**layer.state_parameters(), **layer.rescaled_parameters()}
    held = layer.replaceable_parameters() if everything else held
    return {f"{layer.name}.{name}".lstrip("."): parameter for name, parameter in held.items()}


def _reduced_tensors(
    layer: StateSpaceLayer, tensors: Mapping[str, Tensor], truncation: Truncation
) -> dict[str, Tensor]:
    twin = type(layer)(layer.name, copy.deepcopy(layer.module))
    # A copy may lack what is not trained.
    parameters = {name: parameter for name, parameter in _names_of(twin, everything=True).items() if name in tensors}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    names = {id(parameter): name for name, parameter in parameters.items()}
    reduction = twin.reduce_alike(truncation)
    paths = {id(module): f"{layer.name}.{path}" for path, module in twin.module.named_modules()}
    added = {f"{paths[id(new.module)].strip('.')}.{new.name}": new.new.detach() for new in reduction.added}
    replaced = {
        names[id(change.old)]: change.new.detach().to(tensors[names[id(change.old)]])
        for change in reduction.parameters
        if id(change.old) in names
    }
    return {**replaced, **added}


def find_copies(candidates: Mapping[str, Any], model: nn.Module, layers: Sequence[StateSpaceLayer]) -> list[WeightCopy]:
    """
    Those candidates that are copies of the model's weights, each once.

    Args:
        candidates (`Mapping[str, Any]`): Modules, or dictionaries of tensors by parameter name, that may be copies, by
            a name of their own.
        model (`torch.nn.Module`): The model.
        layers (`Sequence[StateSpaceLayer]`): Its layers.
    """
    forms = {layer.name: layer.form for layer in layers}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    seen = {id(model)}
    copies: list[WeightCopy] = []
    for name, candidate in candidates.items():
        held = [candidate, getattr(candidate, "module", None)] if isinstance(candidate, nn.Module) else [candidate]
        for thing in held:
            if id(thing) in seen:
                continue
            if isinstance(thing, nn.Module) and _forms_of(thing) == forms:
                copies.append(ModuleCopy(name, thing))
            elif isinstance(thing, MutableMapping) and _holds_parameters(thing, shapes):
                copies.append(TensorCopy(name, thing, model, layers))
            else:
                continue
            seen.add(id(thing))
    return copies


def _forms_of(module: nn.Module) -> dict[str, StateForm] | None:
    try:
        return {layer.name: layer.form for layer in find_layers(module)}
    except UnsupportedModelError:
        return None


def _holds_parameters(candidate: Mapping[Any, Any], shapes: Mapping[str, torch.Size]) -> bool:
    known = {name: value for name, value in candidate.items() if name in shapes}
    return bool(known) and all(
        isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.shape == shapes[name]
        for name, value in known.items()
    )
