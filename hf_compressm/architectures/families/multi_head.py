r"""
What Mamba-2 and its relatives share: a mixer with one decay a head, and B and C a group of heads.

`in_proj` makes, in this order, the gate and input, B (groups x N), C (groups x N) and the time steps (heads); input, B
and C then pass a depthwise convolution. A does not depend on the state, so what depends on N are the rows of `in_proj`
and the channels of `conv1d` that belong to B and C. Between them and the scan stands an activation, so stock weights
hold selections only; each group keeps its own states, in one number.

Source of the layer: Dao and Gu, 2024, "Transformers are SSMs" (arXiv 2405.21060), sections 6 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..scans.inputs import ScanInputs
from ..scans.multi_head import register_chunk_scan
from ..state_layout import SizeAttribute, StateAxis, StateLayout, attribute_at, runs
from .narrowable import NarrowableLayer, ShowProjections
from .selective import named_size

# The names of transformers and of mamba-ssm for the same sizes.
_GROUPS_NAMES = ("n_groups", "ngroups")
_HEADS_NAMES = ("num_heads", "nheads")
# Attributes of the convolution that hold its number of channels.
_CHANNEL_COUNTS = ("in_channels", "out_channels", "groups")


class MultiHeadLayer(NarrowableLayer):
    """A mixer of Mamba-2's form, seen as one state-space system a group of heads."""

    required_parts = ("A_log", "D", "dt_bias", "in_proj", "conv1d")
    cut_projections = {"in_proj": nn.Linear, "conv1d": nn.Conv1d}
    adaptable_projections = frozenset({"in_proj"})

    @property
    def groups(self) -> int:
        """How many groups of heads there are, each with its own B and C."""
        return getattr(self.module, named_size(self.module, _GROUPS_NAMES))

    @property
    def heads(self) -> int:
        """How many heads there are, each with its own decay and time step."""
        return getattr(self.module, named_size(self.module, _HEADS_NAMES))

    @property
    def stock_layout(self) -> StateLayout:
        """The rows of `in_proj` and the channels of `conv1d`, with the attributes that count them."""
        module = self.module
        B_and_C = (*runs("B", self.groups), *runs("C", self.groups))
        width = 2 * self.groups * self.projected_size
        before = module.in_proj.out_features - width - self.heads
        rows = (before, *B_and_C, self.heads)
        channels = (module.conv1d.out_channels - width, *B_and_C)
        axes = [
            StateAxis("in_proj.weight", 0, rows, others=(module.in_proj.in_features,)),
            StateAxis("in_proj.bias", 0, rows),
            StateAxis("conv1d.weight", 0, channels, others=tuple(module.conv1d.weight.shape[1:])),
            StateAxis("conv1d.bias", 0, channels),
        ]
        counted = [("in_proj", "out_features", rows), *(("conv1d", name, channels) for name in _CHANNEL_COUNTS)]
        counted += [("", "conv_dim", channels)] if hasattr(module, "conv_dim") else []
        return StateLayout(
            tuple(axis for axis in axes if attribute_at(module, axis.parameter) is not None),
            (self.size_attribute, *(SizeAttribute(*each) for each in counted)),
        )

    @contextmanager
    def projections_shown(self, show: ShowProjections) -> Iterator[None]:
        """
        While the context is open, each forward pass shows B and C behind their activation, before they are mixed.

        Args:
            show (`Callable`): Gets both, `(batch, length, groups, N)`.
        """
        if not self.is_mixed:
            with self.observed(_ShownScan(show)):
                yield
            return
        module, stock, found = self.module, self.module._mix, []

        def mix(entries: Tensor, mixing: Tensor) -> Tensor:
            # B first, then C.
            found.append(entries.unflatten(-1, (self.groups, self.projected_size)))
            if len(found) == 2:
                show(*found)
                found.clear()
            return stock(entries, mixing)

        module._mix = mix
        try:
            yield
        finally:
            del module._mix

    def entries_of(self, projected: Tensor, side: int, kept: Tensor | None = None) -> Tensor:
        """
        Those of the kept rows, `(groups, K, M)`: nothing couples the rows behind the projections.

        Args:
            projected (`torch.Tensor` of shape `(K, groups, N)`): What all rows give.
            side (`int`): 0 for B, 1 for C.
            kept (`torch.Tensor` of shape `(groups, M)`, int64, *optional*): The rows; all when unset.
        """
        entries = projected.movedim(0, -2)
        return entries if kept is None else entries.take_along_dim(kept.to(entries.device).unsqueeze(-2), dim=-1)


class _ShownScan:
    """Shows the B and C of a scan to a function, and leaves its output as it is."""

    def __init__(self, show: ShowProjections) -> None:
        self._show = show

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        self._show(inputs.B, inputs.C)
        return output


# Layers of all of these families that mix states run through one forward pass of this library.
register_chunk_scan("hf_compressm.models.compressed.mixed_multi_head")
