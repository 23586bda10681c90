"""
When a model needs a compressed class, and what that changes in it.

Stock classes hold one state size for all layers, written into their own weights. Sizes that differ, and layers that mix
states, need a class `Compressed...` of `models/compressed`; a model in memory takes it by its `__class__`, in the same
commit as the new tensors, and goes back to the stock class when it no longer needs another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..models.compressed import compressed_class_of, saves_itself, stock_class_of
from .changes import ABSENT, AttributeChange, LayerReduction, StateForm
from .contract import StateSpaceLayer
from .registry import config_changes


def can_hold_forms(model: nn.Module, layer: StateSpaceLayer) -> bool:
    """
    Whether there is a compressed class for the model around a layer.

    Args:
        model (`torch.nn.Module`): The whole model.
        layer ([`StateSpaceLayer`]): One of its layers.
    """
    return _host(model, layer.name) is not None


def form_changes(
    model: nn.Module, layers: Sequence[StateSpaceLayer], forms: Mapping[str, StateForm]
) -> list[AttributeChange]:
    """
    What changes in the classes and configs of models when some of their layers get new forms.

    Args:
        model (`torch.nn.Module`): The whole model.
        layers (`Sequence[StateSpaceLayer]`): All of its layers.
        forms (`Mapping[str, StateForm]`): New state size and projected size by layer name; layers that it does
            not name keep theirs.
    """
    hosts: dict[int, tuple[nn.Module, list[StateForm]]] = {}
    for layer in layers:
        host = _host(model, layer.name)
        if host is not None:
            form = forms.get(layer.name, layer.form)
            hosts.setdefault(id(host), (host, []))[1].append(form)
    return [change for host, found in hosts.values() for change in _changes_of(host, found)]


def all_changes(
    model: nn.Module, layers: Sequence[StateSpaceLayer], reductions: Sequence[LayerReduction]
) -> list[AttributeChange]:
    """
    What the configs of a model, and its class, have to be after some reductions.

    Args:
        model (`torch.nn.Module`): The whole model.
        layers (`Sequence[StateSpaceLayer]`): All of its layers.
        reductions (`Sequence[LayerReduction]`): What they built.
    """
    forms = {reduction.layer.name: reduction.form for reduction in reductions}
    return [
        *config_changes(layers, {name: form.projected for name, form in forms.items()}),
        *form_changes(model, layers, forms),
    ]


def _host(model: nn.Module, name: str) -> nn.Module | None:
    """
    The outermost model around a layer that has, or can get, a compressed class.

    There is none inside a model of a class of its own, such as a user's: that one is saved as a whole and built anew by
    its class, which knows no mixed layers.
    """
    path = name.split(".")
    for depth in range(len(path)):
        owner = model.get_submodule(".".join(path[:depth]))
        config = getattr(owner, "config", None)
        if config is not None and (stock_class_of(owner) or compressed_class_of(owner)) is not None:
            return owner
        if saves_itself(owner):
            return None
    return None


def _changes_of(host: nn.Module, forms: Sequence[StateForm]) -> list[AttributeChange]:
    sizes, projected = [int(form.size) for form in forms], [int(form.projected) for form in forms]
    needs_class, stock = len(set(forms)) > 1 or sizes != projected, stock_class_of(host)
    if needs_class:
        classes = [] if stock is not None else _class_changes(host, compressed_class_of(host))
        # Both at once would not be valid in between where one is longer than the other; the class comes first.
        fields = {"projected_state_sizes": projected, "state_sizes": sizes}
        return [*classes, *(AttributeChange(host.config, name, value) for name, value in fields.items())]
    if stock is None:
        return []
    absent = ("projected_state_sizes", "state_sizes", "auto_map")
    return [*(AttributeChange(host.config, name, ABSENT) for name in absent), *_class_changes(host, stock)]


def _class_changes(host: nn.Module, new: type[Any]) -> list[AttributeChange]:
    return [
        AttributeChange(host, "__class__", new),
        AttributeChange(host.config, "__class__", new.config_class),
    ]
