"""A data-parallel wrapper learns of parameters that were replaced below it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..architectures import ParameterChange
from ..errors import UnsupportedModelError
from .trainer_lookup import wrapper_in_use, wrappers_of

# What PowerSGD remembers of every bucket; a bucket of another size begins anew.
_MEMORIES_OF_HOOKS = ("error_dict", "p_memory_dict", "q_memory_dict")


class ReducerChange:
    """
    A wrapper whose reducer is made anew for the parameters that the model has by then.

    Args:
        model (`torch.nn.Module`): The model as a callback gets it, without its wrapper.
        parameters (`Sequence[ParameterChange]`): What is replaced in it.

    Raises:
        [`~errors.UnsupportedModelError`]: no wrapper holds the model, so that nobody would reduce the new parameters'
            gradients.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[ParameterChange] = ()) -> None:
        found = wrapper_in_use(model)
        if found is None:
            raise UnsupportedModelError(
                "several processes train the model, and it is not inside a DistributedDataParallel wrapper: the "
                "gradients of what a cut replaces would not be averaged. Train with the Trainer's own wrapper (on CPUs "
                "it needs use_cpu=True in the TrainingArguments), or in one process."
            )
        self._wrapper = found

    def commit(self) -> None:
        """Make the reducer for the new parameters."""
        rebuild_reducer(self._wrapper)

    def rollback(self) -> None:
        """Make the reducer for the old parameters, which are back."""
        rebuild_reducer(self._wrapper)


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """
    Give a wrapper buckets and hooks for the present parameters of its module; all processes have to call it together.

    The old reducer goes first: a node of its graph that stays alive would check new gradients against old shapes. What
    is used here is what `DistributedDataParallel.__init__` does (torch 2.13); torch has no public way.

    Args:
        wrapper (`torch.nn.parallel.DistributedDataParallel`): The wrapper, between two steps.
    """
    # Private API of torch.
    _drop_reducer(wrapper)
    hooks = list(wrapper._comm_hooks)
    ignored = wrapper.parameters_to_ignore
    wrapper._module_parameters = [p for name, p in wrapper.module.named_parameters() if name not in ignored]
    parameters, expect_sparse_gradient = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, expect_sparse_gradient, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
        wrapper._static_graph_delay_allreduce_enqueued = False
    wrapper._comm_hooks = []
    for hook, state in hooks:
        for memory in _MEMORIES_OF_HOOKS:
            getattr(state, memory, {}).clear()
        wrapper.register_comm_hook(state, hook)


def _drop_reducer(wrapper: DistributedDataParallel) -> None:
    # Private API of torch.
    if wrapper.reducer is not None:
        wrapper._remove_autograd_hooks()
    wrapper.logger = None
    wrapper.reducer = None


def begin_with_a_new_reducer(model: nn.Module) -> None:
    """
    Make the reducer anew before a training, in all processes alike.

    The load of a best checkpoint can have changed shapes below a wrapper that is used again, and a wrapper of an
    earlier training, where it is still alive, keeps nodes of parameters at their old shapes. Neither shows from
    outside.

    Args:
        model (`torch.nn.Module`): The model without its wrapper.
    """
    used = wrapper_in_use(model)
    for wrapper in wrappers_of(model):
        _drop_reducer(wrapper)
    if used is not None:
        rebuild_reducer(used)
