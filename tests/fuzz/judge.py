"""What an odd input may do: give a clear error of a known type and change nothing, or work."""

from __future__ import annotations

import hashlib
import json
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_compressm
from hf_compressm.errors import CompreSSMError

# What a model's forward pass, the Trainer and save_pretrained of transformers write into a config.
_OF_OTHERS = {"problem_type", "use_cache", "architectures", "dtype"}
_OURS = str(Path(hf_compressm.__file__).parent)
# The models that this library brings are a user's model as any other.
_MODELS = (f"{_OURS}/models/", f"{_OURS}/ops/")
# A message has to say something.
_SHORTEST = 15

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 7, -1, -7, 10**30, 0.0, 0.5, 1.0, 1.5, -0.25, 1e-300, 1e300, float("nan"),
    float("inf"), float("-inf"), "", " ", "0.5", "auto", "AUTO", "loss", "fixed", "tolerance", "target", "selection",
    "balanced", "interpolative", "loss_gradient", "closed_form", "white_noise", "carry", "reset", "layer", "model",
    "(", ".*", "\u0130\u4e2d\U0001f4a5", "\x00", "a" * 10_000, b"0.5", [], [0.0, 0.5], [0, 5], (0.5, 0.1), (0, 0),
    (0.0, 2.0), [1], [None, None], ["a", "b"], [[0.0], 1], {}, {"a": 1}, {1, 2}, object(), int, torch.tensor(0.5),
    torch.tensor([1, 2]), 1j, range(3), lambda: 0.5, Path("."),
]  # fmt: skip

ODD_JSON: list[Any] = [
    None, True, False, 0, 1, 3, 5, -1, 10**30, 0.5, -1.5, 1e300, float("nan"), float("inf"), "", "4", "\u4e2d",
    "\ud800", "a" * 5000, [], [None], [[]], [4, 4], {}, {"a": 1}, {"": {"": []}},
]  # fmt: skip


@dataclass
class Case:
    """
    One odd input.

    Args:
        kind (`str`): What is odd in it, for the table.
        shown (`str`): The input, for the message of a failure.
        run (`Callable`): Does what a user would do with it.
        watched (`Callable`): A fingerprint of all that must not change where `run` raises.
        check (`Callable`, *optional*): Raises `AssertionError` where the result of a `run` that works is not right.
        own (`tuple[type[Exception], ...]`, *optional*): What the user's own code raises, which may pass through.
        own_places (`tuple[str, ...]`, *optional*): Pieces of paths. Where this library's lines had a part in an error
            of `own`, a file with such a piece has to be called by them; what they raise by themselves is no clear
            error. Anything is allowed where there are none.
        names (`tuple[str, ...]`, *optional*): The message of an error of this library has to hold one of them.
    """

    kind: str
    shown: str
    run: Callable[[], Any]
    watched: Callable[[], str] = field(default=lambda: "")
    check: Callable[[Any], None] = field(default=lambda result: None)
    own: tuple[type[Exception], ...] = ()
    own_places: tuple[str, ...] = ()
    names: tuple[str, ...] = ("",)


class BrokenRule(AssertionError):
    """An odd input that did what none may."""


def judged(case: Case) -> str:
    """
    `"worked"`, or the name of the error that refused the input.

    Args:
        case (`Case`): The input.

    Raises:
        BrokenRule: the error is none of a known type, says nothing, or something was changed.
    """
    before = case.watched()
    try:
        result = case.run()
    except Exception as error:
        problem = _problem_of(error, case)
        if problem is None and case.watched() != before:
            problem = f"was refused ({error}), and something was changed"
        if problem is not None:
            raise BrokenRule(f"{case.kind}: {case.shown} {problem}") from error
        return type(error).__name__
    try:
        case.check(result)
    except AssertionError as error:
        raise BrokenRule(f"{case.kind}: {case.shown} was taken, and {error or 'the result is wrong'}") from error
    return "worked"


