r"""Fit the readout of reduced time-invariant systems to outputs, where the states are what they are.

The readout that a projection gives, `C T`, is right for what the kept states stand for. The output needs less: of all
`C_r` the one whose `Re(C_r z)` is nearest to the wanted output on the inputs that the system really gets, those that
reach it through other reduced systems included. The real part is what is seen, so that covariances of `z z^H` alone do
not determine it; real and imaginary parts of the states are features of their own.

Poles and inputs stay, and with them stability. No error bound is left: a fit is judged on steps that it has not seen.
"""

from __future__ import annotations

import torch

from .._decompositions import eigh
from ..output_moments import OutputMoments, complex_readout, real_readout

# In units of each feature's own energy; from nearly none to one that hardly lets the readout move.
_RIDGES = tuple(10.0**exponent for exponent in range(-8, 2))


@torch.no_grad()
def fit_system_readout(C: torch.Tensor, seen: OutputMoments, held_out: OutputMoments) -> torch.Tensor:
    r"""
    The readout that gives the wanted outputs best, drawn to the given one by a ridge.

    `sum |y - Re(C' z)|^2 + ridge sum_i E_i |X'_i - X_i|^2` is least, with `E_i` the energy of a feature. The ridge is
    the one of several whose fit to the steps seen is best on those held out; all of them are used with it. A system
    whose given readout is better on the steps held out than any fit keeps it.

    Source: ridge regression, Hoerl and Kennard (1970). That reduced readouts are fitted to data is known as operator
    inference, Peherstorfer and Willcox (2016).

    Args:
        C (`torch.Tensor` of shape `(..., H, r)`): Given readout, complex.
        seen ([`OutputMoments`]): Of the steps that are fitted.
        held_out ([`OutputMoments`]): Of those that judge the fit.

    Returns:
        `torch.Tensor` of shape `(..., H, r)`, complex128.

    Example:

    ```python
    >>> import torch
    >>> from hf_compressm.systems import OutputMoments
    >>> z = torch.randn(100, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    >>> y = (z @ torch.tensor([[1.0], [2j]], dtype=torch.complex128)).real
    >>> seen, held_out = OutputMoments.of(z[:80], y[:80]), OutputMoments.of(z[80:], y[80:])
    >>> C = fit_system_readout(torch.zeros(1, 2, dtype=torch.complex128), seen, held_out)
    >>> [f"{c.real:.2f} + {c.imag:.2f}i" for c in (C[0] + 1 + 1j).tolist()]
    ['2.00 + 1.00i', '1.00 + 3.00i']

    ```
    """
    start = real_readout(C)
    choices = [C, *(complex_readout(X) for X in _solutions(start, seen, _RIDGES))]
    errors = torch.stack([held_out.error(choice) for choice in choices])
    best = torch.where(torch.isfinite(errors), errors, torch.inf).argmin(0)
    final = [C, *(complex_readout(X) for X in _solutions(start, seen + held_out, _RIDGES))]
    chosen = torch.stack([choice.to(torch.complex128) for choice in final])
    return chosen.gather(0, best[None, ..., None, None].expand(1, *C.shape))[0]


def _solutions(start: torch.Tensor, moments: OutputMoments, ridges: tuple[float, ...]) -> list[torch.Tensor]:
    energies = moments.features.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(energies > 0, energies, 1).sqrt().unsqueeze(-1)
    correlations = moments.features / scale / scale.mT
    missing = (moments.cross - moments.features @ start) / scale
    values, vectors = eigh((correlations + correlations.mT) / 2)
    turned = vectors.mT @ missing
    values = values.clamp_min(0).unsqueeze(-1)
    return [start + (vectors @ (turned / (values + ridge))) / scale for ridge in ridges]
