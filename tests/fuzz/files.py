"""Folders and files with faults: histories, configurations, weights, cards and checkpoints; and disks that refuse."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, MambaForCausalLM

from hf_compressm import CompreSSMConfig, RunReport, compress, load_cut_layers, read_history
from hf_compressm.hub.loading import load_model
from hf_compressm.saving.one_model import require_one_model
from tests.cases import tiny_mamba, token_batch
from tests.selective_models import tiny_mamba2

from .judge import Case, fingerprint, mutated

FIXED = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)


def saved(folder: Path, build: Callable[[], Any]) -> Path:
    """
    A folder with a compressed model, its history and its card.

    Args:
        folder (`Path`): Where it is made.
        build (`Callable`): Makes the model.
    """
    path = folder / build.__name__
    if not path.exists():
        model = build()
        compress(model, [token_batch()], FIXED)
        model.save_pretrained(path)
    return path


def readers(folder: Path) -> dict[str, tuple[Callable[[], Any], tuple[type[Exception], ...]]]:
    """
    What reads a folder, with the errors that are not this library's own.

    Args:
        folder (`Path`): The folder of a model.
    """
    return {
        "read_history": (lambda: read_history(folder), (FileNotFoundError,)),
        "load_model": (lambda: load_model(folder), ()),
        "load_cut_layers": (lambda: load_cut_layers(tiny_mamba(), folder), ()),
        "RunReport": (lambda: RunReport.from_folder(folder), ()),
        "require_one_model": (lambda: require_one_model(folder, MambaForCausalLM), ()),
        # What transformers says of a folder is its own affair; that it does not load something else is not.
        "from_pretrained": (lambda: AutoModelForCausalLM.from_pretrained(folder), (Exception,)),
    }


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
        if draw.random() < 0.25:
            yield _full_disk(draw, path)
            continue
        shutil.copytree(source, path)
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        name = draw.choice(names)
        fault = _damage(draw, path / name, path)
        reader = draw.choice(list(readers(path)))
        run, own = readers(path)[reader]
        yield Case(f"{reader}: {name}, {fault}", str(path), run, partial(fingerprint, path), own=own)


def _damage(draw: random.Random, file: Path, folder: Path) -> str:
    faults = ["gone", "a folder in its place", "of another model", "a dangling link"]
    fault = draw.choice([*faults, "mutated", "mutated", "mutated", "mutated"])
    if fault == "of another model":
        other = folder.parent.parent / ("tiny_mamba2" if file.read_bytes() else "tiny_mamba")
        if (other / file.name).is_file():
            file.write_bytes((other / file.name).read_bytes())
        return fault
    content = file.read_bytes()
    file.unlink()
    if fault == "a folder in its place":
        file.mkdir()
    elif fault == "a dangling link":
        file.symlink_to("nowhere")
    elif fault == "mutated":
        if file.suffix == ".safetensors":
            place = draw.randrange(len(content))
            changed = draw.choice([content[:place], b"", content[:8] + b"\xff" * 8 + content[16:], content + b"more"])
            file.write_bytes(changed)
        else:
            text, fault = mutated(content.decode("utf-8", errors="replace"), draw)
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return fault


def _full_disk(draw: random.Random, path: Path) -> Case:
    """Saving a compressed model where a write, a rename or a folder is refused; what was there stays whole."""
    model = tiny_mamba()
    compress(model, [token_batch()], FIXED)
    again = draw.random() < 0.5
    if again:
        model.save_pretrained(path)
    code = draw.choice([errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
    what = draw.choice(["os.replace", "os.fsync", "os.open", "pathlib.Path.write_text", "os.makedirs"])

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    def run() -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch(what, refuse))
            model.save_pretrained(path)

    def check(_: Any) -> None:
        loaded = MambaForCausalLM.from_pretrained(path)
        pairs = zip(loaded.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "another model lies in the folder"

    kind = f"save_pretrained: {what} gives {errno.errorcode[code]}"
    return Case(kind, str(path), run, partial(fingerprint, model), check, own=(OSError,))
