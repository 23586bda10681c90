"""Random systems, and answers to compare with that share no code with the library.

`exact_hankel_singular_values` computes in 80 digits and is the arbiter where double precision libraries differ.
"""

from __future__ import annotations

import mpmath
import numpy as np
import scipy.linalg
import torch

from hf_compressm.systems import DiagonalLTI

# name -> (order, inputs, outputs, decades by which the rows of B and the columns of C differ)
KINDS = {
    "siso": (10, 1, 1, 0),
    "mimo": (12, 2, 3, 0),
    "more_inputs_than_states": (4, 7, 6, 0),
    "single_state": (1, 2, 1, 0),
    "near_unit_circle": (12, 2, 2, 0),
    "real_poles": (16, 1, 1, 0),
    "nearly_equal_poles": (10, 2, 1, 0),
    "equal_poles": (8, 2, 2, 0),
    "rank_deficient_B": (10, 3, 2, 0),
    "rank_deficient_C": (10, 2, 3, 0),
    "dead_states": (9, 2, 2, 0),
    "badly_scaled": (12, 2, 2, 6),
    "badly_scaled_siso": (12, 1, 1, 10),
}


def random_system(kind: str, seed: int, time_domain: str = "discrete", batch: tuple[int, ...] = ()) -> DiagonalLTI:
    """A stable system of the given kind with unequal complex eigenvalues, unless the kind says otherwise."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), len(batch)])
    order, inputs, outputs, decades = KINDS[kind]
    margin = 10 ** -rng.uniform(2 if kind == "near_unit_circle" else 0.1, 4, (*batch, order))
    angle = rng.uniform(-np.pi, np.pi, (*batch, order))
    if kind == "real_poles":
        angle = np.zeros_like(angle)
    if kind == "nearly_equal_poles":
        margin, angle = margin[..., :1] + 1e-7 * rng.uniform(size=margin.shape), angle[..., :1] + 1e-7 * margin
    if kind == "equal_poles":
        margin[..., : order // 2], angle[..., : order // 2] = margin[..., -1:], angle[..., -1:]
    lam = (1 - margin) * np.exp(1j * angle)
    if time_domain == "continuous":
        # The Cayley transform maps the unit disk to the left half-plane.
        lam = (lam - 1) / (lam + 1)

    def gaussian(*shape: int) -> np.ndarray:
        return rng.normal(size=(*batch, *shape)) + 1j * rng.normal(size=(*batch, *shape))

    B = gaussian(order, inputs) * 10 ** rng.uniform(-decades, decades, (*batch, order, 1))
    C = gaussian(outputs, order) * 10 ** rng.uniform(-decades, decades, (*batch, 1, order))
    if kind == "rank_deficient_B":
        B = B[..., :1] * gaussian(1, inputs)
    if kind == "rank_deficient_C":
        C = gaussian(outputs, 1) * C[..., :1, :]
    if kind == "dead_states":
        B[..., :2, :] = 0
        C[..., 2:4] = 0
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (lam, B, C, gaussian(outputs, inputs)))
    return DiagonalLTI(*tensors, time_domain=time_domain)


def numpy_matrices(system: DiagonalLTI) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`A`, `B`, `C` of a single system as dense complex arrays."""
    return np.diag(system.lam.numpy()), system.B.numpy(), system.C.numpy()


def real_matrices(system: DiagonalLTI) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same system on real and imaginary parts, for libraries that know only real ones: all values appear twice."""

    def real_form(matrix: np.ndarray) -> np.ndarray:
        return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])

    A, B, C = map(real_form, numpy_matrices(system))
    return A, B, C


def scipy_gramians(system: DiagonalLTI) -> tuple[np.ndarray, np.ndarray]:
    """Both Gramians of a single system by scipy's dense Lyapunov solvers."""
    A, B, C = numpy_matrices(system)
    if system.time_domain == "discrete":
        solve = scipy.linalg.solve_discrete_lyapunov
        return solve(A, B @ B.conj().T), solve(A.conj().T, C.conj().T @ C)
    solve = scipy.linalg.solve_continuous_lyapunov
    return solve(A, -B @ B.conj().T), solve(A.conj().T, -C.conj().T @ C)


def exact_hankel_singular_values(system: DiagonalLTI, digits: int = 80) -> np.ndarray:
    """Hankel singular values of a single system, from its Gramians in 80-digit arithmetic."""
    with mpmath.workdps(digits):
        lam = [mpmath.mpc(pole) for pole in system.lam.tolist()]
        B, C = mpmath.matrix(system.B.tolist()), mpmath.matrix(system.C.tolist())
        inner, outer = B * B.H, C.H * C
        P, Q = inner.copy(), outer.copy()
        for i, pole in enumerate(lam):
            for j, other in enumerate(lam):
                if system.time_domain == "discrete":
                    denominator = 1 - pole * mpmath.conj(other)
                else:
                    denominator = -(pole + mpmath.conj(other))
                P[i, j] = inner[i, j] / denominator
                Q[i, j] = outer[i, j] / mpmath.conj(denominator)
        eigenvalues, eigenvectors = mpmath.eighe(P)
        factor = eigenvectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in eigenvalues])
        squares = mpmath.eighe(factor.H * Q * factor, eigvals_only=True)
        return np.array(sorted((float(mpmath.sqrt(max(value, 0))) for value in squares), reverse=True))


def transfer(system: DiagonalLTI, omega: np.ndarray) -> np.ndarray:
    """Frequency response without feedthrough, by a dense solve at each frequency: (W, H_out, H_in)."""
    A, B, C = numpy_matrices(system)
    identity = np.eye(len(A))
    if system.time_domain == "discrete":
        return np.stack([C @ np.linalg.solve(identity - np.exp(-1j * w) * A, B) for w in omega])
    return np.stack([C @ np.linalg.solve(1j * w * identity - A, B) for w in omega])


def hankel_matrix(impulse_response: np.ndarray) -> np.ndarray:
    """Block Hankel matrix of Markov parameters (length, H_out, H_in): its singular values are the system's."""
    half = (len(impulse_response) + 1) // 2
    return np.block([[impulse_response[i + j] for j in range(half)] for i in range(half)])


def complex_response(real_response: np.ndarray) -> np.ndarray:
    """`G` from the response of [`real_matrices`]: that is `diag(G(w), conj(G(-w)))` in another basis of the signals."""
    outputs, inputs = real_response.shape[-2] // 2, real_response.shape[-1] // 2
    top, bottom = real_response[..., :outputs, :], real_response[..., outputs:, :]
    mixed = top + 1j * bottom
    return (mixed[..., :inputs] - 1j * mixed[..., inputs:]) / 2
