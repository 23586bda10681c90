"""A family that the library does not know is added with one short file and one row, and gets everything from them."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, read_history
from hf_compressm.architectures import MultiHeadScanInputs, StateForm, find_layers, registry
from hf_compressm.errors import ConfigurationError
from hf_compressm.models.compressed import STOCK_FAMILIES, register_stock_family
from hf_compressm.models.compressed.mixing import mix
from tests.architectures import toy_model
from tests.architectures.toy_model import ToyConfig, ToyForCausalLM
from tests.cases import logits_of, token_batch
from tests.training.test_callback import Notes, Rows, make_trainer
from tests.training.test_resume import SAVES, StopAt

N, HALF = 8, 4
ONE_FILE = "tests.architectures.toy_family"
ROOT = Path(__file__).parents[2]

A_FRESH_PROCESS = """
import sys
import torch, transformers
import tests.architectures.toy_family
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=saved["input_ids"]).logits, saved["logits"], atol=1e-6, rtol=1e-5)
    print(type(model).__name__)
"""


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    """The toy is known while these tests run."""
    module = importlib.import_module(ONE_FILE)
    yield
    assert STOCK_FAMILIES.pop("toy") is module.ToyLayer.stock
    assert registry._FAMILIES.pop("toy") is module.ToyLayer


def build(seed: int = 0) -> ToyForCausalLM:
    torch.manual_seed(seed)
    model = ToyForCausalLM(ToyConfig())
    for layer in model.layers:
        nn.init.normal_(layer.address.weight, std=0.7)
    return model.eval()


def cut(model: ToyForCausalLM | None = None, **settings) -> ToyForCausalLM:
    """The model, or a new one, after one cut."""
    model = build() if model is None else model
    config = CompreSSMConfig(**{"strategy": "fixed", "keep_ratio": 0.5, **settings})
    record = compress(model, [token_batch()], config, progress=False)
    assert record.outcome == "cut", record.reason
    return model.eval()


def cut_unevenly(**settings) -> ToyForCausalLM:
    """A model in whose first layer nothing is written to all slots but three."""
    model = build()
    with torch.no_grad():
        for parameter in (model.layers[0].address.weight, model.layers[0].address.bias):
            parameter.unflatten(0, (2, 2, N))[:, 0, 3:] = 0
    return cut(model, strategy="tolerance", tolerance=1e-3, uniform=False, allow_growth=True, **settings)


def forms(model: nn.Module) -> list[StateForm]:
    return [layer.form for layer in find_layers(model)]


def test_it_takes_one_file_of_less_than_sixty_lines() -> None:
    assert len((ROOT / f"{ONE_FILE.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()) < 60


def test_its_gramians_are_those_of_the_same_recurrence_in_other_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    value, grad = torch.randn(2, 3, 9, 2, 4, dtype=torch.float64, generator=generator).unbind(0)
    write, read = torch.randn(2, 3, 9, 2, N, dtype=torch.float64, generator=generator).unbind(0)
    forget = torch.rand(3, 9, 2, dtype=torch.float64, generator=generator)
    found = importlib.import_module(ONE_FILE).ToyInputs(value, forget, write, read)
    torch.testing.assert_close(
        found.read(torch.stack(found.states(), 1)), toy_model.remember(value, forget, write, read)[0]
    )
    # Mamba-2: the time step is the logarithm of the share that stays, for which the input makes up.
    delta = -forget.log()
    known = MultiHeadScanInputs(value / delta[..., None], delta, -torch.ones(2, dtype=torch.float64), write, read)
    times = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 7], [0, 1, 2, 6]])
    assert (found.rows, found.state_size) == (known.rows, known.state_size)
    torch.testing.assert_close(found.state_gramian(times), known.state_gramian(times))
    torch.testing.assert_close(found.adjoint_gramian(grad, times), known.adjoint_gramian(grad, times))


def test_selection_stays_in_the_stock_class(tmp_path) -> None:
    model, before = build(), build()
    cut(model, stock=True)
    assert type(model) is ToyForCausalLM and model.config.slots == HALF and forms(model) == [(HALF, HALF)] * 2
    rows, kept = before.layers[0].address.weight, model.layers[0].address.weight
    for head_rows, head_kept in zip(rows.unflatten(0, (2, 2, N)), kept.unflatten(0, (2, 2, HALF))):
        # The same slots are written and read, each head has its own.
        slots = (head_kept[0].unsqueeze(1) == head_rows[0]).all(-1).nonzero()[:, 1]
        assert torch.equal(head_rows[:, slots], head_kept)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ToyForCausalLM
    assert torch.equal(logits_of(again, token_batch()), logits_of(model, token_batch()))


def test_the_mixed_form_gives_the_recurrence_combined_arguments(monkeypatch) -> None:
    model, mixed = build(), build()
    for layer in mixed.layers:
        mix(layer, N)
    torch.testing.assert_close(logits_of(mixed, token_batch()), logits_of(model, token_batch()))
    cut(mixed)
    assert type(mixed).__name__ == "CompressedToyForCausalLM" and forms(mixed) == [(HALF, N)] * 2
    assert type(mixed.layers[0]).__name__ == "MixedToyMixer" and mixed.layers[0].address.out_features == 2 * 2 * N

    plain, layer = copy.deepcopy(model.layers[0]), mixed.layers[0]
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "mixing" not in name})
    hidden = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    found, recurrence = layer(hidden), toy_model.remember

    def combined(value: Tensor, forget: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        write, read = (
            torch.stack([entries[:, :, head] @ matrix[head] for head in range(2)], 2)
            for entries, matrix in ((write, layer.input_mixing), (read, layer.readout_mixing))
        )
        return recurrence(value, forget, write, read)

    monkeypatch.setattr(toy_model, "remember", combined)
    torch.testing.assert_close(found, plain(hidden))


def test_nothing_is_lost_where_slots_are_redundant() -> None:
    model = build()
    with torch.no_grad():
        for layer in model.layers:
            for parameter in (layer.address.weight, layer.address.bias):
                rows = parameter.unflatten(0, (2, 2, N))
                rows[:, :, 1::2] = rows[:, :, ::2]
    before = logits_of(model, token_batch())
    torch.testing.assert_close(logits_of(cut(model), token_batch()), before, rtol=1e-3, atol=1e-4)


def test_the_layers_may_have_sizes_of_their_own() -> None:
    assert forms(cut_unevenly()) == [(3, N), (N, N)]
    assert forms(cut_unevenly(reductor="selection")) == [(3, 3), (N, N)]


def test_a_second_cut_multiplies_the_matrices() -> None:
    model = cut()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("mixing")}
    cut(model)
    after = {name: value for name, value in model.named_parameters() if name.endswith("mixing")}
    assert forms(model) == [(2, N)] * 2 and len(before) == 4 and before.keys() == after.keys()
    for name, value in after.items():
        solved = torch.linalg.lstsq(before[name], value.detach()).solution
        torch.testing.assert_close(before[name] @ solved, value.detach(), rtol=1e-3, atol=1e-4)


def test_what_was_saved_loads_in_a_fresh_process(tmp_path) -> None:
    batch, names = token_batch(), []
    models = [cut(), cut(cut()), cut_unevenly(), cut_unevenly(reductor="selection"), cut(stock=True)]
    folders = [str(tmp_path / str(number)) for number in range(len(models))]
    for folder, model in zip(folders, models):
        model.save_pretrained(folder)
        torch.save({"input_ids": batch["input_ids"], "logits": logits_of(model, batch)}, folder + "/expected.pt")
        names.append(type(model).__name__)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", A_FRESH_PROCESS, *folders], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == names == [*["CompressedToyForCausalLM"] * 4, "ToyForCausalLM"]


TWO_CUTS = CompreSSMConfig(strategy="fixed", window=(0.0, 0.5), interval=5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[nn.Module, list[float]]:
    """What a whole run leaves: its model and its losses."""
    notes, settings = Notes(), {**SAVES, "save_strategy": "no"}
    folder, rows = tmp_path_factory.mktemp("whole"), Rows(token_batch(batch=64))
    trainer = make_trainer(folder, CompreSSMCallback(TWO_CUTS), build(), rows, [notes], **settings)
    trainer.train()
    return trainer.model, notes.losses


@pytest.mark.parametrize("stop, size", [(3, 8), (7, 4), (12, 2)])
def test_a_run_resumes_in_the_trainer(uninterrupted, stop: int, size: int, tmp_path) -> None:
    (whole, losses), settings, rows = uninterrupted, {**SAVES, "save_steps": stop}, Rows(token_batch(batch=64))
    parts, rest = Notes(), Notes()
    callback = CompreSSMCallback(TWO_CUTS)
    first = make_trainer(tmp_path / "run", callback, build(), rows, [parts, StopAt(stop)], **settings)
    first.train()
    assert {form.size for form in forms(first.model)} == {size}
    resumed = build()
    second = make_trainer(tmp_path / "run", CompreSSMCallback(TWO_CUTS), resumed, rows, [rest], **settings)
    second.train(resume_from_checkpoint=True)
    assert forms(resumed) == [(2, N)] * 2 and type(resumed).__name__ == "CompressedToyForCausalLM"
    assert parts.losses[:stop] + rest.losses[-(20 - stop) :] == pytest.approx(losses, rel=1e-5)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=name)
    resumed.save_pretrained(tmp_path / "saved")
    assert [record.outcome for record in read_history(tmp_path / "saved")] == ["cut", "cut"]


def test_copies_and_compiled_models_compute_the_same() -> None:
    model = cut()
    expected = logits_of(model, token_batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(logits_of(twin, token_batch()), expected)
    torch.testing.assert_close(logits_of(torch.compile(model, backend="eager"), token_batch()), expected)


def test_mixed_and_stock_layers_run_side_by_side_in_threads() -> None:
    recurrence, models = toy_model.remember, [build(), cut(), build(1)]
    expected = [logits_of(model, token_batch()) for model in models]
    wrong, start = [], threading.Barrier(len(models))

    def run(number: int) -> None:
        start.wait()
        for _ in range(20):
            if not torch.equal(logits_of(models[number], token_batch()), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and toy_model.remember is recurrence


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("toy", {"size_name": "other"}, "'toy' is known"),
        ("toy_again", {"config_size_name": "other"}, "'toy_again' is known, or a class of it"),
        ("other", {"mixer": "OtherMixer", "config": "OtherConfig"}, "has no OtherConfig"),
    ],
)
def test_rows_that_contradict_others_are_refused(name: str, changes: dict, message: str) -> None:
    row, before = STOCK_FAMILIES["toy"], dict(STOCK_FAMILIES)
    with pytest.raises(ConfigurationError, match=message):
        register_stock_family(name, row._replace(**changes))
    assert before == STOCK_FAMILIES and register_stock_family("toy", row) is row
