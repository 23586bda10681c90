"""Folders and files with faults: histories, configurations, weights and cards; and disks that refuse."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaForCausalLM

from hf_compressm import CompreSSMConfig, RunReport, compress, load_cut_layers, read_history
from hf_compressm.compression import write_history
from hf_compressm.hub import push_folder
from hf_compressm.hub.loading import load_model
from hf_compressm.saving.one_model import require_one_model
from tests.cases import tiny_mamba, token_batch
from tests.selective_models import tiny_mamba2

from .disks import refusing_disk
from .judge import Case, fingerprint, mutated, with_odd_value

FIXED = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)


def saved(folder: Path, build: Callable[[], Any]) -> Path:
    """
    A folder with a compressed model, its history, its card and its settings.

    Args:
        folder (`Path`): Where it is made.
        build (`Callable`): Makes the model.
    """
    path = folder / build.__name__
    if not path.exists():
        model = build()
        compress(model, [token_batch()], FIXED)
        model.save_pretrained(path)
        FIXED.save_pretrained(path)
    return path


def readers(folder: Path) -> dict[str, tuple[Callable[[], Any], tuple[type[Exception], ...]]]:
    """
    What reads a folder, with the errors that are not this library's own.

    Args:
        folder (`Path`): The folder of a model.
    """
    return {
        "read_history": (lambda: _told(folder), (FileNotFoundError,)),
        "settings": (lambda: CompreSSMConfig.from_pretrained(folder), (FileNotFoundError, IsADirectoryError)),
        "load_model": (lambda: load_model(folder), ()),
        "load_cut_layers": (lambda: _taken(folder), ()),
        "RunReport": (lambda: RunReport.from_folder(folder).table(), ()),
        "a picture": (lambda: RunReport.from_folder(folder).plot(), ()),
        "push_folder": (lambda: _pushed(folder), ()),
        "require_one_model": (lambda: require_one_model(folder, MambaForCausalLM), ()),
        # What transformers says of a folder is its own affair; that it does not load something else is not.
        "from_pretrained": (lambda: AutoModelForCausalLM.from_pretrained(folder), (Exception,)),
    }


def _told(folder: Path) -> None:
    for record in read_history(folder):
        assert record.summary() and record.scalars()
        json.dumps(record.to_dict(), allow_nan=False)


def _taken(folder: Path) -> None:
    model = tiny_mamba()
    before = fingerprint(model)
    try:
        load_cut_layers(model, folder)
    except Exception:
        assert fingerprint(model) == before, "a refused folder changed the model"
        raise
    held, expected = model.state_dict(), load_file(folder / "model.safetensors")
    assert all(torch.equal(held[name], value) for name, value in expected.items()), "not all weights were taken"


def _pushed(folder: Path) -> None:
    hub = mock.Mock()
    hub.return_value.create_repo.return_value = SimpleNamespace(repo_id="user/name")
    with mock.patch("hf_compressm.hub.push.HfApi", hub):
        push_folder(folder, "user/name")
    load_model(folder)


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Faulty folders and disks without end.

    Args:
        draw (`random.Random`): Chooses the fault.
        folder (`Path`): Where folders may be made.
    """
    number = 0
    while True:
        number += 1
        source = saved(folder, draw.choice([tiny_mamba, tiny_mamba2]))
        path = folder / "faulty" / str(number)
        if draw.random() < 0.2:
            yield _full_disk(draw, path)
            continue
        shutil.copytree(source, path)
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        name = draw.choice(names)
        fault = damaged(draw, path / name)
        reader = draw.choice(list(readers(path)))
        run, own = readers(path)[reader]
        # A push completes a card before it is refused by the Hub; it writes nothing else.
        watched = [path / other for other in names if reader != "push_folder" or other != "README.md"]
        yield Case(f"{reader}: {name}, {fault}", str(path), run, partial(fingerprint, *watched), own=own)


