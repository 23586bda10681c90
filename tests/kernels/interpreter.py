"""
Lets the Triton kernels of mamba-ssm and of flash-linear-attention run on a CPU, in Triton's interpreter.

The interpreter runs a kernel's Python program by program with NumPy, so everything that Triton would compile is run:
which tensors a kernel gets, in which shapes and strides, what it masks, and what mamba-ssm and fla do around it. What
CUDA compiles beforehand cannot be interpreted: plain torch stands in for `selective_scan_cuda` and `causal_conv1d`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGES = ("triton", "mamba_ssm", "fla")


def is_asked_for() -> bool:
    """Whether the environment asks for the interpreter and holds the packages whose kernels it is to run."""
    return os.environ.get("TRITON_INTERPRET") == "1" and all(map(importlib.util.find_spec, PACKAGES))


def install() -> None:
    """Prepare this process; before transformers' models are imported, which look for the packages once."""
    _take_first_configurations()
    _count_as_tensors_do()
    # Both packages ask for the device that a tensor is on, and how large it is.
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1, major=9, minor=0)
    _add_module("selective_scan_cuda", fwd=_selective_scan, bwd=_selective_scan_gradients)
    _add_module("causal_conv1d", causal_conv1d_fn=_convolution, causal_conv1d_update=_convolution_step)
    _add_module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=lambda x, weight, bias, seq_idx, initial_states, final_states_out, silu: (
            _convolution(x, weight, bias, activation="silu" if silu else None)
        ),
        causal_conv1d_bwd_function=_convolution_gradients,
        causal_conv1d_update_function=_convolution_step,
    )


def _add_module(name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(functions, __spec__=ModuleSpec(name, loader=None))
    sys.modules[name] = module


def _take_first_configurations() -> None:
    """There is no device to time a kernel's configurations on; one of them has to serve."""
    from triton.runtime import autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        config = self.best_config = self.configs[0]
        # mamba-ssm fills the buffers that several programs add to with zeros here; without it, gradients are noise.
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **{**config.all_kwargs(), **kwargs})

    autotuner.Autotuner.run = run


def _count_as_tensors_do() -> None:
    """Compiled, the index of a loop is a tensor; interpreted, a Python number that kernels of fla ask to be cast."""
    from triton.runtime import interpreter

    class Index(int):
        def to(self, dtype: Any, **_: Any) -> Any:
            return interpreter.interpreter_semantic.to_tensor(int(self), False).to(dtype)

    class Transformer(interpreter.ASTTransformer):
        def visit_For(self, node: ast.For) -> ast.AST:
            node = self.generic_visit(node)
            if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name):
                node.iter.func.id = {"range": "_indices"}.get(node.iter.func.id, node.iter.func.id)
            return node

    # Kernels see the global names of the interpreter's module.
    interpreter._indices = lambda *bounds: map(Index, range(*bounds))
    interpreter.FunctionRewriter.ast_transformer = Transformer()


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """The scan, what the backward pass starts from (here the last state alone), and the gated scan."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    output, last = selective_scan_ref(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=True)
    kept = torch.stack([torch.zeros_like(last), last], dim=-1).flatten(-2)[:, :, None]
    return (output, kept) if z is None else (output, kept, output * F.silu(z))


def _selective_scan_gradients(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    grad_output: Tensor,
    kept: Tensor,
    output: Tensor | None,
    grad_z: Tensor | None,
    delta_softplus: bool,
    returns_output: bool,
) -> tuple[Tensor | None, ...]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_() for x in (u, delta, A, B, C, D, delta_bias, z)]
        *inputs, bias, gate = leaves
        gated = selective_scan_ref(*inputs, gate, bias, delta_softplus)
        grads = iter(torch.autograd.grad(gated, [x for x in leaves if x is not None], grad_output))
    *grads, new_grad_z = (None if x is None else next(grads) for x in leaves)
    if z is None:
        return tuple(grads)
    grad_z = new_grad_z if grad_z is None else grad_z.copy_(new_grad_z)
    return (*grads, grad_z, *([gated.detach()] if returns_output else []))


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Of channels x time, with zeros before the first step."""
    padded = F.pad(x.to(weight.dtype), (weight.shape[1] - 1, 0))
    output = F.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return (output if activation is None else F.silu(output)).to(x.dtype)


def _convolution_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    seq_idx: None,
    initial_states: None,
    grad_final_states: None,
    grad_x: Tensor | None,
    returns_grad_of_states: bool,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
        output = _convolution(*leaves, activation="silu" if silu else None)
        new_grad_x, *grads = torch.autograd.grad(output, leaves, grad_output)
    grad_x = new_grad_x if grad_x is None else grad_x.copy_(new_grad_x)
    return (grad_x, *grads, *([None] * (3 - len(grads))))


def _convolution_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Of the inputs of one step or of several, `(batch, channels)` or with a last axis of time."""
    steps = x.unsqueeze(-1) if x.ndim == 2 else x
    history = torch.cat([state, steps.to(state.dtype)], dim=-1)
    state.copy_(history[..., -state.shape[-1] :])
    output = _convolution(history, weight, bias, activation)[..., -steps.shape[-1] :].to(x.dtype)
    return output.squeeze(-1) if x.ndim == 2 else output
