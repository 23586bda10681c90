"""Where a fused kernel with a backward pass of its own may stand, and the derivatives for which it may not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """
    Whether a call stands inside a transform of `torch.func` or a level of forward-mode differentiation.

    A kernel sees no more than the values of a tensor, and its backward pass knows neither.
    """
    if torch.compiler.is_compiling():
        return False
    # Private API of torch.
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def plain_eager_call(*tensors: Tensor) -> bool:
    """
    Whether a call is an ordinary eager one on ordinary tensors, which is all that a kernel can be called in.

    Args:
        tensors (`torch.Tensor`): The arguments.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    if _runs_under_a_mode():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _runs_under_a_mode() -> bool:
    """Whether a mode records or replaces operations (`make_fx`, a counter of operations): it sees into no kernel."""
    # Private API of torch.
    return torch._C._len_torch_dispatch_stack() > 0


def needs_graph(*grads: Tensor | None) -> bool:
    """
    Whether a backward pass has to be one of differentiable operations: it is to be differentiated again
    (`create_graph=True`), or runs for several gradients at once (`is_grads_batched=True`, or inside of a transform).

    `once_differentiable` is no protection: what it returns has no way back to the arguments, so that a derivative with
    respect to one of these loses terms and no error is raised.

    Args:
        grads (`torch.Tensor`, *optional*): The gradients of the outputs; None for an output that was not used.
    """
    if torch.is_grad_enabled() or is_transformed():
        return True
    return any(grad is not None and _holds_several(grad) for grad in grads)


def _holds_several(grad: Tensor) -> bool:
    """Whether a gradient stands for several at once (`is_grads_batched=True`)."""
    # Private API of torch.
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def plain_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], arguments: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """
    The gradients of a function's arguments by autograd, differentiable again where grad mode is on.

    Args:
        function (`Callable`): Computes the outputs in plain torch; differentiable any number of times.
        arguments (`Sequence[torch.Tensor]`): As they were saved for the backward pass.
        grads (`Sequence[torch.Tensor]`): The gradients of the outputs; None for one that was not used.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where one argument was made of another, the gradient must not go on from one to the other.
        inputs = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in arguments]
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None and output.requires_grad]
    if not used:
        return tuple(torch.zeros_like(t) for t in arguments)
    outputs, grads = zip(*used)
    return torch.autograd.grad(outputs, inputs, grads, create_graph=again, materialize_grads=True)
