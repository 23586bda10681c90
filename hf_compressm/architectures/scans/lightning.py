"""How lightning attention is watched: by what goes into its projection and into the norm behind its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.compressed.mixed_lightning import stock_queries_keys_values
from ...ops import is_transformed
from .multi_head import MultiHeadScanInputs

if TYPE_CHECKING:
    from ..contract import ScanObserver


@contextmanager
def watching_lightning(module: nn.Module, observer: ScanObserver) -> Iterator[None]:
    r"""
    Show the attention of a layer to an observer while the context is open, stock or mixed.

    The stock forward pass calls no function for it that could be replaced. Its inputs follow from what `qkv_proj`
    gives, and its output is what `norm` gets. In the terms of a scan of Mamba-2, values are the input, keys B and
    queries C, every time step is one, and a head's \\( \lambda \\) is \\( e^{A} \\).

    Args:
        module (`torch.nn.Module`): A layer of lightning attention.
        observer ([`~architectures.contract.ScanObserver`]): Is asked at each pass.
    """
    seen: dict[str, Any] = {}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["mask"] = dict(zip(("hidden_states", "position_embeddings", "attention_mask"), args), **kwargs).get(
            "attention_mask"
        )

    def project(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["projected"] = output

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        # What is traced or transformed holds no values that could be measured.
        if torch.compiler.is_compiling() or is_transformed():
            return None
        inputs = lightning_inputs(module, seen.pop("projected"), seen.pop("mask"))
        output = args[0].unflatten(-1, inputs.u.shape[2:])
        return (observer.observe(inputs, output).flatten(2),)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.qkv_proj.register_forward_hook(project),
        module.norm.register_forward_pre_hook(read),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lightning_inputs(module: nn.Module, projected: Tensor, attention_mask: Tensor | None) -> MultiHeadScanInputs:
    """
    The attention of a layer as a scan.

    Args:
        module (`torch.nn.Module`): A layer of lightning attention, stock or mixed.
        projected (`torch.Tensor` of shape `(batch, length, heads * 3 * N)`): What its `qkv_proj` gives.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.
    """
    if hasattr(module, "queries_keys_values"):
        query, key, value = module.queries_keys_values(projected, attention_mask)
    else:
        query, key, value = stock_queries_keys_values(module, projected, attention_mask)
    return MultiHeadScanInputs(
        u=value, delta=value.new_ones(value.shape[:3]), A=-module.slope_rate.flatten(), B=key, C=query
    )
