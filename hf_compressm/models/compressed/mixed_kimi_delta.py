r"""
The mixed form of Kimi delta attention: fewer keys, queries and decays behind the norm, in the rule of stock code.

In \\( S_t = (I - \beta_t k_t k_t^\top) \mathrm{diag}(a_t) S_{t-1} + \beta_t k_t v_t^\top \\) every entry of a key has a
decay of its own, so that only the columns of the identity project the decay exactly: at the cut W picks channels, which
write, erase and decay as they did, and T rebuilds what the queries read of the others. Training moves both matrices. A
column of W that has come to hold several channels decays by their mean, weighted by its squares: the diagonal of
\\( W^\top \mathrm{diag}(a) W \\) for columns of length one. So no decay is above one, and keys stay as short as in
[`MixedDeltaRule`]: the state cannot grow, whatever W becomes.

Source of the rule: Kimi Team, 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mixed_delta_rule import MixedDeltaRule
from .stock_families import ScanCall

# Of the squared length of a column that is divided by; with much less, the gradient of a zero column is no number.
_SHORTEST = 1e-12
# Above it a decay is told by what it lacks to one, which has more digits.
_SLOW = 0.5


class MixedKimiDelta(MixedDeltaRule):
    r"""
    What a mixer of the kind `"kimi_delta"` does with `input_mixing` and `readout_mixing`, both `(heads, N, r)`: beside
    keys and queries, its rule gets \\( \log \left( \sum_n W_{nj}^2 e^{g_n} / \sum_n W_{nj}^2 \right) \\) of the
    logarithms g of the decays.
    """

    def combined(self, call: ScanCall, arguments: dict[str, Any]) -> dict[str, Any]:
        """
        The arguments of the rule with keys and queries normed and combined, and decays combined as the keys are.

        Args:
            call ([`ScanCall`]): How the rule is called.
            arguments (`dict`): What the forward pass gives it, by name.
        """
        decay = arguments[call.decay]
        with torch.autocast(decay.device.type, enabled=False):
            mean = mean_decay(decay, self.input_mixing).to(decay.dtype)
        return {**super().combined(call, arguments), call.decay: mean}


def mean_decay(log_decay: Tensor, mixing: Tensor) -> Tensor:
    r"""
    The logarithms of mixed channels' decays, \\( \log \left( \sum_n W_{nj}^2 e^{g_n} / \sum_n W_{nj}^2 \right) \\).

    The mean is one of decays and not of their logarithms: what a column holds little of cannot make it forget
    everything, and training has no reason to let the decays of such channels run away.

    Args:
        log_decay (`torch.Tensor` of shape `(batch, length, heads, N)`): g, not positive.
        mixing (`torch.Tensor` of shape `(heads, N, r)`): W. A channel whose column is zero does not decay.

    Returns:
        `torch.Tensor` of shape `(batch, length, heads, r)`: Not positive and finite, at least float32.
    """
    log_decay = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32))
    weights = mixing.to(log_decay.dtype).square()
    shares = weights / weights.sum(-2, keepdim=True).clamp_min(_SHORTEST)
    decay, lost = (torch.einsum("blhn,hnr->blhr", x, shares) for x in (log_decay.exp(), -log_decay.expm1()))
    # Each logarithm stays finite where the other one is taken: infinity times zero would be the gradient there.
    slow = torch.log1p(-lost.clamp(0, _SLOW))
    return torch.where(lost < _SLOW, slow, decay.clamp(torch.finfo(decay.dtype).tiny, 1).log())
