"""The recurrence of xLSTM's mLSTM: its arguments, and how it is watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops import is_transformed, mlstm_adjoint_gramian, mlstm_state_gramian
from .inputs import ScanInputs

if TYPE_CHECKING:
    from ..contract import ScanObserver

# The arguments of the recurrence by transformers' names, and by those of the package `xlstm`.
_NAMES = {"query": "q", "key": "k", "value": "v", "igate": "i", "fgate": "f"}


@dataclass(frozen=True)
class MLSTMInputs(ScanInputs):
    r"""
    An mLSTM, \\( S_t = \sigma(f_t) S_{t-1} + e^{i_t} k_t (v_t, 1)^\top \\), whose last column is the normaliser.

    States and adjoint states are those of the scaled state that is carried, see `ops/mlstm_gramians.py`.

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): The values v.
        input_gate (`torch.Tensor` of shape `(batch, length, heads)`): i, before its exponential.
        forget_gate (`torch.Tensor` of shape `(batch, length, heads)`): f, before its sigmoid.
        B (`torch.Tensor` of shape `(batch, length, heads, N)`): The keys k.
        C (`torch.Tensor` of shape `(batch, length, heads, N)`): The queries q, after their scale.
        output (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): h.
        eps (`float`): What is added to the denominator.
        part (`int`, *optional*): Which of a layer's scans it is.
    """

    u: Tensor
    input_gate: Tensor
    forget_gate: Tensor
    B: Tensor
    C: Tensor
    output: Tensor
    eps: float
    part: int | None = None

    @property
    def rows(self) -> int:
        """Sequences times steps times the columns of a head's state."""
        return self.u.shape[0] * self.u.shape[1] * (self.u.shape[-1] + 1)

    @property
    def states_per_sequence(self) -> int:
        """How many numbers the state of one sequence holds, without m."""
        return self.u.shape[2] * (self.u.shape[-1] + 1) * self.state_size

    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """P, `(heads, N, N)`, and the readout energy, `(heads, N)`."""
        return mlstm_state_gramian(self.u, self.input_gate, self.forget_gate, self.B, self.C, times=times)

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """Q, `(heads, N, N)`."""
        gates = (self.input_gate, self.forget_gate)
        return mlstm_adjoint_gramian(*gates, self.B, self.C, self.output, grad_output, self.eps, times=times)


@contextmanager
def watching_mlstm(module: nn.Module, observer: ScanObserver) -> Iterator[None]:
    """
    Show the recurrence of a layer to an observer while the context is open.

    Args:
        module (`torch.nn.Module`): A layer whose recurrence is its module `mlstm_backend`, called with names.
        observer ([`~architectures.contract.ScanObserver`]): Is asked at each pass.
    """

    def show(backend: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        # What is traced or transformed holds no values that could be measured.
        if torch.compiler.is_compiling() or is_transformed():
            return result
        h, *others = result if isinstance(result, tuple) else (result,)
        query, key, value, i, f = (
            kwargs[name if name in kwargs else short].transpose(1, 2) for name, short in _NAMES.items()
        )
        inputs = MLSTMInputs(value, i, f, key, query * query.shape[-1] ** -0.5, h.transpose(1, 2), backend.config.eps)
        h = observer.observe(inputs, inputs.output).transpose(1, 2)
        return (h, *others) if isinstance(result, tuple) else h

    handle = module.mlstm_backend.register_forward_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
