"""What a model would be at several state sizes: loss, parameters, memory of the recurrent state, time of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..architectures import StateSpaceLayer
from ..errors import ConfigurationError
from .attempt import CutMaker
from .costs import state_costs, training_step_seconds
from .decide.plan import plan_of_ranks
from .decide.progress import Stage


@dataclass(frozen=True)
class SizeRow:
    """
    What a model is at one state size, in the form that a cut would really make.

    Args:
        state_size (`int`): States of every layer (or fewer, where a layer has fewer).
        loss (`float`, *optional*): Mean loss on batches that the cut was not made with; unset where the cut cannot be
            made or gives no finite loss.
        parameters (`int`): Parameters of the whole model.
        state_bytes (`int`, *optional*): Memory of the recurrent states of one sequence, all layers together.
        step_seconds (`float`, *optional*): Median duration of a forward and a backward pass.
    """

    state_size: int
    loss: float | None
    parameters: int
    state_bytes: int | None
    step_seconds: float | None


def measure_sizes(
    maker: CutMaker,
    layers: Sequence[StateSpaceLayer],
    sizes: Sequence[int],
    loss_now: Callable[[], float],
    batch: Any,
) -> list[SizeRow]:
    """
    Cut a model to several sizes, measure each and take each back; the first row is the model as it is.

    Args:
        maker ([`~compression.attempt.CutMaker`]): Makes the truncations.
        layers (`Sequence[StateSpaceLayer]`): The layers that are cut.
        sizes (`Sequence[int]`): State sizes.
        loss_now (`Callable`): Returns the loss of the model as it is, on batches that no truncation was made with.
        batch (`object`): One batch, to time a step with where it is a mapping.

    Raises:
        [`~errors.ConfigurationError`]: a size is not a whole number below the present one.
    """
    present = {layer.name: layer.state_size for layer in layers}
    largest = max(present.values())
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < largest:
            raise ConfigurationError(f"sizes has {size!r}; the model has {largest} states, so give 1 to {largest - 1}.")
    model = maker.state.model
    rows = [_row(model, layers, largest, loss_now, batch)]
    config = replace(maker.config, minimum_reduction=0.0, multiple_of=1, min_state_size=1)
    for size in sorted(set(sizes), reverse=True):
        made = maker.make(plan_of_ranks(dict.fromkeys(present, size), present, config, Stage()))
        if made.failures:
            rows.append(SizeRow(size, None, sum(p.numel() for p in model.parameters()), None, None))
        else:
            measure = lambda size=size: _row(model, layers, size, loss_now, batch)  # noqa: E731
            rows.append(maker.with_cut(made, measure))
    return rows


def _row(
    model: nn.Module,
    layers: Sequence[StateSpaceLayer],
    size: int,
    loss_now: Callable[[], float],
    batch: Any,
) -> SizeRow:
    loss = loss_now()
    named = batch if isinstance(batch, Mapping) else None
    costs = [cost.state_bytes for cost in state_costs(model, layers, named).values()]
    return SizeRow(
        state_size=size,
        loss=loss if math.isfinite(loss) else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=None if None in costs else sum(costs),
        step_seconds=None if named is None else training_step_seconds(model, named),
    )
