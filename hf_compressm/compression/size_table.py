"""What a model would be at several state sizes: loss, parameters, memory of the recurrent state, time of a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..architectures import StateSpaceLayer
from ..errors import ConfigurationError
from .attempt import CutMaker
from .costs import state_bytes_at
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


def require_sizes(sizes: Sequence[int], layers: Sequence[StateSpaceLayer]) -> None:
    """
    Check the sizes of a table.

    Args:
        sizes (`Sequence[int]`): State sizes.
        layers (`Sequence[StateSpaceLayer]`): The layers that would be cut.

    Raises:
        [`~errors.ConfigurationError`]: a size is not a whole number below the present one, or none that the model's
            cache takes.
    """
    multiple = math.lcm(*(layer.cache_multiple for layer in layers))
    largest = max(layer.state_size for layer in layers)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < largest:
            raise ConfigurationError(f"sizes has {size!r}; the model has {largest} states, so give 1 to {largest - 1}.")
        if size % multiple:
            raise ConfigurationError(f"sizes has {size}, and the model's cache takes only multiples of {multiple}.")


def measure_sizes(
    maker: CutMaker,
    layers: Sequence[StateSpaceLayer],
    sizes: Sequence[int],
    loss_now: Callable[[], float],
    time_step: Callable[[], float | None] | None,
) -> list[SizeRow]:
    """
    Cut a model to several sizes, measure each and take each back; the first row is the model as it is.

    Args:
        maker ([`~compression.attempt.CutMaker`]): Makes the truncations.
        layers (`Sequence[StateSpaceLayer]`): The layers that are cut.
        sizes (`Sequence[int]`): State sizes, as [`require_sizes`] wants them.
        loss_now (`Callable`): Returns the loss of the model as it is, on batches that no truncation was made with.
        time_step (`Callable`, *optional*): Returns the seconds of a training step of the model as it is.
    """
    present = {layer.name: layer.state_size for layer in layers}
    model, largest = maker.state.model, max(present.values())

    def row(size: int) -> SizeRow:
        known = [state_bytes_at(min(size, n), n, maker.state_bytes.get(name)) for name, n in present.items()]
        loss = loss_now()
        return SizeRow(
            state_size=size,
            loss=loss if math.isfinite(loss) else None,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            state_bytes=None if None in known else sum(known),
            step_seconds=None if time_step is None else time_step(),
        )

    rows = [row(largest)]
    config = replace(maker.config, minimum_reduction=0.0, multiple_of=1, min_state_size=1)
    for size in sorted(set(sizes), reverse=True):
        made = maker.make(plan_of_ranks(dict.fromkeys(present, size), present, config, Stage()))
        if made.failures:
            rows.append(SizeRow(size, None, rows[0].parameters, None, None))
        else:
            rows.append(maker.with_cut(made, functools.partial(row, size)))
    return rows
