"""`DiagonalLTI`: a linear time-invariant system with a diagonal state matrix, in discrete or continuous time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..errors import ConfigurationError, DimensionError
from ._validation import require_finite
from .gramians import cauchy_or_product_factor, controllability_gramian, observability_gramian
from .hankel import FINEST_RESOLUTION, HankelDecomposition
from .time_domain import TimeDomain, require_stable, require_time_domain, stable_poles

# Below this order, all digits cost less than a tenth of a second.
_LARGE_ORDER = 64


@dataclass(frozen=True, eq=False)
class DiagonalLTI:
    """A linear time-invariant system with `A = diag(lam)`, or a batch of them.

    In discrete time, as every layer of this library computes it:

        h[t] = A h[t-1] + B u[t]        y[t] = C h[t] + D u[t]

    The input reaches the state, and so the output, in the same step. The transfer function is therefore
    `G(z) = C (I - A/z)^-1 B + D = z C (zI - A)^-1 B + D`, where control texts, whose input acts one step later, write
    `C (zI - A)^-1 B + D`. Gramians and Hankel singular values are the same in both, and so is `|G - G_r|` between two
    systems with the same `D`, because `|z| = 1` on the unit circle: bounds carry over unchanged.

    In continuous time, `dh/dt = A h + B u` and `y = C h + D u`, with `G(s) = C (sI - A)^-1 B + D`.

    Leading dimensions are a batch, for example one system per channel. All tensors become complex128 on their device.

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        B (`torch.Tensor` of shape `(..., N, H_in)`): Input matrix.
        C (`torch.Tensor` of shape `(..., H_out, N)`): Output matrix.
        D (`torch.Tensor` of shape `(..., H_out, H_in)`, *optional*): Feedthrough; `None` stands for zero.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Raises:
        DimensionError: The shapes do not fit each other, or the tensors lie on different devices.
        NotFiniteError: A tensor holds NaN or infinity.
        ConfigurationError: The time domain is unknown.

    Example:

    ```python
    >>> import torch
    >>> system = DiagonalLTI(lam=torch.tensor([0.5]), B=torch.tensor([[1.0]]), C=torch.tensor([[3.0]]))
    >>> system.impulse_response(3).real.flatten()
    tensor([3.0000, 1.5000, 0.7500], dtype=torch.float64)
    >>> system.hankel_singular_values().round(decimals=6)  # |c b| / (1 - lam^2)
    tensor([4.], dtype=torch.float64)

    ```
    """

    lam: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None = None
    time_domain: TimeDomain = "discrete"

    def to(self, device: torch.device | str) -> DiagonalLTI:
        """The same system with all of its tensors on a device."""
        moved = (None if tensor is None else tensor.to(device) for tensor in (self.lam, self.B, self.C, self.D))
        return DiagonalLTI(*moved, self.time_domain)

    def __post_init__(self) -> None:
        require_time_domain(self.time_domain)
        for name in ("lam", "B", "C", "D"):
            tensor = getattr(self, name)
            if tensor is not None:
                require_finite(name, tensor)
                object.__setattr__(self, name, tensor.to(torch.complex128))
        self._require_shapes()

    def _require_shapes(self) -> None:
        if self.lam.ndim < 1 or self.B.ndim < 2 or self.C.ndim < 2 or self.order == 0:
            raise DimensionError(
                f"lam, B and C have shapes {tuple(self.lam.shape)}, {tuple(self.B.shape)} and {tuple(self.C.shape)}; "
                f"they must be (..., N), (..., N, H_in) and (..., H_out, N) with N >= 1."
            )
        batch, inputs, outputs = self.batch_shape, self.B.shape[-1], self.C.shape[-2]
        expected = {
            "B": (*batch, self.order, inputs),
            "C": (*batch, outputs, self.order),
            "D": (*batch, outputs, inputs),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise DimensionError(
                    f"{name} has shape {tuple(tensor.shape)}; with lam of shape {tuple(self.lam.shape)}, {inputs} "
                    f"inputs and {outputs} outputs it must be {shape}."
                )
            if tensor.device != self.lam.device:
                raise DimensionError(
                    f"lam is on {self.lam.device} and {name} on {tensor.device}; move them to one device."
                )

    @property
    def order(self) -> int:
        """Number of states N."""
        return self.lam.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions; empty for a single system."""
        return tuple(self.lam.shape[:-1])

    def is_stable(self) -> bool:
        """Whether every pole of every system in the batch is inside the stability region."""
        return bool(stable_poles(self.lam, self.time_domain).all())

    def require_stable(self) -> None:
        """Raise `UnstableSystemError` naming the least stable pole, with its index and value, unless all are
        stable."""
        require_stable(self.lam, self.time_domain)

    def controllability_gramian(self) -> torch.Tensor:
        """`P` of shape `(..., N, N)`, complex128; see [`~systems.gramians.controllability_gramian`]."""
        return controllability_gramian(self.lam, self.B, self.time_domain)

    def observability_gramian(self) -> torch.Tensor:
        """`Q` of shape `(..., N, N)`, complex128; see [`~systems.gramians.observability_gramian`]."""
        return observability_gramian(self.lam, self.C, self.time_domain)

    def hankel_decomposition(self, resolution: float = 0.0) -> HankelDecomposition:
        """The square-root decomposition of the system's Gramians.

        By default it comes from factors that never form the Gramians, out of states scaled such that `P_ii` and `Q_ii`
        are about equal. That changes no Hankel singular value, and makes each elimination take the states in the order
        of `P_ii Q_ii`: on systems whose states differ by many orders of magnitude, small singular values would lose
        half of their digits otherwise (`test_bad_scaling_costs_no_digits`, against 80-digit arithmetic).

        A caller that needs singular values only down to a share of the largest gives it as the `resolution`: large
        systems are then decomposed by matrix products and Hermitian eigenvectors, in a small part of the time.

        Args:
            resolution (`float`, *optional*, defaults to 0.0): Share of `sigma_1` down to which singular values are
                needed; 0 for all digits of all of them.

        Raises:
            UnstableSystemError: A pole is not stable.
        """
        # The denominators of P_ii and Q_ii are the same, so rows of B and columns of C of equal size are enough.
        rows, columns = self.B.abs().amax(dim=-1), self.C.abs().amax(dim=-2)
        inert = (rows == 0) | (columns == 0)
        scale = torch.where(inert, 1, rows.sqrt() / torch.where(inert, 1, columns).sqrt()).unsqueeze(-1)
        coarse = resolution >= FINEST_RESOLUTION and self.order >= _LARGE_ORDER
        factor = partial(cauchy_or_product_factor, coarse=coarse, time_domain=self.time_domain)
        L_P = factor(self.lam, self.B / scale)
        L_Q = factor(self.lam.conj(), (self.C * scale.mT).mH)
        return HankelDecomposition.from_factors(scale * L_P, L_Q / scale, resolution if coarse else 0.0)

    def hankel_singular_values(self, resolution: float = 0.0) -> torch.Tensor:
        """Hankel singular values of shape `(..., N)`, float64, descending; see [`controllability_factor`] for accuracy.

        Args:
            resolution (`float`, *optional*, defaults to 0.0): As in [`~DiagonalLTI.hankel_decomposition`].

        Raises:
            UnstableSystemError: A pole is not stable.
        """
        return self.hankel_decomposition(resolution).sigma

    def frequency_response(self, omega: torch.Tensor) -> torch.Tensor:
        """The transfer function on the boundary of the stability region, `G(e^{i omega})` or `G(i omega)`.

        Args:
            omega (`torch.Tensor` of shape `(W,)` or `(..., W)`): Frequencies, real: radians per sample in discrete
                time, per unit of time in continuous time. With leading dimensions, each system has its own frequencies.

        Returns:
            `torch.Tensor` of shape `(..., W, H_out, H_in)`, complex128.

        Raises:
            DimensionError: `omega` is complex, or its shape does not fit the batch.
            NotFiniteError: `omega` holds NaN or infinity.
        """
        if omega.is_complex() or omega.ndim < 1 or (omega.ndim > 1 and tuple(omega.shape[:-1]) != self.batch_shape):
            raise DimensionError(
                f"omega has dtype {omega.dtype} and shape {tuple(omega.shape)}; it must be real, of shape (W,) or "
                f"{(*self.batch_shape, 'W')}."
            )
        require_finite("omega", omega)
        modes = self.modal_response(omega.to(torch.float64))
        response = (self.C.unsqueeze(-3) * modes.unsqueeze(-2)) @ self.B.unsqueeze(-3)
        return response if self.D is None else response + self.D.unsqueeze(-3)

    def modal_response(self, omega: torch.Tensor) -> torch.Tensor:
        """`1 / (1 - lam e^{-i omega})` in discrete time, `1 / (i omega - lam)` in continuous time: (..., W, N)."""
        if self.time_domain == "discrete":
            return 1 / (1 - self.lam.unsqueeze(-2) * torch.exp(-1j * omega).unsqueeze(-1))
        return 1 / (1j * omega.unsqueeze(-1) - self.lam.unsqueeze(-2))

    def impulse_response(self, length: int) -> torch.Tensor:
        """The output after a unit impulse at step 0: `C B + D, C A B, C A^2 B, ...`; discrete time only.

        Args:
            length (`int`): Number of steps, at least 1.

        Returns:
            `torch.Tensor` of shape `(..., length, H_out, H_in)`, complex128: entry `[..., t, j, k]` is output `j` at
                step
            `t` after an impulse on input `k`.

        Raises:
            ConfigurationError: The system is in continuous time.
            DimensionError: `length` is less than 1.
        """
        self._require_discrete("impulse_response")
        if length < 1:
            raise DimensionError(f"length is {length}; allowed is 1 or more.")
        powers = torch.linalg.vander(self.lam, N=length).mT
        response = (self.C.unsqueeze(-3) * powers.unsqueeze(-2)) @ self.B.unsqueeze(-3)
        if self.D is not None:
            response[..., 0, :, :] += self.D
        return response

    def simulate(self, u: torch.Tensor, initial_state: torch.Tensor | None = None) -> torch.Tensor:
        """The output to an input sequence, by the recursion itself; discrete time only.

        This is the slow reference for the fast scans of the library.

        Args:
            u (`torch.Tensor` of shape `(..., time, H_in)`): Input; leading dimensions broadcast with the system's
                batch.
            initial_state (`torch.Tensor` of shape `(..., N)`, *optional*): The state `h[-1]` before the first input;
                zero by default.

        Returns:
            `torch.Tensor` of shape `(..., time, H_out)`, complex128.

        Raises:
            ConfigurationError: The system is in continuous time.
            DimensionError: `u` or `initial_state` does not fit the system.
        """
        self._require_discrete("simulate")
        if u.ndim < 2 or u.shape[-1] != self.B.shape[-1]:
            raise DimensionError(f"u has shape {tuple(u.shape)}; it must be (..., time, {self.B.shape[-1]}).")
        if initial_state is not None and initial_state.shape[-1:] != self.lam.shape[-1:]:
            raise DimensionError(
                f"initial_state has shape {tuple(initial_state.shape)}; it must be (..., {self.order})."
            )
        u = u.to(torch.complex128)
        driven = u @ self.B.mT
        state = torch.zeros_like(self.lam) if initial_state is None else initial_state.to(torch.complex128)
        states = []
        for step in driven.unbind(-2):
            state = self.lam * state + step
            states.append(state)
        y = torch.stack(states, dim=-2) @ self.C.mT if states else driven @ self.C.mT
        return y if self.D is None else y + u @ self.D.mT

    def _require_discrete(self, method: str) -> None:
        if self.time_domain != "discrete":
            raise ConfigurationError(
                f"{method} needs a discrete-time system, this one is in {self.time_domain} time. Discretise it first."
            )
