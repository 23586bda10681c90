"""A compressed model takes its card, history and picture wherever it is saved; and a folder is checked as a whole."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hf_compressm import CompreSSMConfig, compress, read_history
from hf_compressm.cards import PICTURE_NAME, Provenance
from hf_compressm.errors import InconsistentModelError
from hf_compressm.saving import (
    follow_saves,
    provenance_of,
    require_one_model,
    state_sizes,
    write_model_files,
)
from tests.cases import PRETRAINED_CASES, case_id, logits_of, tiny_mamba, token_batch

HALF = CompreSSMConfig(strategy="target", target_ratio=0.5)
FILES = {"README.md", "compressm_history.json", "compressm_config.json", PICTURE_NAME}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compressed model and the folder that it was saved into."""
    folder = tmp_path_factory.mktemp("carry") / "small"
    model = tiny_mamba()
    compress(model, [token_batch()], HALF)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("case", PRETRAINED_CASES, ids=case_id)
def test_a_compressed_model_saves_one_consistent_folder(case, tmp_path) -> None:
    model = case.build()
    record = compress(model, [case.batch()], HALF)
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) >= {*FILES, "config.json", "model.safetensors"}
    assert read_history(tmp_path) == [record]
    assert Image.open(tmp_path / PICTURE_NAME).size[0] > 1000
    sizes = {layer.name: layer.size_after for layer in record.layers}
    assert state_sizes(model) == sizes
    require_one_model(tmp_path, type(model), sizes)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(model, case.batch()), logits_of(loaded, case.batch()))


def test_several_cuts_are_one_history(tmp_path) -> None:
    model = tiny_mamba()
    for _ in range(2):
        compress(model, [token_batch()], HALF)
    model.save_pretrained(tmp_path)
    assert [record.layers[0].size_after for record in read_history(tmp_path)] == [4, 2]
    assert "from 8 to 2 states" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("only_the_rollback", [False, True], ids=["whole history", "the rollback alone"])
def test_a_cut_that_was_taken_back_at_once_is_saved_with_its_history(only_the_rollback: bool, tmp_path) -> None:
    model = tiny_mamba()
    worse = iter([1.0, 2.0])
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, rollback_tolerance=0.0, fit_readout=False)
    record = compress(model, [token_batch()], config, loss_function=lambda m, b: m(**b).loss * 0 + next(worse))
    assert record.outcome == "rolled_back" and model.config.state_size == 8
    if only_the_rollback:
        follow_saves(model, Provenance([record]))
    model.save_pretrained(tmp_path)
    outcomes = [saved.outcome for saved in read_history(tmp_path)]
    assert outcomes == (["rolled_back"] if only_the_rollback else ["cut", "rolled_back"])
    card = (tmp_path / "README.md").read_text()
    assert "cut nothing: the calibration loss rose by 1" in card
    assert (tmp_path / PICTURE_NAME).exists() == (PICTURE_NAME in card) == (not only_the_rollback)


def test_copies_carry_their_own(saved) -> None:
    model, _ = saved
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.__self__.model is twin
    follow_saves(twin, Provenance([]))
    assert len(provenance_of(model).records) == 1
    assert provenance_of(pickle.loads(pickle.dumps(model))).sizes() == provenance_of(model).sizes()


def test_other_processes_write_no_card(saved, tmp_path) -> None:
    model, _ = saved
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not FILES & set(os.listdir(tmp_path))


def test_a_card_that_cannot_be_read_does_not_lose_the_weights(saved, tmp_path, caplog) -> None:
    model, _ = saved
    broken = "---\ntags: [unclosed\n---\n"
    (tmp_path / "README.md").write_text(broken)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "README.md").read_text() == broken
    assert "was left as it is" in caplog.text


def test_a_full_disk_leaves_the_files_that_were_there(saved, tmp_path, monkeypatch) -> None:
    model, _ = saved
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_model_files(tmp_path, provenance_of(model))
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_link_in_the_place_of_a_card_is_replaced_and_not_followed(saved, tmp_path) -> None:
    model, _ = saved
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("compressm_history.json", PICTURE_NAME):
        (folder / name).symlink_to(outside)
    model.save_pretrained(folder)
    assert outside.read_text() == "mine" and not (folder / PICTURE_NAME).is_symlink()


def test_an_upload_is_checked_where_it_is_a_whole_model(saved, tmp_path, monkeypatch) -> None:
    model, folder = saved
    sent = []
    monkeypatch.setattr(model.save_pretrained.__self__, "stock_upload", lambda folder, repo_id: sent.append(repo_id))
    with pytest.raises(InconsistentModelError):
        model._upload_modified_files(changed_config(folder, tmp_path / "other", state_size=5), "me/other")
    whole, variant = tmp_path / "whole", tmp_path / "variant"
    model.save_pretrained(whole)
    model._upload_modified_files(whole, "me/whole")
    assert 'from_pretrained("me/whole")' in (whole / "README.md").read_text()
    model.save_pretrained(variant, variant="fp16")
    model._upload_modified_files(variant, "me/variant")
    assert sent == ["me/whole", "me/variant"]


def test_a_module_without_save_pretrained_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    follow_saves(module, Provenance([]))
    assert provenance_of(module) is None


def changed_config(folder, target, **changes):
    """A copy of a saved folder with another configuration."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_a_configuration_of_another_size_is_refused(saved, tmp_path) -> None:
    model, folder = saved
    with pytest.raises(InconsistentModelError, match=r"A_log is \(32, 4\) in the weights and \(32, 5\)"):
        require_one_model(changed_config(folder, tmp_path / "five", state_size=5), type(model))


def test_an_absurd_size_is_refused_before_memory_is_taken(saved, tmp_path) -> None:
    model, folder = saved
    absurd = changed_config(folder, tmp_path / "absurd", state_size=10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InconsistentModelError, match="1000000000"):
        require_one_model(absurd, type(model))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_a_history_of_another_model_is_refused(saved) -> None:
    model, folder = saved
    with pytest.raises(InconsistentModelError, match="has 4 states and its history says 6"):
        require_one_model(folder, type(model), {"backbone.layers.0.mixer": 6})


def test_missing_weights_are_refused(saved, tmp_path) -> None:
    model, folder = saved
    target = changed_config(folder, tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.layers.1.mixer.A_log"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InconsistentModelError, match="A_log is missing"):
        require_one_model(target, type(model))


def test_pickles_and_shards_elsewhere_are_not_opened(saved, tmp_path) -> None:
    model, folder = saved
    pickled = changed_config(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InconsistentModelError, match="Only safetensors files are read"):
        require_one_model(pickled, type(model))
    sharded = changed_config(folder, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../secret.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InconsistentModelError, match="no safetensors file of its own folder"):
        require_one_model(sharded, type(model))
