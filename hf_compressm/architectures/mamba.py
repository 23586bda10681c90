r"""
Mamba: transformers' `MambaMixer` and mamba-ssm's `Mamba`, two modules of one shape.

Both hold `A_log` (channels x N) and one linear projection `x_proj` whose rows are, in order, the time step's low-rank
part, \\( W_B \\) (N) and \\( W_C \\) (N). \\( C_t = W_C x_t \\) is linear in the layer's input, so the interpolative
cut \\( h \approx T h_S \\) folds into the weights: \\( A \leftarrow A_{:,S} \\), \\( W_B \leftarrow (W_B)_S \\),
\\( W_C \leftarrow T^\top W_C \\). The result is a Mamba layer like any other.

Source of the layer: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DimensionError, TruncationError, UnsupportedModelError
from ..ops import selective_scan
from ..systems import Truncation
from .base import (
    AttributeChange,
    AxisMap,
    LayerReduction,
    ParameterChange,
    ScanObserver,
    StateSpaceLayer,
    successor,
)
from .registry import register
from .scan_inputs import SelectiveScanInputs
from .scan_switch import (
    calls_registered_scan,
    current_observer,
    fast_cpu_scan_enabled,
    plain_eager_call,
    register_scan,
    watching,
)

# The two libraries' names for the same two sizes.
_STATE_SIZE_NAMES = ("ssm_state_size", "d_state")
_TIME_STEP_RANK_NAMES = ("time_step_rank", "dt_rank")


@register
class MambaLayer(StateSpaceLayer):
    """A Mamba mixer of transformers or of mamba-ssm, seen as a state-space system."""

    family = "mamba"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module has a Mamba mixer's parameters and sizes, and calls a scan that can be watched."""
        if not all(hasattr(module, name) for name in ("A_log", "D", "in_proj", "conv1d", "x_proj", "dt_proj")):
            return False
        # A norm between x_proj and the scan (FalconMamba, Jamba) forbids folding the readout into x_proj.
        if any(hasattr(module, name) for name in ("b_layernorm", "c_layernorm", "rms_eps", "x_proj_weight")):
            return False
        return _named_size(module, _STATE_SIZE_NAMES) is not None and calls_registered_scan(module)

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Interpolative, folded into the weights, and selection."""
        return frozenset({"interpolative", "selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Interpolative."""
        return "interpolative"

    @property
    def state_size(self) -> int:
        """The present number of states per channel, N."""
        return getattr(self.module, _named_size(self.module, _STATE_SIZE_NAMES))

    @property
    def time_step_rank(self) -> int:
        """The number of rows of `x_proj` that make the time step."""
        return getattr(self.module, _named_size(self.module, _TIME_STEP_RANK_NAMES))

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """`A_log` and `x_proj.weight` (and `x_proj.bias` where a module has one)."""
        parameters = {"A_log": self.module.A_log, "x_proj.weight": getattr(self.module.x_proj, "weight", None)}
        if getattr(self.module.x_proj, "bias", None) is not None:
            parameters["x_proj.bias"] = self.module.x_proj.bias
        return parameters

    def check_reducible(self) -> None:
        """
        Raise when the layer cannot be cut.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter is sharded or quantised, `x_proj` is not a linear layer (an
                adapter wraps it), or a parameter's shape disagrees with the layer's state size.
        """
        if not isinstance(self.module.x_proj, nn.Linear):
            raise UnsupportedModelError(
                f"{self.name}.x_proj is a {type(self.module.x_proj).__name__} and not a torch.nn.Linear; its rows "
                "would be cut. Leave x_proj out of the adapter's target modules, or merge the adapter first."
            )
        super().check_reducible()
        n_states, expected = self.state_size, self.state_shapes(self.state_size)
        for name, parameter in self.state_parameters().items():
            if tuple(parameter.shape) != expected[name]:
                raise UnsupportedModelError(
                    f"{self.name}.{name} has shape {tuple(parameter.shape)}; a state size of {n_states} needs "
                    f"{expected[name]}. The parameter may be sharded or flattened by a wrapper."
                )

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that the rows of `x_proj` or the columns of `A_log` in a state dict tell."""
        if prefix + "A_log" in state_dict:
            return state_dict[prefix + "A_log"].shape[1]
        if prefix + "x_proj.weight" in state_dict:
            return (state_dict[prefix + "x_proj.weight"].shape[0] - self.time_step_rank) // 2
        return None

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `A_log` and `x_proj` at a state size."""
        rows = self.time_step_rank + 2 * size
        return {
            "A_log": (self.module.D.shape[0], size),
            "x_proj.weight": (rows, self.module.x_proj.in_features),
            "x_proj.bias": (rows,),
        }

    def size_changes(self, size: int) -> list[AttributeChange]:
        """The mixer's state size and the rows of `x_proj`."""
        return [
            AttributeChange(self.module, _named_size(self.module, _STATE_SIZE_NAMES), size),
            AttributeChange(self.module.x_proj, "out_features", self.time_step_rank + 2 * size),
        ]

    @classmethod
    def config_changes(cls, layers: Sequence[StateSpaceLayer], sizes: Sequence[int]) -> list[AttributeChange]:
        """`state_size` of the config that mixers share, the largest of their sizes."""
        found: dict[int, tuple[Any, int]] = {}
        for layer, size in zip(layers, sizes):
            config = getattr(layer.module, "config", None)
            if hasattr(config, "state_size"):
                found[id(config)] = (config, max(int(size), found.get(id(config), (config, 0))[1]))
        return [AttributeChange(config, "state_size", size) for config, size in found.values()]

    @contextmanager
    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass of the layer shows its scan to the observer."""
        with ExitStack() as stack:
            stack.enter_context(watching(self.module, observer))
            # mamba-ssm's fused path never calls the scan by itself.
            if getattr(self.module, "use_fast_path", False):
                self.module.use_fast_path = False
                stack.callback(setattr, self.module, "use_fast_path", True)
            yield

    def reduce(self, truncation: Truncation) -> LayerReduction:
        r"""
        Build the layer's tensors and sizes for a smaller state, the readout folded into `x_proj`.

        Moments: the adjoint of the kept states is \\( T^\top g \\), so the gradient of \\( W_B \\) moves with
        \\( T^\top \\); the rows of \\( W_C \\) see the same state as before and are sliced. The gradient of a column of
        `A_log` is a sum of products of a state and its adjoint; a kept state takes over the share of it that it carries
        of each dropped state's variance. That is exact where the dropped states are multiples of kept ones.

        Raises:
            [`~errors.DimensionError`]: the truncation is for another state size.
            [`~errors.TruncationError`]: the truncation mixes states, or a folded weight is not finite in the
                parameter's dtype.
        """
        if truncation.full_size != self.state_size:
            raise DimensionError(
                f"the truncation is for {truncation.full_size} states; {self.name} has {self.state_size}."
            )
        if truncation.indices is None:
            raise TruncationError(
                f"the truncation mixes states, which {self.name} (a Mamba layer with one diagonal A per channel) "
                "cannot hold; use an interpolative or a selecting reductor."
            )
        device = self.module.A_log.device
        kept, T = truncation.indices.to(device), truncation.T.to(device=device, dtype=torch.float64)
        size = truncation.state_size
        weights, moments = _projection_maps(self.time_step_rank, kept, T)
        rows = _kept_rows(self.time_step_rank, kept, self.state_size)

        parameters = [
            ParameterChange(
                self.module.A_log,
                successor(self.module.A_log, self.module.A_log.detach()[:, kept]),
                AxisMap(1, _variance_shares(truncation, kept), kept),
            )
        ]
        for name, old in self.state_parameters().items():
            if name != "A_log":
                values = weights @ old.detach().double()
                parameters.append(ParameterChange(old, successor(old, values), AxisMap(0, moments, rows)))
        for change in parameters:
            if not torch.isfinite(change.new).all():
                raise TruncationError(
                    f"a weight of {self.name} is not finite in {change.old.dtype} after the fold (largest entry of the "
                    f"reconstruction: {T.abs().max().item():.3g}). Use the selection reductor for this model."
                )
        return LayerReduction(self, parameters, self.size_changes(size), size)


def _named_size(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), int)), None)


def _rows(indices: Tensor, size: int) -> Tensor:
    """The rows of the identity that pick the given entries, `(len(indices), size)` float64."""
    return torch.eye(size, dtype=torch.float64, device=indices.device)[indices]


def _variance_shares(truncation: Truncation, kept: Tensor) -> Tensor:
    """How the gradient of `A_log` moves along the states, `(r, N)` float64."""
    if truncation.shares is None:
        return _rows(kept, truncation.full_size)
    return truncation.shares.to(device=kept.device, dtype=torch.float64)


def _kept_rows(rank: int, kept: Tensor, size: int) -> Tensor:
    """The rows of `x_proj` that belong to the time step and to the kept states, `(rank + 2 r,)` int64."""
    return torch.cat([torch.arange(rank, device=kept.device), rank + kept, rank + size + kept])


def _projection_maps(rank: int, kept: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    How the rows of `x_proj` move: the weights with diag(I, E_S, T^T), their gradients with diag(I, T^T, E_S).

    kept: (r,) int64.  T: (N, r) float64.  Returns: two (rank + 2 r, rank + 2 N) float64 matrices.
    """
    time_step = torch.eye(rank, dtype=torch.float64, device=T.device)
    picked = _rows(kept, T.shape[0])
    return torch.block_diag(time_step, picked, T.mT), torch.block_diag(time_step, T.mT, picked)