def damaged(draw: random.Random, file: Path) -> str:
    """
    Give a file a fault; returns what it is.

    Args:
        draw (`random.Random`): Chooses the fault.
        file (`Path`): A file of a folder that only this input has.
    """
    content = file.read_bytes()
    faults = ["gone", "a folder in its place", "a dangling link", "no text", *["mutated"] * 4]
    faults += ["a value"] * 6 * (file.suffix == ".json") + ["another size"] * 3 * (file.name in _SIZED)
    fault = draw.choice(faults)
    if fault in ("another size", "a value"):
        return _of_other_size(draw, file) if fault == "another size" else _with_odd_value(draw, file)
    file.unlink()
    if fault == "a folder in its place":
        file.mkdir()
    elif fault == "a dangling link":
        file.symlink_to("nowhere")
    elif fault == "no text":
        file.write_bytes(b"\xff\xfe" + content[: draw.randrange(100)])
    elif fault == "mutated" and file.suffix in (".json", ".md"):
        text, fault = mutated(content.decode("utf-8"), draw)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    elif fault == "mutated":
        place = draw.randrange(len(content))
        changes = [content[:place], b"", content[:8] + b"\xff" * 8 + content[16:], content + b"more"]
        file.write_bytes(draw.choice([*changes, content[:place] + b"\x00" * 8 + content[place + 8 :]]))
    return fault


_SIZED = ("config.json", "model.safetensors", "compressm_history.json")


def _with_odd_value(draw: random.Random, file: Path) -> str:
    tree, fault = with_odd_value(json.loads(file.read_text(encoding="utf-8")), draw)
    file.write_text(json.dumps(tree), encoding="utf-8")
    return fault


def _of_other_size(draw: random.Random, file: Path) -> str:
    """One of configuration, history and weights says another state size than the others."""
    size = draw.choice([1, 2, 3, 7, 8, 9, 64, 10**9])
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        name = draw.choice(sorted(name for name, value in tensors.items() if value.ndim))
        length = tensors[name].shape[-1]
        tensors[name] = tensors[name].repeat_interleave(2, -1) if length < 2 else tensors[name][..., : length // 2]
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
        return "a tensor of another size"
    tree = json.loads(file.read_text(encoding="utf-8"))
    if "state_size" in tree:
        tree["state_size"] = size
    else:
        for check in tree["checks"]:
            for layer in check["layers"][: draw.choice([1, 2])]:
                layer["size_after"] = size
    file.write_text(json.dumps(tree), encoding="utf-8")
    return "another size"


def _full_disk(draw: random.Random, path: Path) -> Case:
    """Saving where a write, a rename or a folder is refused; what this library had written stays whole."""
    model = tiny_mamba()
    record = compress(model, [token_batch()], FIXED)
    others = CompreSSMConfig(tolerance=0.02)
    again = draw.random() < 0.6
    if again:
        model.save_pretrained(path)
        FIXED.save_pretrained(path)
    writers = {
        "model.save_pretrained": lambda: model.save_pretrained(path),
        "config.save_pretrained": lambda: others.save_pretrained(path),
        "write_history": lambda: write_history([record, record], path),
    }
    name = draw.choice(list(writers))
    what, refusing = refusing_disk(draw)

    def run() -> None:
        with refusing():
            writers[name]()

    def check(_: Any) -> None:
        if name == "model.save_pretrained":
            loaded = MambaForCausalLM.from_pretrained(path)
            pairs = zip(loaded.parameters(), model.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), "another model lies in the folder"
        elif name == "config.save_pretrained":
            assert CompreSSMConfig.from_pretrained(path) == others
        else:
            assert read_history(path) == [record, record]

    kept = [path / file for file in ("compressm_history.json", "compressm_config.json", "README.md")] if again else []
    return Case(f"{name}: {what}", str(path), run, partial(fingerprint, model, *kept), check, own=(OSError,))
