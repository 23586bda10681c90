"""
Installs the package as a user does, into a fresh environment and without pinned versions, and uses its command there.

    python tests/install/check_install.py [--keep FOLDER]

Everything runs in an empty folder outside of the checkout, so that nothing is found that was not installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A tiny model with a tokenizer of single letters, and a text.
MAKE_A_MODEL = """
import random
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
letters = "abcdefghijklmnopqrstuvwxyz"
vocabulary = {"<eos>": 0, "<unk>": 1, **{letter: number + 2 for number, letter in enumerate(letters)}}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained("model")
config = MambaConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, state_size=8)
MambaForCausalLM(config).save_pretrained("model")
random.seed(0)
open("text.txt", "w").write(" ".join(random.choices(letters, k=2000)))
"""
LOAD_IT = """
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained("small", output_loading_info=True)
assert model.config.state_size == 4, model.config
assert not report["missing_keys"] and not report["unexpected_keys"], report
import hf_compressm
assert "site-packages" in hf_compressm.__file__, hf_compressm.__file__
"""
DATA = ["--text-file", "text.txt", "--length", "32", "--batch-size", "4", "--sequences", "16"]
COMMANDS = [
    (["--help"], "compress"),
    (["analyze", "model", *DATA], "Hankel"),
    (["compress", "model", "-o", "small", "--ratio", "0.5", *DATA], "small"),
    (["report", "small"], "report.html"),
]


def run(command: list[str], folder: Path) -> str:
    """What a command prints; it must succeed."""
    print("$", " ".join(command[:1] + [part if len(part) < 60 else "..." for part in command[1:]]), flush=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nended with {done.returncode}")
    return done.stdout + done.stderr


def main() -> None:
    """Install and use it."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--keep", type=Path, help="make the environment in this folder and leave it there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        venv.create(folder / "environment", with_pip=True)
        programs = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        python, command = str(programs / "python"), str(programs / "hf-compressm")
        work = folder / "work"
        work.mkdir(exist_ok=True)
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)], work)
        run([python, "-c", MAKE_A_MODEL], work)
        for arguments, expected in COMMANDS:
            printed = run([command, *arguments], work)
            if expected not in printed:
                sys.exit(f"{expected!r} is not in what it printed:\n{printed}")
        run([python, "-c", LOAD_IT], work)
        print(run([python, "-m", "pip", "list", "--disable-pip-version-check"], work))
    print("installed and used")


if __name__ == "__main__":
    main()
