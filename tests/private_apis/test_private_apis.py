"""What other libraries do not promise is still there, and the page names every place that uses it."""

from __future__ import annotations

import ast
import inspect
import logging
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    FalconMambaConfig,
    MambaConfig,
    PreTrainedModel,
    Trainer,
    conversion_mapping,
    core_model_loading,
)
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba import modeling_zamba
from transformers.trainer_utils import load_sharded_checkpoint

import hf_compressm
from hf_compressm.architectures.parameters import own_parameters, with_parameters
from hf_compressm.cards import Provenance
from hf_compressm.saving import follow_saves

PACKAGE = Path(hf_compressm.__file__).parent
PAGE = PACKAGE.parent / "docs" / "private_apis.md"

USED = [
    *((DistributedDataParallel, name) for name in (
        "_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper",
        "_remove_autograd_hooks", "register_comm_hook",
    )),
    (PreTrainedModel, "_upload_modified_files"),
    (PreTrainedModel, "_initialize_weights"),
    (Trainer, "save_model"),
    (Trainer, "create_model_card"),
    (AcceleratorState, "_shared_state"),
    (AcceleratorState, "_reset_state"),
    (AutoModelForCausalLM, "_model_mapping"),
    (torch._C, "_current_graph_task_id"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C._functorch, "peek_interpreter_stack"),
    (torch._C._functorch, "is_legacy_batchedtensor"),
    (forward_ad, "_current_level"),
    (nn.Module(), "_parameters"),
    (nn.Parameter(), "_backward_hooks"),
    (nn.Parameter(), "_post_accumulate_grad_hooks"),
    (CONFIG_MAPPING, "_extra_content"),
    (MambaConfig(), "_name_or_path"),
    (Trainer, "_prepare_inputs"),
    (conversion_mapping, "get_model_conversion_mapping"),
    *((core_model_loading, name) for name in ("rename_source_key", "WeightRenaming", "WeightConverter")),
    *((modeling_mamba2, name) for name in (
        "apply_mask_to_padding_states", "causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan",
        "mamba2_selective_state_update",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), USED, ids=lambda part: getattr(part, "__name__", part))
def test_it_is_there(owner: object, name: str) -> None:
    assert hasattr(owner, name)


def test_attributes_of_a_wrapper_and_arguments_of_the_trainer() -> None:
    source = inspect.getsource(DistributedDataParallel)
    for name in ("_comm_hooks", "parameters_to_ignore", "_module_parameters", "_has_rebuilt_buckets",
                 "_static_graph_delay_allreduce_enqueued", "_set_static_graph"):  # fmt: skip
        assert name in source
    assert "_internal_call" in inspect.signature(Trainer.save_model).parameters
    assert Trainer.get_decay_parameter_names(None, nn.Linear(2, 2)) == ["weight"]
    assert "_loss_shifts_labels" in inspect.getsource(transformers.trainer)
    names = {"folder", "load_index", "loaded_keys", "shard_file", "shard_files"}
    code = load_sharded_checkpoint.__code__
    assert names <= {*code.co_varnames, *code.co_cellvars}


def test_attributes_that_wrappers_leave_on_a_module() -> None:
    module = nn.Linear(2, 2)
    assert torch.compile(module)._orig_mod is module
    add_hook_to_module(module, ModelHook())
    assert hasattr(module, "_hf_hook")


def test_what_the_forward_passes_of_mamba_mixers_read() -> None:
    for module, mixer in (
        (modeling_mamba, "MambaMixer"),
        (modeling_falcon_mamba, "FalconMambaMixer"),
        (modeling_jamba, "JambaMambaMixer"),
        (modeling_zamba, "ZambaMambaMixer"),
    ):
        forward = inspect.unwrap(getattr(module, mixer).forward)
        x, mask = torch.ones(1, 2, 3), torch.tensor([[0, 1]])
        assert torch.equal(
            forward.__globals__["apply_mask_to_padding_states"](x, attention_mask=mask)[0, :, 0], mask[0]
        )
    # A quantised model has the attribute, and the forward pass goes another way for it.
    assert '"_is_quantized"' in inspect.getsource(modeling_falcon_mamba.FalconMambaMixer)
    assert not hasattr(FalconMambaConfig(), "_is_quantized")


def test_where_a_cache_holds_the_states_of_a_mixer() -> None:
    cache = DynamicCache(config=MambaConfig(num_hidden_layers=2))
    assert [layer.has_previous_state[0] for layer in cache.layers] == [False, False]
    cache.update_conv_state(torch.ones(1, 3, 4), 1)
    cache.update_recurrent_state(torch.ones(1, 3, 5), 1)
    layer = cache.layers[1]
    assert layer.has_previous_state[0] and not layer.record_past
    assert layer.conv_states[0].shape == (1, 3, 4) and layer.recurrent_states[0].shape == (1, 3, 5)
    layer.activate_past_recording()
    assert layer.record_past


def test_a_shallow_copy_of_a_module_has_other_parameters_alone() -> None:
    module, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
    weight = module.weight
    assert with_parameters(module, {"weight": other}).weight is other
    assert module.weight is weight
    own_parameters(module)["weight"] = other
    assert module.weight is other


def test_a_lost_upload_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Pushed(nn.Linear):
        def save_pretrained(self, folder: str) -> None: ...

        def push_to_hub(self, name: str) -> None: ...

    with caplog.at_level(logging.WARNING):
        follow_saves(Pushed(1, 1), Provenance([]))
    assert "not checked before the upload" in caplog.text


# Names with an underscore that are documented, or no attribute of another library.
_PUBLIC = {"_asdict", "_replace", "_fields", "_getframe", "_no_weight_decay"}
_LOOKED_UP_BY = {"getattr", "hasattr", "get"}


def rows_of_the_page() -> dict[tuple[str, str], str]:
    """What the page says is used, by file and function."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {(file, function): used for file, function, _, used, _ in cells}


def functions_of(tree: ast.Module) -> list[tuple[str, int, int]]:
    """The functions of a file with their first and last lines; the module itself for lines outside of them."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [("(module)", 1, 10**6), *((node.name, node.lineno, node.end_lineno) for node in nodes)]


def innermost(functions: list[tuple[str, int, int]], line: int) -> str:
    return max((first, name) for name, first, last in functions if first <= line <= last)[1]


def own_names() -> set[str]:
    """Names with an underscore that the package itself defines."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
    return names


def private_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Lines and names of private attributes, whether they are written or looked up by a string."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call):
            function = node.func
            called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            if called in _LOOKED_UP_BY:
                strings = [each.value for each in node.args if isinstance(each, ast.Constant)]
                found += [(node.lineno, value) for value in strings if isinstance(value, str)]
    return [(line, name) for line, name in found if name.startswith("_") and not name.startswith("__")]


def test_the_page_names_every_private_attribute_of_others() -> None:
    rows, own = rows_of_the_page(), own_names() | _PUBLIC | {"_C"}
    unnamed = []
    for path in PACKAGE.rglob("*.py"):
        tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix()
        functions = functions_of(tree)
        for line, name in private_names(tree):
            function = innermost(functions, line)
            if name not in own and name not in rows.get((file, function), ""):
                unnamed.append(f"{file}:{line} {function}: {name}")
    assert not unnamed


def test_every_row_is_marked_in_the_code_and_every_mark_has_a_row() -> None:
    marked = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if "# Private API of " in line]
        functions = functions_of(ast.parse(text))
        marked |= {(path.relative_to(PACKAGE).as_posix(), innermost(functions, line)) for line in lines}
    assert marked == set(rows_of_the_page())
