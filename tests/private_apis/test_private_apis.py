"""What other libraries do not promise is still there, and the page names every place that uses it."""

from __future__ import annotations

import ast
import inspect
import logging
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.models.mamba2 import modeling_mamba2

import hf_compressm
from hf_compressm.cards import Provenance
from hf_compressm.saving import carry

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


def test_a_lost_upload_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Pushed(nn.Linear):
        def save_pretrained(self, folder: str) -> None: ...

        def push_to_hub(self, name: str) -> None: ...

    with caplog.at_level(logging.WARNING):
        carry(Pushed(1, 1), Provenance([]))
    assert "not checked before the upload" in caplog.text


def test_the_page_names_every_marked_function() -> None:
    rows = [line.split("|")[1:3] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {(file.strip(" `"), function.strip(" `")) for file, function in rows}
    marked = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if "# Private API of " in line]
        if lines:
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            for line in lines:
                inside = [node for node in functions if node.lineno <= line <= node.end_lineno]
                marked.add((path.relative_to(PACKAGE).as_posix(), max(inside, key=lambda node: node.lineno).name))
    assert len(marked) >= 8
    assert marked <= named
