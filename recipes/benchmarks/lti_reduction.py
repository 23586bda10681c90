"""
One reduction of six LRU layers of the published sCIFAR size, against the textbook route on the same systems.

The textbook route solves both Lyapunov equations with scipy, takes Hankel singular values from the eigenvalues of the
product of the Gramians, balances with matrix square roots and a singular value decomposition, and diagonalises with a
dense eigendecomposition and an inverse. Ours is what a check in training does: spectrum, truncation with all of its
checks, and the layer's new parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from common import parser, write_result

from hf_compressm import CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.compression.measure.layer_gramians import ClosedFormGramians
from hf_compressm.models import LRUConfig, LRUModel
from hf_compressm.systems import DiagonalLTI

SIZES = ((256, 8, 64), (384, 512, 96))
FULL_COUNT = 6


def make_layers(state_size: int, hidden_size: int, count: int) -> list:
    """LRU layers at their published initial values, with weights whose singular values decay as training makes them."""
    torch.manual_seed(0)
    config = LRUConfig(input_size=1, hidden_size=hidden_size, state_size=state_size, num_hidden_layers=count)
    layers = find_layers(LRUModel(config))
    for layer in layers:
        for parameter in (layer.module.B, layer.module.C):
            U, S, V = torch.linalg.svd(torch.view_as_complex(parameter.data), full_matrices=False)
            decayed = U * (S * torch.exp(-torch.arange(len(S)) / 16)) @ V
            parameter.data.copy_(torch.view_as_real(decayed))
    return layers


def ours(layer, rank: int) -> DiagonalLTI:
    """What a check in training does with one layer; returns the reduced system."""
    gramians = ClosedFormGramians(layer.system())
    gramians.hankel_singular_values()
    truncation = gramians.truncate(rank, "balanced", CompreSSMConfig())
    layer.reduce(truncation)
    system = gramians.system
    lam = (truncation.W.mH @ (system.lam.unsqueeze(-1) * truncation.T)).diagonal()
    return DiagonalLTI(lam, truncation.W.mH @ system.B, system.C @ truncation.T)


def textbook(layer, rank: int) -> DiagonalLTI:
    """The same by the formulas of a textbook; returns the reduced system."""
    system = layer.system()
    A, B, C = np.diag(system.lam.numpy()), system.B.numpy(), system.C.numpy()
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    np.sqrt(np.sort(np.linalg.eigvals(P @ Q).real.clip(0))[::-1])
    root_P, root_Q = scipy.linalg.sqrtm(P), scipy.linalg.sqrtm(Q)
    U, S, Vh = np.linalg.svd(root_Q @ root_P)
    scale = 1 / np.sqrt(S[:rank])
    T, W = root_P @ Vh.conj().T[:, :rank] * scale, root_Q @ U[:, :rank] * scale
    lam, X = np.linalg.eig(W.conj().T @ A @ T)
    inverse = np.linalg.inv(X)
    to = torch.from_numpy
    return DiagonalLTI(to(lam), to(inverse @ W.conj().T @ B), to(C @ T @ X))


def timed(function: Callable[[], DiagonalLTI]) -> tuple[float, DiagonalLTI]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def error_of(layer, reduced: DiagonalLTI) -> float:
    """Largest error of the response (Frobenius norm) at eight of its resonances, relative to the largest response."""
    system = layer.system()
    omega = system.lam.angle()[:: system.order // 8]
    full, small = system.frequency_response(omega), reduced.frequency_response(omega)
    return (torch.linalg.matrix_norm(full - small).max() / torch.linalg.matrix_norm(full).max()).item()


def measure(state_size: int, hidden_size: int, rank: int, repeats: int) -> dict[str, float]:
    """Seconds of one layer by both routes, taking turns, and of all six by ours."""
    layers = make_layers(state_size, hidden_size, FULL_COUNT)
    ours(layers[0], rank)
    seconds, errors = {"ours": [], "textbook": []}, {}
    for _ in range(repeats):
        for name, route in (("ours", ours), ("textbook", textbook)):
            spent, reduced = timed(lambda route=route: route(layers[0], rank))
            seconds[name].append(spent)
            errors[name] = error_of(layers[0], reduced)
    six = min(timed(lambda: [ours(layer, rank) for layer in layers][0])[0] for _ in range(repeats))
    result = {f"{name}_seconds": min(values) for name, values in seconds.items()}
    return result | {f"{name}_error": value for name, value in errors.items()} | {"six_layers_seconds": six}


def main() -> None:
    """Measure all sizes."""
    made = parser(__doc__)
    made.set_defaults(repeats=3)
    options = made.parse_args()
    figures, rows = {}, []
    for state_size, hidden_size, rank in SIZES:
        found = measure(state_size, hidden_size, rank, options.repeats)
        figures[f"{state_size}x{hidden_size}"] = found
        rows.append(
            [
                f"{state_size} x {hidden_size}",
                f"{rank}",
                f"{found['textbook_seconds']:.2f} s",
                f"{found['ours_seconds']:.2f} s",
                f"{found['textbook_seconds'] / found['ours_seconds']:.1f}x",
                f"{found['six_layers_seconds']:.2f} s",
                f"{found['textbook_error']:.6g}",
                f"{found['ours_error']:.6g}",
            ]
        )
    write_result(
        "lti_reduction",
        "One reduction of an LRU layer: Hankel singular values, truncation, diagonal form",
        ["N x H", "r", "textbook", "hf_compressm", "faster", "six layers", "error, textbook", "error, hf_compressm"],
        rows,
        figures,
        "Fastest of interleaved repetitions. Ours includes the checks of the bound and the writing of the layer's "
        "parameters. Errors are Frobenius norms of the response, the largest at eight resonances relative to the full "
        "response.",
    )


if __name__ == "__main__":
    main()
