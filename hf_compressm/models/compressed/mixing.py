r"""
Selective mixers that combine the entries of B and C just before their scan.

Where a convolution, an activation or a norm stands between the projections and the scan, a smaller state cannot be
written into the weights of the projections. A mixed layer keeps these as they are, N entries each, and gives its scan
\\( \tilde B_t = W^\top B_t, \tilde C_t = T^\top C_t \\) with trained matrices of shape N x r. The state and the
recurrent cache have r entries. In Mamba-2 A is one number a head, so the dynamics of the projected system are exact.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .mixed_delta_rule import MixedDeltaRule
from .mixed_kimi_delta import MixedKimiDelta
from .mixed_lightning import MixedLightning
from .mixed_multi_head import MixedMultiHead
from .mixed_scan import MixedScan
from .stock_families import family_of, family_of_mixer

PREFIX = "Mixed"


class _Hidden:
    """An inherited attribute that a class does not have any more."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self._name!r}")


class MixedNorm:
    """What the norm of B or of C does with `mixing`, `(N, r)`: it combines the entries that it has normalised."""

    # By this the package `kernels` finds the norms that it may replace by its own, which do not mix.
    kernel_layer_name = _Hidden()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise and combine the last axis, of length N."""
        normalised = super().forward(hidden_states)
        return normalised @ self.mixing.to(normalised.dtype)


class UnfusedTraining:
    """A mixer whose norms combine states, which the one kernel for all of its training steps does not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the mixer, always by its single steps."""
        training = self.training
        self.training = False  # read for nothing else than the choice of the fused kernel
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


@functools.cache
def mixed_class(stock: type[nn.Module]) -> type[nn.Module]:
    """
    The class of a mixer or norm that combines states, made at its first use; any other class itself.

    Args:
        stock (`type`): A class of transformers.
    """
    mixin = _mixin(stock.__name__)
    if mixin is None:
        return stock
    doc = f"`{stock.__name__}` of transformers that combines states; see `{mixin.__name__}`."
    namespace = {"__module__": __name__, "__doc__": doc, "stock_class": stock}
    return type(PREFIX + stock.__name__, (mixin, stock), namespace)


def _mixin(name: str) -> type | None:
    row = family_of(name)
    if row is None or name in row.configs:
        return None
    if name == row.norm:
        return MixedNorm
    if row.has_fused_training:
        return UnfusedTraining
    kinds = {
        "delta_rule": MixedDeltaRule,
        "kimi_delta": MixedKimiDelta,
        "lightning": MixedLightning,
        "multi_head": MixedMultiHead,
        "scan": MixedScan,
    }
    return kinds.get(row.kind)


def mixing_sites(mixer: nn.Module) -> list[tuple[nn.Module, str]]:
    """
    The modules and names of the parameters that mix B and C, in this order, whether they are there or not.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers; one that folds its readout has none.
    """
    row = family_of_mixer(type(mixer))
    if row is None or row.kind == "folded":
        return []
    if row.kind == "normed":
        return [(mixer.b_layernorm, "mixing"), (mixer.c_layernorm, "mixing")]
    return [(mixer, "input_mixing"), (mixer, "readout_mixing")]


def mixing_groups(mixer: nn.Module) -> int | None:
    """
    How many pairs of mixing matrices a mixer has; None where they have no axis for it.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers.
    """
    row = family_of_mixer(type(mixer))
    return None if row is None or row.groups_name is None else getattr(mixer, row.groups_name)


def mixed_classes(mixer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """
    The modules whose class changes when a mixer gets mixed, each with its new class.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers.
    """
    modules = [mixer, *dict.fromkeys(module for module, _ in mixing_sites(mixer) if module is not mixer)]
    changes = [(module, mixed_class(type(module))) for module in modules]
    return [(module, cls) for module, cls in changes if cls is not type(module)]


def stock_classes(mixer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """
    The modules of a mixed mixer and the classes of transformers that they had before; empty for a stock one.

    Args:
        mixer (`torch.nn.Module`): A mixer.
    """
    modules = [mixer, *(module for module, _ in mixing_sites(mixer) if module is not mixer)]
    return [(module, type(module).stock_class) for module in modules if hasattr(type(module), "stock_class")]


def mix(mixer: nn.Module, size: int) -> None:
    """
    Make a stock mixer a mixed one, in place, that keeps its first states.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers.
        size (`int`): The number of states after the mixing.
    """
    row = family_of_mixer(type(mixer))
    N, groups, like = getattr(mixer, row.size_name), mixing_groups(mixer), next(mixer.parameters())
    for module, cls in mixed_classes(mixer):
        module.__class__ = cls
    for module, name in mixing_sites(mixer):
        kept = torch.eye(N, size, dtype=like.dtype, device=like.device)
        module.register_parameter(name, nn.Parameter(kept if groups is None else kept.repeat(groups, 1, 1)))
    if row.kind == "normed":
        mixer.A_log = nn.Parameter(mixer.A_log.detach()[:, :size].clone())


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(PREFIX)
    if stock == name or _mixin(stock) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return mixed_class(family_of(stock).class_named(stock))
