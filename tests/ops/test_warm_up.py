"""Kernels are compiled ahead of their first real use."""

from __future__ import annotations

import torch

from hf_compressm.ops import (
    _causal_convolution_numba,
    _delta_rule_numba,
    _diagonal_scan_numba,
    _gramians_cpu,
    _selective_scan_numba,
    causal_convolution,
    compile_kernels,
    delta_rule,
    diagonal_recurrence,
    selective_scan,
    state_gramian,
)


def test_nothing_is_left_to_compile_for_float32() -> None:
    compile_kernels()
    kernels = (
        _selective_scan_numba.scan_forward,
        _selective_scan_numba.scan_backward,
        _gramians_cpu.sum_outer_products,
        _diagonal_scan_numba.scan_states,
        _diagonal_scan_numba.scan_adjoints,
        _delta_rule_numba.delta_rule_forward,
        _delta_rule_numba.delta_rule_backward,
        *_causal_convolution_numba.convolution_kernels(4),
    )
    signatures = [len(kernel.signatures) for kernel in kernels]
    assert min(signatures) >= 1
    u, B = torch.rand(2, 70, 40, requires_grad=True), torch.rand(2, 70, 5)
    A = -torch.rand(40, 5)
    selective_scan(u, u.detach(), A, B, B)[0].sum().backward()
    around = {"D": A[:, 0], "z": u.detach(), "delta_bias": A[:, 1], "delta_softplus": True}
    selective_scan(u, u.detach(), A, B, B, **around)[0].sum().backward()
    causal_convolution(u, torch.rand(40, 4), torch.rand(40), silu=True).sum().backward()
    lam, B_lti = torch.rand(5) + 0j, torch.rand(5, 40) + 0j
    diagonal_recurrence(u, lam, B_lti, B_lti.mT)[0].sum().backward()
    k = torch.rand(2, 20, 1, 5, requires_grad=True)
    beta = torch.rand(2, 20, 2)
    delta_rule(k, k.detach(), torch.rand(2, 20, 2, 3), -beta, beta)[0].sum().backward()
    state_gramian(u.detach(), u.detach(), A, B, B)
    assert [len(kernel.signatures) for kernel in kernels] == signatures
