"""What the switch puts in the place of the delta rule of gated DeltaNet and of Kimi delta attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import DimensionError
from ...ops import delta_rule, delta_rule_adjoint_gramian, delta_rule_state_gramian, plain_eager_call, sample_times
from .convolution import register_convolution
from .inputs import ScanInputs
from .switch import current_observer, fast_cpu_scan_enabled, is_packed, register_scan, warn_of_packing

# What the norms of transformers and of fla (flash-linear-attention) add to a squared length.
_NORM_EPS = 1e-6
# Of each sequence: a short one has too few steps to be represented by a share of them.
_FEWEST_SAMPLES = 16


def register_delta_rule(module_name: str) -> None:
    """
    Make known that a module's global names hold the chunked delta rule, by the names of transformers, and the
    convolution in front of it.

    A single step from a cached state has names of its own, and stays theirs.

    Args:
        module_name (`str`): The module that the family's forward pass is written in.
    """
    register_scan(
        module_name,
        {
            "torch_chunk_gated_delta_rule": delta_rule_replacement,
            "chunk_kimi_delta_attention": delta_rule_replacement,
        },
    )
    register_convolution(module_name)


def delta_rule_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """
    What replaces `torch_chunk_gated_delta_rule`, with a decay a head, or of `chunk_kimi_delta_attention`,
    with one for each entry of a key.

    Behind both names transformers puts fla's kernels where these are installed; their arguments are the same.
    """

    @functools.wraps(stock)
    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        observer = current_observer()
        fast = _fast_rule_applies(query, key, value, g, beta, initial_state, **kwargs)
        settings = {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        if observer is None and not fast:
            return stock(
                query, key, value, g=g, beta=beta, chunk_size=chunk_size, initial_state=initial_state, **settings,
                **kwargs,
            )  # fmt: skip
        inputs = _inputs_of(query, key, value, g, beta, use_qk_l2norm_in_kernel, observed=observer is not None)
        if fast:
            output, state = delta_rule(inputs.C, inputs.B, value, g, beta, initial_state)
            output, state = output.to(query.dtype), state if output_final_state else None
        else:
            output, state = stock(
                query, key, value, g=g, beta=beta, chunk_size=chunk_size, initial_state=initial_state, **settings,
                **kwargs,
            )  # fmt: skip
        if observer is not None:
            if is_packed(**kwargs):
                warn_of_packing()
            output = observer.observe(inputs, output)
        return output, state

    return rule


def _fast_rule_applies(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, **kwargs: Any
) -> bool:
    states = () if initial_state is None else (initial_state,)
    if not fast_cpu_scan_enabled() or not plain_eager_call(query, key, value, g, beta, *states):
        return False
    # Packed sequences reset the state at their borders, which the fast rule does not do.
    return query.device.type == "cpu" and not is_packed(**kwargs)


def _inputs_of(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normed: bool, observed: bool
) -> DeltaRuleInputs:
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    scale = query.shape[-1] ** -0.5
    if normed:
        query, key = (x * (x.square().sum(-1, keepdim=True) + _NORM_EPS).rsqrt() for x in (query, key))
    return DeltaRuleInputs(value, g, beta, key, query * scale, mask=_not_padding(key, value) if observed else None)


def _not_padding(key: Tensor, value: Tensor) -> Tensor | None:
    """
    False where key and value are zero altogether, as the layers make them at padding; None where nothing is padding.

    Behind a sequence, the first steps of padding still see its end through the convolution, and count.
    """
    mask = (key != 0).any(-1).any(-1) | (value != 0).any(-1).any(-1)
    return None if bool(mask.all()) else mask


@dataclass(frozen=True)
class DeltaRuleInputs(ScanInputs):
    r"""
    The delta rule, \\( S_t = (I - \beta_t k_t k_t^\top) e^{g_t} S_{t-1} + \beta_t k_t v_t^\top, o_t = S_t^\top q_t \\).

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): The values v; neighbours share a key head.
        log_decay (`torch.Tensor` of shape `(batch, length, heads)` or `(batch, length, heads, N)`): g.
        beta (`torch.Tensor` of shape `(batch, length, heads)`): How much of what lies under a key is replaced.
        B (`torch.Tensor` of shape `(batch, length, key_heads, N)`): The keys k, after their norm.
        C (`torch.Tensor` of shape `(batch, length, key_heads, N)`): The queries q, after their norm and scale.
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
        part (`int`, *optional*): Which of a layer's scans it is.
    """

    u: Tensor
    log_decay: Tensor
    beta: Tensor
    B: Tensor
    C: Tensor
    mask: Tensor | None = None
    part: int | None = None

    def shared_by(self, key_heads: int) -> DeltaRuleInputs:
        """
        The same where keys and queries were repeated for every value head, as some versions of transformers do.

        Args:
            key_heads (`int`): How many different ones there are.

        Raises:
            [`~errors.DimensionError`]: that number does not divide the heads.
        """
        repeated, rest = divmod(self.B.shape[2], key_heads)
        if rest:
            raise DimensionError(f"{key_heads} key heads do not divide the {self.B.shape[2]} that were observed.")
        return replace(self, B=self.B[:, :, ::repeated], C=self.C[:, :, ::repeated])

    @property
    def steps(self) -> int:
        """How many steps of all sequences are not padding."""
        return self.u.shape[0] * self.u.shape[1] if self.mask is None else int(self.mask.sum())

    @property
    def rows(self) -> int:
        """Steps that are not padding, times the channels of the heads that share a key head."""
        return self.steps * (math.prod(self.u.shape[2:]) // self.B.shape[2])

    def sample_times(self, generator: torch.Generator) -> Tensor:
        """Random steps, one in N / 4 or sixteen: the Gramians then cost about what the rule and its gradient cost."""
        batch, length = self.u.shape[:2]
        count = max(_FEWEST_SAMPLES, -(-length // max(8, self.state_size // 4)))
        return sample_times(batch, length, min(length, count), generator)

    def squares(self) -> Tensor:
        """Mean squares over the steps that are not padding, where all is zero; `(key_heads, 2, N)`."""
        return super().squares() * self._per_step

    def readout_gramian(self) -> Tensor:
        """Mean of the outer products of queries over the steps that are not padding, `(key_heads, N, N)`."""
        return super().readout_gramian() * self._per_step

    @property
    def _per_step(self) -> float:
        return self.u.shape[0] * self.u.shape[1] / max(1, self.steps)

    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """P, `(key_heads, N, N)`, and the readout energy, `(key_heads, N)`."""
        return delta_rule_state_gramian(self.C, self.B, self.u, self.log_decay, self.beta, times=times, mask=self.mask)

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """Q, `(key_heads, N, N)`."""
        return delta_rule_adjoint_gramian(
            self.C, self.B, self.log_decay, self.beta, grad_output, times=times, mask=self.mask
        )