def _problem_of(error: Exception, case: Case) -> str | None:
    """What is wrong with an error, or None."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, CompreSSMError):
        if len(str(error)) < _SHORTEST or "\n" in str(error).strip():
            return f"gave an error that says too little or too much: {text!r}"
        return (
            None if any(name in str(error) for name in case.names) else f"gave an error that does not name it: {text}"
        )
    return None if isinstance(error, case.own) and _is_raised_by_others(error, case.own_places) else f"gave {text}"


def _is_raised_by_others(error: Exception, places: tuple[str, ...]) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [number for number, file in enumerate(files) if file.startswith(_OURS) and not file.startswith(_MODELS)]
    called = files[ours[-1] + 1 :] if ours else []
    return not ours or not places or any(place in file for place in places for file in called)


def shown(value: Any) -> str:
    """A value in few letters."""
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def fingerprint(*things: Any) -> str:
    """
    A digest of models, optimizers, folders and plain values.

    Args:
        things (`Any`): What must not change.
    """
    digest = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, nn.Module):
            for name, tensor in [*thing.named_parameters(), *thing.named_buffers()]:
                digest.update(name.encode())
                add(tensor)
            add([module.training for module in thing.modules()])
            if hasattr(thing, "config") and hasattr(thing.config, "to_dict"):
                kept = {name: value for name, value in thing.config.to_dict().items() if name not in _OF_OTHERS}
                digest.update(json.dumps(kept, default=str, sort_keys=True).encode())
        elif isinstance(thing, torch.optim.Optimizer):
            add([len(group["params"]) for group in thing.param_groups])
            add([list(state.values()) for state in thing.state.values()])
        elif isinstance(thing, torch.Tensor):
            digest.update(f"{thing.dtype} {tuple(thing.shape)} {thing.requires_grad}".encode())
            if thing.device.type != "meta":
                digest.update(thing.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(thing, Path):
            for file in sorted(thing.rglob("*")) if thing.is_dir() else [thing]:
                digest.update(str(file).encode())
                digest.update(file.read_bytes() if file.is_file() else b"")
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                add(part)
        else:
            digest.update(repr(thing).encode())

    for thing in things:
        add(thing)
    return digest.hexdigest()


def with_odd_value(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """
    JSON of the right form with one value of another kind, or without it, and what was done.

    Args:
        tree (`Any`): What `json.loads` gave; it is left as it is.
        draw (`random.Random`): Chooses the place and the value.
    """
    tree = json.loads(json.dumps(tree))
    place: Any = tree
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.2:
            break
        place = place[key]
    if draw.random() < 0.2:
        del place[key]
        return tree, "an entry missing"
    present = place[key]
    place[key] = draw.choice([value for value in ODD_JSON if type(value) is not type(present) or value != present])
    kind = "of another type" if type(place[key]) is not type(present) else "of the same type"
    return tree, f"a value {kind}"


def mutated(text: str, draw: random.Random) -> tuple[str, str]:
    """
    A text with a fault, and what the fault is.

    Args:
        text (`str`): JSON, or anything else.
        draw (`random.Random`): Chooses the fault.
    """
    faults = ["cut off", "a letter replaced", "a piece twice", "a piece missing", "empty", "other", "null", "NaN"]
    fault = draw.choice(faults)
    place = draw.randrange(max(1, len(text)))
    if fault == "cut off":
        return text[:place], fault
    if fault == "a letter replaced":
        return text[:place] + draw.choice('{}[]",:0x\x00\u4e2d') + text[place + 1 :], fault
    if fault in ("a piece twice", "a piece missing"):
        end = place + draw.randrange(1, 20)
        return text[:end] + (text[place:] if fault == "a piece twice" else text[end + 5 :]), fault
    if fault == "null":
        return text.replace(draw.choice(["0", "1", '"', "true", "["]), "null", 1), fault
    if fault == "NaN":
        number = draw.choice(["NaN", "Infinity", "1e999", "-3"])
        return text.replace(draw.choice(["0", "1", "2", "false"]), number, 1), fault
    return (
        "" if fault == "empty" else draw.choice(["[]", "{}", "3", '"text"', "\ufeff{}", "null", "\x80", "[" * 100_000])
    ), fault
