"""Which rows the projections of mixed layers keep: how many, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import (
    KeptRows,
    MeasuredTruncation,
    NarrowableLayer,
    ProjectionRows,
    StateSpaceLayer,
    row_multiple,
)
from ...config import CompreSSMConfig
from ...errors import TruncationError
from ...systems import Truncation, interpolative_truncation, reconstruction, registered_reductors
from ..history import CheckRecord
from ..measure.layer_gramians import LayerGramians
from ..measure.model_pass import LossFunction
from ..measure.projected_entries import ProjectedEntries, sample_projections
from .chosen import Chosen
from .plan import LayerPlan


def rows_to_keep(
    layer: StateSpaceLayer, state_size: int, wanted: float | int | None, records: Sequence[CheckRecord] = ()
) -> int | None:
    """
    How many rows the projections of a layer shall have at a state size, or None where they stay as they are.

    At least one more than states: a layer mixes where it has more rows than states. Rows are rounded up to what the
    kernels of a convolution take.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
        state_size (`int`): The state size that it gets.
        wanted (`float` or `int`, *optional*): `CompreSSMConfig.projection_rows`.
        records (`Sequence[CheckRecord]`, *optional*): What happened before in the run: a share is one of the rows at
            its start.
    """
    if wanted is None or not layer.narrows:
        return None
    seen = (entry for record in records for entry in record.layers if entry.name == layer.name)
    original = next((entry.rows_before for entry in seen if entry.rows_before is not None), layer.projected_size)
    rows = math.ceil(round(wanted * original, 6)) if isinstance(wanted, float) else wanted
    multiple = row_multiple(layer)
    rows = math.ceil(max(rows, state_size + 1) / multiple) * multiple
    return rows if rows < layer.projected_size else None


@torch.no_grad()
def choose_rows(
    layer: NarrowableLayer, entries: ProjectedEntries, gramians: LayerGramians, truncation: Truncation, count: int
) -> ProjectionRows:
    r"""
    The rows from which what the mixing reads can be rebuilt with the least loss, for B and for C.

    An error \\( e \\) in the mixed B is one in what is written to the state, which the loss feels as \\( e^\top Q_r e
    \\) with the observability Gramian of the mixed state; one in the mixed C misreads the state, \\( e^\top P_r e \\).
    So the rows of B are an interpolative choice by \\( E[b b^\top] \\) and \\( W Q_r W^\top \\), and those of C one by
    \\( E[c c^\top] \\) and \\( T P_r T^\top \\). The other entries are then rebuilt from the kept ones by regression.

    Args:
        layer ([`NarrowableLayer`]): The layer, before its cut.
        entries ([`ProjectedEntries`]): What it projects at sampled steps.
        gramians ([`LayerGramians`]): Those of its present state.
        truncation ([`~systems.Truncation`]): What its state is cut with.
        count (`int`): Rows to keep.
    """
    sides = (entries.B, entries.C)
    kept = []
    for side, (projected, metric) in enumerate(zip(sides, _metrics(layer, gramians, truncation))):
        full = layer.entries_of(projected, side).double().cpu()
        covariance = full.mT @ full / full.shape[-2]
        indices = interpolative_truncation(covariance, metric, count).indices
        left = layer.entries_of(projected, side, indices).double().cpu()
        before = full.take_along_dim(indices.unsqueeze(-2), dim=-1)
        kept.append(KeptRows(indices, reconstruction(full, left), _gain(before, left)))
    return ProjectionRows(*kept)


def _metrics(layer: NarrowableLayer, gramians: LayerGramians, truncation: Truncation) -> list[Tensor]:
    """What an error of each projected entry of B, and of C, does; `(..., N, N)` float64."""
    W, T = (matrix.cpu() for matrix in layer.mixing_after(truncation))
    inner_T, inner_W = truncation.T.to(gramians.Q), truncation.W.to(gramians.P)
    reduced = inner_T.mT @ gramians.Q @ inner_T, inner_W.mT @ gramians.P @ inner_W
    metrics = [M @ R.cpu() @ M.mT for M, R in zip((W, T), reduced)]
    return [(metric + metric.mT) / 2 for metric in metrics]


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """What each entry is multiplied by, `(..., M)`: the regression of it as it becomes on what it was."""
    energy = before.square().sum(-2)
    return torch.where(energy > 0, (before * after).sum(-2) / torch.where(energy > 0, energy, 1), 1.0)


@dataclass(frozen=True)
class RowChoice:
    """
    Chooses the rows that the projections of a model's mixed layers keep.

    Args:
        layers (`Mapping[str, StateSpaceLayer]`): The layers, by name.
        wanted (`float` or `int`): `CompreSSMConfig.projection_rows`.
        reductors (`Mapping[str, str]`): The reductor of each layer that may be cut.
        records (`Sequence[CheckRecord]`): What happened before in the run.
        sample (`Callable`): Returns what the layers project, by name; it is called once, where rows can go.
    """

    layers: Mapping[str, StateSpaceLayer]
    wanted: float | int
    reductors: Mapping[str, str]
    records: Sequence[CheckRecord]
    sample: Callable[[], Mapping[str, ProjectedEntries]]

    @cached_property
    def _entries(self) -> Mapping[str, ProjectedEntries]:
        return self.sample()

    @classmethod
    def of(
        cls,
        chosen: Chosen,
        config: CompreSSMConfig,
        records: Sequence[CheckRecord],
        model: nn.Module,
        batches: Sequence[Any],
        loss_function: LossFunction | None,
        seed: int,
    ) -> RowChoice | None:
        """
        What chooses rows where the settings ask for fewer; None where they do not.

        Args:
            chosen ([`Chosen`]): The layers that may be cut, and their reductors.
            config ([`CompreSSMConfig`]): Its `projection_rows` is used.
            records (`Sequence[CheckRecord]`): What happened before in the run.
            model, batches, loss_function, seed: As in [`sample_projections`].
        """
        if config.projection_rows is None:
            return None
        sample = partial(sample_projections, model, chosen.layers, batches, loss_function, seed)
        layers = {layer.name: layer for layer in chosen.layers}
        return cls(layers, config.projection_rows, chosen.reductors, list(records), sample)

    def count(self, name: str, state_size: int) -> int | None:
        """The rows that a layer keeps at a state size; None where all stay, or it would not mix its states."""
        layer = self.layers[name]
        selects = registered_reductors()[self.reductors[name]].only_selects
        if not layer.is_mixed and (selects or state_size == layer.state_size):
            return None
        return rows_to_keep(layer, state_size, self.wanted, self.records)

    def narrower(self, plan: Mapping[str, LayerPlan]) -> set[str]:
        """The layers of a plan whose projections give rows up, by name."""
        return {name for name, layer in plan.items() if self.count(name, layer.new_size) is not None}

    def added_to(self, name: str, truncation: Truncation, gramians: LayerGramians) -> Truncation:
        """
        A layer's truncation with the rows that its projections keep.

        Args:
            name (`str`): The layer's name.
            truncation ([`~systems.Truncation`]): What its state is cut with.
            gramians ([`LayerGramians`]): Those of its present state.

        Raises:
            [`~errors.TruncationError`]: no calibration batch has run the layer.
        """
        count = self.count(name, truncation.state_size)
        if count is None:
            return truncation
        if name not in self._entries:
            raise TruncationError(f"what {name} projects was not seen on the calibration batches")
        known = truncation if isinstance(truncation, MeasuredTruncation) else MeasuredTruncation.of(truncation)
        return known.with_rows(choose_rows(self.layers[name], self._entries[name], gramians, truncation, count))
