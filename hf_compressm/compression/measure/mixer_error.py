"""How far the module of a cut layer is from what it gave before the cut, for the matrices that it is given."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...architectures import StateAxis, StateSpaceLayer
from ..processes import Processes


@dataclass(frozen=True)
class Wanted:
    """
    What a layer's module gave in one pass, for some of its sequences.

    Args:
        sequences (`torch.Tensor` of shape `(K,)`, int64): Which ones.
        output (`torch.Tensor` of shape `(K, length, width)`): The output, single precision.
        weight (`torch.Tensor` of shape `(K, length)`): What an error there counts.
        held_out (`torch.BoolTensor` of shape `(K, length)`): The steps that judge a fit.
        shape (`tuple[int, ...]`): The shape of all of the output.
    """

    sequences: Tensor
    output: Tensor
    weight: Tensor
    held_out: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """
    How the module of a cut layer is called, with what it should give.

    Args:
        args (`tuple`): What it gets by position, for the sequences that are kept.
        kwargs (`dict[str, Any]`): What it gets by name, likewise.
        wanted ([`Wanted`]): What it gave before the cut.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: Wanted


class MixerError:
    """
    The error of a copy of a layer's module with other matrices, over all calls and processes.

    Called with matrices, it returns the error relative to the energy of the wanted outputs, that of the held-out steps,
    and the gradient of the first by each matrix, zero where an entry belongs to no state.

    Args:
        layer (`StateSpaceLayer`): The cut layer.
        parameters (`Mapping[str, nn.Parameter]`): Those whose matrices are fitted, by path.
        calls (`list[Call]`, *optional*): The calls in this process; without them the error is not a number.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
    """

    def __init__(
        self,
        layer: StateSpaceLayer,
        parameters: Mapping[str, nn.Parameter],
        calls: list[Call] | None,
        processes: Processes,
    ) -> None:
        dtype = precision_of(layer.module)
        self._module = copy.deepcopy(layer.module).requires_grad_(False).to(dtype)
        self._calls, self._processes = calls, processes
        self._axes = {path: layer.layout.by_name[path] for path in parameters}
        self._moved = [_state_entries(axis, layer.state_size) for axis in self._axes.values()]
        written = [parameter.detach().to(dtype) for parameter in parameters.values()]
        self.start = [M if states_are_last(axis) else M.mT for axis, M in zip(self._axes.values(), written)]
        energies = torch.zeros(2, dtype=torch.float64)
        for call in calls or []:
            energies += _by_part(call.wanted, call.wanted.output).detach().cpu()
        self._energies = processes.sum(energies).clamp_min(torch.finfo(torch.float64).tiny)

    def as_written(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Matrices as the parameters hold them: the states along the axis where these have them."""
        return [M if states_are_last(axis) else M.mT for axis, M in zip(self._axes.values(), matrices)]

    def __call__(self, matrices: list[Tensor]) -> tuple[float, float, list[Tensor]]:
        leaves = [matrix.detach().requires_grad_(True) for matrix in matrices]
        errors, slopes = torch.zeros(2, dtype=torch.float64), [torch.zeros_like(leaf) for leaf in leaves]
        if self._calls is None:
            errors += torch.nan
        for call in self._calls or []:
            with torch.enable_grad():
                values = dict(zip(self._axes, self.as_written(leaves)))
                output = functional_call(self._module, values, call.args, call.kwargs)
                parts = _by_part(call.wanted, tensor_of(output) - call.wanted.output)
                gradients = torch.autograd.grad(parts[0], leaves)
            errors += parts.detach().cpu()
            slopes = [total + new for total, new in zip(slopes, gradients)]
        flat = self._processes.sum(torch.cat([errors, *(slope.double().flatten().cpu() for slope in slopes)]))
        error, held_out = (flat[:2] / self._energies).tolist()
        pieces = (flat[2:] / self._energies[0]).split([leaf.numel() for leaf in leaves])
        slopes = [piece.view(leaf.shape).to(leaf) for piece, leaf in zip(pieces, leaves)]
        return error, held_out, [slope * moved.to(slope) for slope, moved in zip(slopes, self._moved)]


def _by_part(wanted: Wanted, values: Tensor) -> Tensor:
    """The weighted squares of what is fitted, and of what is held out, `(2,)` float64."""
    squares = wanted.weight * values.float().square().sum(-1)
    return torch.stack([squares[~wanted.held_out].sum(), squares[wanted.held_out].sum()]).double()


def tensor_of(output: Any) -> Tensor:
    """The first of what a module gives."""
    return output[0] if isinstance(output, tuple) else output


def precision_of(module: nn.Module) -> torch.dtype:
    """In which a module is fitted: that of its parameters, at least single."""
    return torch.promote_types(next(module.parameters()).dtype, torch.float32)


def states_are_last(axis: StateAxis) -> bool:
    """Whether the states of a matrix lie along its last axis, and what it multiplies along the one before."""
    return axis.axis == len(axis.others)


def _state_entries(axis: StateAxis, size: int) -> Tensor:
    """One where an entry along an axis is a state's, zero where it belongs to something else."""
    moved = torch.ones(axis.length(size))
    moved[axis.kept(torch.empty(0, dtype=torch.int64), size)] = 0
    return moved
