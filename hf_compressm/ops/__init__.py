"""Fast recurrences, each with its slow reference beside it."""

from ._derivatives import is_transformed, plain_eager_call
from ._validation import double_device
from .causal_convolution import causal_convolution, causal_convolution_reference, causal_convolution_step
from .delta_rule import delta_rule, delta_rule_reference
from .delta_rule_gramians import delta_rule_adjoint_gramian, delta_rule_state_gramian
from .diagonal_convolution import channel_systems, channel_systems_reference, convolution_kernel
from .diagonal_gramians import diagonal_adjoint_gramian, diagonal_state_gramian
from .diagonal_scan import diagonal_recurrence, diagonal_recurrence_reference, diagonal_scan, diagonal_scan_reference
from .mlstm_gramians import mlstm_adjoint_gramian, mlstm_state_gramian
from .multi_head_gramians import multi_head_adjoint_gramian, multi_head_state_gramian
from .multi_head_scan import multi_head_scan, multi_head_scan_reference
from .sampled_states import sampled_diagonal_states, sampled_states
from .selective_gramians import adjoint_gramian, default_sample_count, sample_times, state_gramian
from .selective_scan import selective_scan, selective_scan_reference
from .selective_step import selective_step
from .warm_up import compile_kernels

__all__ = [
    "adjoint_gramian",
    "causal_convolution",
    "causal_convolution_reference",
    "causal_convolution_step",
    "channel_systems",
    "channel_systems_reference",
    "compile_kernels",
    "convolution_kernel",
    "default_sample_count",
    "delta_rule",
    "delta_rule_adjoint_gramian",
    "delta_rule_reference",
    "delta_rule_state_gramian",
    "diagonal_adjoint_gramian",
    "diagonal_recurrence",
    "diagonal_recurrence_reference",
    "diagonal_scan",
    "diagonal_scan_reference",
    "diagonal_state_gramian",
    "double_device",
    "is_transformed",
    "mlstm_adjoint_gramian",
    "mlstm_state_gramian",
    "multi_head_adjoint_gramian",
    "multi_head_scan",
    "multi_head_scan_reference",
    "multi_head_state_gramian",
    "plain_eager_call",
    "sample_times",
    "sampled_diagonal_states",
    "sampled_states",
    "selective_scan",
    "selective_scan_reference",
    "selective_step",
    "state_gramian",
]
