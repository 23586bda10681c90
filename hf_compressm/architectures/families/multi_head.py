r"""
What Mamba-2 and its kin share: a mixer with one decay a head, and B and C a group of heads.

`in_proj` makes, in this order, the gate and input, B (groups x N), C (groups x N) and the time steps (heads); input, B
and C then pass a depthwise convolution. A does not depend on the state, so what depends on N are the rows of `in_proj`
and the channels of `conv1d` that belong to B and C. Between them and the scan stands an activation, so stock weights
hold selections only; each group keeps its own states, in one number.

Source of the layer: Dao and Gu, 2024, "Transformers are SSMs" (arXiv 2405.21060), sections 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..changes import AttributeChange, LayerReduction, ParameterChange
from ..moment_maps.axis import AxisSelection
from ..parameters import successor
from ..scans.multi_head import register_chunk_scan
from .mixable import MixableLayer
from .selective import STATE_SIZE_NAMES, named_size

# The names of transformers and of mamba-ssm for the same sizes.
_GROUPS_NAMES = ("n_groups", "ngroups")
_HEADS_NAMES = ("num_heads", "nheads")
# Attributes of the convolution that tell its number of channels.
_CHANNEL_COUNTS = ("in_channels", "out_channels", "groups")


class MultiHeadLayer(MixableLayer):
    """A mixer of Mamba-2's form, seen as one state-space system a group of heads."""

    required_parts = ("A_log", "D", "dt_bias", "in_proj", "conv1d")
    cut_projections = {"in_proj": nn.Linear, "conv1d": nn.Conv1d}
    adaptable_projections = frozenset({"in_proj"})

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection, and without `stock` what a mixed layer can hold."""
        return frozenset({"selection"} if stock else {"balanced", "interpolative", "selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Balanced truncation in a mixed layer; selection with `stock`."""
        return "selection" if stock else "balanced"

    @property
    def groups(self) -> int:
        """How many groups of heads there are, each with its own B and C."""
        return getattr(self.module, named_size(self.module, _GROUPS_NAMES))

    @property
    def heads(self) -> int:
        """How many heads there are, each with its own decay and time step."""
        return getattr(self.module, named_size(self.module, _HEADS_NAMES))

    def _stock_parameters(self) -> dict[str, nn.Parameter]:
        """The weights, and biases where there are any, of `in_proj` and `conv1d`."""
        names = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias")
        found = {name: getattr(getattr(self.module, name[: name.index(".")]), name[name.index(".") + 1 :], None)
                 for name in names}  # fmt: skip
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def _saved_projected_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that the rows of `in_proj` or `conv1d` in a state dict tell."""
        counts = self._counts(0)
        for name in ("in_proj", "conv1d"):
            if f"{prefix}{name}.weight" in state_dict:
                size, rest = divmod(state_dict[f"{prefix}{name}.weight"].shape[0] - counts[name], 2 * self.groups)
                return size if rest == 0 else None
        return None

    def _stock_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `in_proj` and `conv1d` at a state size."""
        counts = self._counts(size)
        shapes = {name: (counts[name[: name.index(".")]],) for name in ("in_proj.bias", "conv1d.bias")}
        shapes["in_proj.weight"] = (counts["in_proj"], self.module.in_proj.in_features)
        shapes["conv1d.weight"] = (counts["conv1d"], *self.module.conv1d.weight.shape[1:])
        return shapes

    def _stock_changes(self, size: int) -> list[AttributeChange]:
        """The mixer's state size, the rows of `in_proj` and the channels of the convolution."""
        module, counts = self.module, self._counts(size)
        changes = [AttributeChange(module.in_proj, "out_features", counts["in_proj"])]
        changes += [AttributeChange(module.conv1d, name, counts["conv1d"]) for name in _CHANNEL_COUNTS]
        if hasattr(module, "conv_dim"):
            changes.append(AttributeChange(module, "conv_dim", counts["conv1d"]))
        return [AttributeChange(module, named_size(module, STATE_SIZE_NAMES), size), *changes]

    def _counts(self, size: int) -> dict[str, int]:
        """How many rows `in_proj` and channels `conv1d` have at a projected size."""
        difference = 2 * self.groups * (size - self.projected_size)
        return {
            "in_proj": self.module.in_proj.out_features + difference,
            "conv1d": self.module.conv1d.out_channels + difference,
        }

    @property
    def mixing_groups(self) -> int:
        """One pair of mixing matrices for each group of heads."""
        return self.groups

    def _beside(self) -> nn.Parameter:
        return self.module.in_proj.weight

    def _selected(self, kept: Tensor, squares: Tensor | None) -> LayerReduction:
        """The reduction that keeps some of the states of each group. kept: (groups, r), or (r,) for all groups."""
        kept = kept.expand(self.groups, -1)
        size = kept.shape[-1]
        rows = self._kept_rows(kept)
        changes = []
        for name, old in self._stock_parameters().items():
            picked = rows[name[: name.index(".")]]
            changes.append(ParameterChange(old, successor(old, old[picked]), AxisSelection(0, picked, len(old))))
        return LayerReduction(self, changes, self._stock_changes(size), size)

    def _kept_rows(self, kept: Tensor) -> dict[str, Tensor]:
        """The rows of `in_proj` and `conv1d` that stay when the groups keep these entries of B and C."""
        module, N, width = self.module, self.projected_size, self.groups * self.projected_size
        offsets = torch.arange(self.groups, device=kept.device)[:, None] * N
        inside = (offsets + kept).flatten()
        ends = {"in_proj": module.in_proj.out_features - self.heads, "conv1d": module.conv1d.out_channels}
        rows = {}
        for name, end in ends.items():
            before = torch.arange(end - 2 * width, device=kept.device)
            after = torch.arange(end, getattr(module, name).weight.shape[0], device=kept.device)
            rows[name] = torch.cat([before, end - 2 * width + inside, end - width + inside, after])
        return rows


# Layers of all of these families that mix states run through one forward pass of this library.
register_chunk_scan("hf_compressm.models.compressed.mixed_multi_head")
