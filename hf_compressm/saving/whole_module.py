"""All weights of a module from its files, whatever shapes its cut layers have there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..architectures import StateForm, StateSpaceLayer, find_layers, take_forms
from ..errors import InconsistentModelError
from .one_model import INDEX_NAME, WEIGHTS_NAME, shard_names

PICKLE_NAME = "pytorch_model.bin"
WHOLE_NAMES = (WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME)


def weights_file(path: Path) -> Path | None:
    """
    The file by which a module's weights are read: itself, or the one in a folder; None where there is none.

    Args:
        path (`Path`): A folder, or a file in it.
    """
    if path.is_file():
        return path
    return next((path / name for name in WHOLE_NAMES if (path / name).is_file()), None)


def load_whole(model: nn.Module, file: Path) -> None:
    """
    Give a module the shapes and values of all its weights.

    Args:
        model (`torch.nn.Module`): Built with any state size. It is changed in place.
        file (`Path`): From [`weights_file`].

    Raises:
        [`~errors.InconsistentModelError`]: the file cannot be read, or does not hold this module. Nothing was changed.
        [`~errors.UnsupportedModelError`]: the module has no layer that can be cut.
    """
    layers, saved = find_layers(model), _read(file)
    forms = {layer.name: _form(layer, saved, file) for layer in layers}
    _require_fit(model, layers, forms, saved, file)
    take_forms(model, layers, forms)
    model.load_state_dict(saved, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.name.endswith(".json"):
            files = [file.parent / name for name in sorted(shard_names(file))]
            return {name: value for part in files for name, value in load_file(part).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except InconsistentModelError:
        raise
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InconsistentModelError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # pickle and zip have errors of their own
        raise InconsistentModelError(f"{file} cannot be read without running code in it: {error!r:.200}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InconsistentModelError(f"{file} is no state dict; save one with torch.save(model.state_dict(), ...).")
    return dict(found)


def _form(layer: StateSpaceLayer, saved: Mapping[str, Tensor], file: Path) -> StateForm:
    form = layer.saved_form(saved, f"{layer.name}." if layer.name else "")
    if form is None or not 1 <= form.size <= form.projected:
        raise InconsistentModelError(
            f"{file} has no state size of {layer.name or 'the model'}; give the module that was saved there."
        )
    return form


def _require_fit(
    model: nn.Module,
    layers: list[StateSpaceLayer],
    forms: Mapping[str, StateForm],
    saved: Mapping[str, Tensor],
    file: Path,
) -> None:
    present = model.state_dict()
    wanted = {name: tuple(value.shape) for name, value in present.items()}
    for layer in layers:
        start = f"{layer.name}." if layer.name else ""
        for name in layer.shapes_of_form(layer.form):
            wanted.pop(start + name, None)
        wanted.update({start + name: shape for name, shape in layer.shapes_of_form(forms[layer.name]).items()})
    # Of tensors that are one, safetensors keeps one.
    held = {present[name].data_ptr() for name in saved if name in present}
    missing = [n for n in wanted if n not in saved and not (n in present and present[n].data_ptr() in held)]
    problems = [f"{name} is {tuple(saved[name].shape)} there and {wanted[name]} in the model" for name in wanted
                if name in saved and tuple(saved[name].shape) != wanted[name]]  # fmt: skip
    problems += [f"{name} is missing there" for name in missing]
    problems += [f"{name} is not in the model" for name in saved if name not in wanted]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InconsistentModelError(
            f"{file} does not hold this {type(model).__name__}: {problems[0]}{more}. Nothing was changed. Build the "
            "module as it was built for the training; one of transformers is loaded with its from_pretrained."
        )
