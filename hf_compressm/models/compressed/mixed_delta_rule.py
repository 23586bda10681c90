r"""
The mixed form of gated DeltaNet: keys and queries of fewer entries behind their norm, in the rule that stock code runs.

With W orthonormal, \\( I - \beta k k^\top \\) becomes \\( I - \beta (W^\top k)(W^\top k)^\top \\), which is stable
since \\( W^\top k \\) is no longer than k. Training may move W away from that, so a key that has become longer than one
is scaled back to length one. Every step then shrinks the state or leaves its size, as in the stock layer, whatever the
matrix is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixed_scan import MixedScan
from .stock_families import ScanCall

# What the norms of transformers and of fla (flash-linear-attention) add to a squared length.
_NORM_EPS = 1e-6


class MixedDeltaRule(MixedScan):
    r"""
    What a mixer of the kind `"delta_rule"` does with `input_mixing` and `readout_mixing`, both `(key heads, N, r)`: its
    rule gets \\( W^\top k / \max(1, |W^\top k|) \\) and \\( T^\top q \\) of the normed k and q.
    """

    def combined(self, call: ScanCall, arguments: dict[str, Any]) -> dict[str, Any]:
        """
        The arguments of the rule with keys and queries normed and combined, and its own norm switched off.

        Args:
            call ([`ScanCall`]): How the rule is called.
            arguments (`dict`): What the forward pass gives it, by name.
        """
        normed = bool(arguments.get("use_qk_l2norm_in_kernel", False))
        key, query = arguments[call.write], arguments[call.read]
        N, r = self.readout_mixing.shape[-2:]
        # Kernels norm in single precision whatever the dtype is.
        with torch.autocast(key.device.type, enabled=False):
            write = bounded(_combined(key, self.input_mixing, normed), key.dtype)
            # Kernels divide queries by the root of r; the layer was trained with that of N.
            read = _combined(query, self.readout_mixing, normed) * (r / N) ** 0.5
        mixed = {call.write: write.to(key.dtype), call.read: read.to(query.dtype)}
        return {**arguments, **mixed, "use_qk_l2norm_in_kernel": False}


def _combined(entries: Tensor, mixing: Tensor, normed: bool) -> Tensor:
    """Entries `(batch, length, heads, N)`, normed and combined with the matrix of their key head, at least float32."""
    entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
    if normed:
        entries = entries * (entries.square().sum(-1, keepdim=True) + _NORM_EPS).rsqrt()
    # Earlier versions of transformers repeat keys and queries for every value head.
    repeated = entries.shape[2] // mixing.shape[0]
    mixing = mixing.to(entries.dtype).repeat_interleave(repeated, dim=0)
    return torch.einsum("blgn,gnr->blgr", entries, mixing)


def bounded(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Keys, of which those longer than one are scaled back to it, also once they are rounded to a dtype.

    Args:
        keys (`torch.Tensor` of shape `(..., r)`): The keys.
        dtype (`torch.dtype`): What they are rounded to afterwards.
    """
    longest = 1 - torch.finfo(dtype).eps / 2
    return keys * (longest * keys.square().sum(-1, keepdim=True).clamp_min(longest**2).rsqrt())
