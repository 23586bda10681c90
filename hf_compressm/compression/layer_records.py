"""What one check saw in each layer, or a return left there, as its record keeps it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..architectures import StateForm, StateSpaceLayer
from .costs import state_bytes_at
from .decide.plan import LayerPlan
from .decide.truncations import Found
from .history import CheckRecord, LayerRecord
from .measure.layer_gramians import LayerGramians

logger = logging.getLogger(__name__)


@dataclass
class Seen:
    """
    What a check measured, by layer name.

    Args:
        gramians (`Mapping[str, LayerGramians]`): The Gramians before the cut.
        spectra (`Mapping[str, torch.Tensor]`): The Hankel singular values before the cut, `(N,)`, descending.
        scores (`dict[str, torch.Tensor]`): The states' scores, `(N,)`: before the cut, and once it is noted after it.
        correlations (`Mapping[str, float]`): The rank correlation of the states' order with that of the check before;
            None where nothing could be compared.
        state_bytes (`Mapping[str, int]`): Memory of the recurrent state of one sequence.
        forms (`Mapping[str, StateForm]`): State size and projected size before the cut.
    """

    gramians: Mapping[str, LayerGramians]
    spectra: Mapping[str, Tensor]
    scores: dict[str, Tensor]
    correlations: Mapping[str, float | None]
    state_bytes: Mapping[str, int | None] = field(default_factory=dict)
    forms: Mapping[str, StateForm] = field(default_factory=dict)
    lost_energy: dict[str, float | None] = field(default_factory=dict, init=False)
    output_errors: Mapping[str, float] = field(default_factory=dict, init=False)

    def note_cut(self, cut: Mapping[str, Found], output_errors: Mapping[str, float]) -> None:
        """
        Take note of what was done.

        Args:
            cut (`Mapping[str, Found]`): What the layers that were cut were cut with.
            output_errors (`Mapping[str, float]`): The relative errors of layers' outputs, where they were measured.
        """
        for name, item in cut.items():
            self.scores[name] = self.gramians[name].scores_after(item.truncation).flatten().cpu()
            self.lost_energy[name] = self.gramians[name].lost_energy(item.by_gramians)
        self.output_errors = output_errors


def layer_records(
    layers: Sequence[StateSpaceLayer], plan: Mapping[str, LayerPlan], seen: Seen, cut: Mapping[str, Found]
) -> list[LayerRecord]:
    """
    The record of every layer that the check planned for.

    Args:
        layers (`Sequence[StateSpaceLayer]`): The layers.
        plan (`Mapping[str, LayerPlan]`): What the check wanted of each.
        seen ([`Seen`]): What it measured.
        cut (`Mapping[str, Found]`): What the layers that were cut were cut with.
    """
    records = []
    for layer in [layer for layer in layers if layer.name in plan]:
        sigma, layer_plan = seen.spectra[layer.name], plan[layer.name]
        size_after = layer_plan.new_size if layer.name in cut else layer_plan.size
        tail, total = float(sigma[size_after:].sum()), float(sigma.sum())
        state_bytes = seen.state_bytes.get(layer.name)
        records.append(
            LayerRecord(
                name=layer.name,
                family=layer.family,
                size_before=layer_plan.size,
                size_after=size_after,
                wanted_size=layer_plan.wanted,
                hankel_singular_values=sigma.tolist(),
                tail=tail,
                tail_share=tail / total if total else 0.0,
                rank_correlation=seen.correlations[layer.name],
                state_scores=seen.scores[layer.name].tolist(),
                lost_energy=seen.lost_energy.get(layer.name),
                output_error=seen.output_errors.get(layer.name) if layer.name in cut else None,
                reductor=cut[layer.name].reductor if layer.name in cut else None,
                gramians=cut[layer.name].gramians if layer.name in cut else None,
                readout_fitted=cut[layer.name].is_fitted if layer.name in cut else None,
                state_bytes_before=state_bytes,
                state_bytes_after=state_bytes_at(size_after, layer_plan.size, state_bytes),
                **_rows(layer, seen.forms.get(layer.name)),
            )
        )
    return records


def records_of_return(layers: Sequence[StateSpaceLayer], forms_before: Mapping[str, StateForm]) -> list[LayerRecord]:
    """
    The record of every layer after a cut was taken back, when nothing was measured.

    Args:
        layers (`Sequence[StateSpaceLayer]`): The layers, at the sizes that they have again.
        forms_before (`Mapping[str, StateForm]`): Their forms while the cut stood.
    """
    return [
        LayerRecord(
            layer.name,
            layer.family,
            forms_before[layer.name].size,
            layer.state_size,
            layer.state_size,
            [],
            0.0,
            0.0,
            **_rows(layer, forms_before[layer.name]),
        )  # fmt: skip
        for layer in layers
    ]


def forms_of(layers: Sequence[StateSpaceLayer]) -> dict[str, StateForm]:
    """State size and projected size of each layer, by name."""
    return {layer.name: layer.form for layer in layers}


def _rows(layer: StateSpaceLayer, before: StateForm | None) -> dict[str, int]:
    """Rows of the projections before and now, of a layer that can give some up."""
    known = layer.narrows and before is not None
    return {"rows_before": before.projected, "rows_after": layer.projected_size} if known else {}


def warn_of_added_parameters(record: CheckRecord, layers: Sequence[StateSpaceLayer]) -> None:
    """
    Warn where a cut made a model larger, as a mixed form can.

    Args:
        record ([`CheckRecord`]): The record of a check.
        layers (`Sequence[StateSpaceLayer]`): The layers that may be cut.
    """
    added = record.parameters_after - record.parameters_before
    if record.outcome == "cut" and added > 0:
        logger.warning(
            "the cut adds %s parameters: two small matrices a layer bring what the projections give to fewer states. "
            "The recurrent state and the scan are smaller, the weights are not; a smaller state size adds fewer%s%s.",
            f"{added:,}",
            ", projection_rows takes some from the projections" if all(layer.narrows for layer in layers) else "",
            ", and stock=True adds none" if all(layer.reductors(stock=True) for layer in layers) else "",
        )  # fmt: skip
