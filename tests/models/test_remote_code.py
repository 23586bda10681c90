"""A saved folder loads where the library is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torch

import hf_compressm.models
from tests.models.tiny import CLASSIFIERS, LANGUAGE_MODELS, sequences

WITHOUT_THE_LIBRARY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_compressm", "numba"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch, transformers
for argument in sys.argv[1:]:
    folder, auto_class = argument.split("::")
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**saved["inputs"]).logits, saved["logits"], atol=1e-5, rtol=1e-5)
    if "generated" in saved:
        found = model.generate(saved["inputs"]["input_ids"], max_new_tokens=6, do_sample=False)
        assert torch.equal(found, saved["generated"])
    print(type(model).__name__)
assert not any(name.split(".")[0] == "hf_compressm" for name in sys.modules)
"""


def test_folders_that_carry_the_code_need_no_library(tmp_path) -> None:
    arguments, names = [], []
    for tiny in CLASSIFIERS + LANGUAGE_MODELS:
        model = tiny.build(**({} if tiny.name.startswith("mamba") else {"state_size": [8, 3]}))
        inputs = sequences("input_ids", 3, 70)
        with torch.no_grad():
            expected = {"inputs": inputs, "logits": model(**inputs).logits}
        is_causal = tiny in LANGUAGE_MODELS
        if is_causal:
            expected["generated"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        torch.save(expected, folder / "expected.pt")
        arguments.append(f"{folder}::{'AutoModelForCausalLM' if is_causal else 'AutoModelForSequenceClassification'}")
        names.append(type(model).__name__)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY, *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == names


def test_what_travels_with_a_model_lies_in_one_flat_folder() -> None:
    """transformers copies a file and what it imports from its own folder; an import from elsewhere would be lost."""
    folder = Path(hf_compressm.models.__file__).parent / "sequence"
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
    for path in folder.glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert (folder / f"{node.module}.py").is_file()