def _selective_scan_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of `mamba_selective_scan` (transformers) or `selective_scan_fn` (mamba-ssm)."""

    @functools.wraps(stock)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        observer = None if torch.compiler.is_compiling() else current_observer()
        fast = _fused_scan_applies(hidden_states, dt, A, B, C, **kwargs)
        if observer is None and not fast:
            return stock(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        delta = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        delta = F.softplus(delta) if delta_softplus else delta
        inputs = SelectiveScanInputs(hidden_states.mT, delta.mT, A, B.mT, C.mT)
        if fast:
            output, state = selective_scan(inputs.u, inputs.delta, A, inputs.B, inputs.C)
        else:
            output, state = stock(hidden_states, delta, A, B, C, return_last_state=True, **kwargs)
            output = output.mT
        if observer is not None:
            output = observer.observe(inputs, output)
        output = output.mT
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        if z is not None:
            output = output * F.silu(z)
        return (output, state) if return_last_state else output

    return scan


def _fused_scan_applies(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> bool:
    if not fast_cpu_scan_enabled() or not plain_eager_call(hidden_states, dt, A, B, C):
        return False
    if hidden_states.device.type != "cpu" or A.is_complex() or B.ndim != 3 or C.ndim != 3:
        return False
    # Packed sequences reset the state at their borders, which the fused scan does not do.
    return kwargs.get("cu_seqlens") is None and kwargs.get("seq_idx") is None


def _inner_function_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of `mamba_inner_fn`: None, transformers' own sign to go on through the scan."""

    @functools.wraps(stock)
    def inner(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            ours = fast_cpu_scan_enabled() and projected_states.device.type == "cpu"
            if ours or current_observer() is not None:
                return None
        return stock(projected_states, *args, **kwargs)

    return inner


register_scan(
    "transformers.models.mamba.modeling_mamba",
    {
        "mamba_selective_scan": _selective_scan_replacement,
        "selective_scan_fn": _selective_scan_replacement,
        "mamba_inner_fn": _inner_function_replacement,
    },
)
