"""Odd arguments of `analyze` and `compress`: models, batches, settings, optimizers and loss functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from tests.cases import TRAINED_CASES, tiny_mamba, token_batch

from .judge import ODD_VALUES, Case, fingerprint, shown
from .settings import odd_settings


class OwnError(Exception):
    """What a user's own loss function raises."""


def _with_weights(value: float) -> nn.Module:
    model = tiny_mamba()
    model.backbone.layers[1].mixer.x_proj.weight.data[0, 0] = value
    return model


def _frozen() -> nn.Module:
    return tiny_mamba().requires_grad_(False)


def _double() -> nn.Module:
    return tiny_mamba().double()


def _without_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3))


ODD_MODELS: dict[str, Callable[[], Any]] = {
    "a weight is NaN": partial(_with_weights, float("nan")),
    "a weight is infinite": partial(_with_weights, float("inf")),
    "a weight is huge": partial(_with_weights, 1e30),
    "frozen": _frozen,
    "float64": _double,
    "float16": lambda: tiny_mamba().half(),
    "bfloat16": lambda: tiny_mamba().bfloat16(),
    "on the meta device": lambda: tiny_mamba().to("meta"),
    "no layer": _without_layers,
    "no parameters": nn.Identity,
    "no module": lambda: "state-spaces/mamba-130m-hf",
    "None": lambda: None,
    "a class": lambda: nn.Linear,
}


def odd_batches(draw: random.Random, batch: dict[str, torch.Tensor]) -> tuple[str, Any]:
    """
    Calibration batches that are odd, and what is odd in them.

    Args:
        draw (`random.Random`): Chooses them.
        batch (`dict`): A batch of the model.
    """
    name = draw.choice(list(batch))
    first = batch[name]
    odd = {
        "an odd value": draw.choice(ODD_VALUES),
        "no batch": [],
        "an empty dict": [{}],
        "a list of odd values": [draw.choice(ODD_VALUES)],
        "an entry missing": [{key: value for key, value in batch.items() if key != name}],
        "an entry odd": [{**batch, name: draw.choice(ODD_VALUES)}],
        "an unknown entry": [{**batch, "colour": torch.zeros(2)}],
        "no rows": [{key: value[:0] for key, value in batch.items()}],
        "no steps": [{key: value[:, :0] if value.ndim > 1 else value for key, value in batch.items()}],
        "one step": [{key: value[:, :1] if value.ndim > 1 else value for key, value in batch.items()}],
        "one row": [{key: value[:1] for key, value in batch.items()}],
        "another shape": [{**batch, name: first[..., None]}],
        "integers as floats": [{key: value.float() for key, value in batch.items()}],
        "floats as integers": [{key: value.long() for key, value in batch.items()}],
        "numbers out of range": [{**batch, name: first + 10_000}],
        "negative numbers": [{**batch, name: -first - 1}],
        "NaN": [{**batch, name: first * float("nan")}],
        "huge numbers": [{**batch, name: first * 1e30}],
        "labels that count for nothing": [{**batch, "labels": torch.full_like(batch["labels"], -100)}],
        "a generator": (each for each in [batch]),
        "a used generator": iter(()),
        "a good one and a bad one": [batch, {}],
        "a bare tensor": [first],
        "strings": ["some text"],
    }
    what = draw.choice(list(odd))
    return what, odd[what]


def odd_loss(draw: random.Random) -> tuple[str, Any]:
    """
    A loss function that is odd, and what it does.

    Args:
        draw (`random.Random`): Chooses it.
    """

    def raising(model, batch):
        raise OwnError("raised by the loss function of the user")

    odd = {
        "gives None": lambda model, batch: None,
        "gives a string": lambda model, batch: "0.5",
        "gives a number": lambda model, batch: 0.5,
        "gives NaN": lambda model, batch: model(**batch).loss * float("nan"),
        "gives infinity": lambda model, batch: model(**batch).loss * float("inf"),
        "gives a vector": lambda model, batch: model(**batch).loss.expand(3),
        "gives no gradient": lambda model, batch: model(**batch).loss.detach(),
        "gives another tensor": lambda model, batch: torch.tensor(1.0, requires_grad=True),
        "gives an integer tensor": lambda model, batch: torch.tensor(1),
        "raises": raising,
        "takes no arguments": lambda: 1.0,
        "empties the batch": lambda model, batch: model(**{key: batch.pop(key) for key in list(batch)}).loss,
        "is no function": draw.choice([1, "loss", [], float("nan")]),
        "is a class": nn.Linear,
    }
    what = draw.choice(list(odd))
    return what, odd[what]


def odd_optimizer(draw: random.Random, model: nn.Module) -> tuple[str, Any]:
    """
    An optimizer that is odd, and what is odd in it.

    Args:
        draw (`random.Random`): Chooses it.
        model (`torch.nn.Module`): What a good one would train.
    """
    parameters = list(model.parameters())
    stepped = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    stepped.zero_grad()
    odd = {
        "an odd value": draw.choice(ODD_VALUES[1:]),
        "of another model": torch.optim.SGD(tiny_mamba().parameters()),
        "of one parameter": torch.optim.AdamW(parameters[:1]),
        "without state": torch.optim.SGD(parameters, lr=0.1),
        "with state": stepped,
        "L-BFGS": torch.optim.LBFGS(parameters),
        "a class": torch.optim.AdamW,
    }
    what = draw.choice(list(odd))
    return what, odd[what]


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Odd calls without end.

    Args:
        draw (`random.Random`): Chooses them.
        folder (`Path`): Not used.
    """
    while True:
        kind = draw.choice(["model", "batches", "batches", "settings", "settings", "optimizer", "loss function"])
        family = draw.choice(TRAINED_CASES)
        model, optimizer, loss, own, places = family.build(), None, None, (), ()
        good = family.batch()
        batches, config = [good], CompreSSMConfig(strategy="fixed", keep_ratio=0.5)
        what = ""
        if kind == "model":
            what = draw.choice(list(ODD_MODELS))
            model = ODD_MODELS[what]()
            good = batches = [token_batch()]
        elif kind == "batches":
            what, batches = odd_batches(draw, good)
            # The model's own words for what it cannot take.
            own, places = (Exception,), ("/torch/nn/modules/module.py", "/transformers/models/")
        elif kind == "settings":
            config = odd_settings(draw)
            what = shown(config)
        elif kind == "optimizer":
            what, optimizer = odd_optimizer(draw, model)
        else:
            what, loss = odd_loss(draw)
            own = (OwnError, TypeError, KeyError, AttributeError)
            # Python's own words name a function that takes other arguments, and its caller is this library.
            places = () if what == "takes no arguments" else (__file__, "/torch/nn/modules/")
        if draw.random() < 0.3 and optimizer is None:
            call = partial(analyze, model, batches, config, loss_function=loss)
            name = "analyze"
        else:
            call = partial(compress, model, batches, config, optimizer, loss_function=loss)
            name = "compress"
        watched = [thing for thing in (model, optimizer) if isinstance(thing, (nn.Module, torch.optim.Optimizer))]
        what = f"{kind}, {what}" if kind != "settings" else kind
        yield Case(
            f"{name}: {what}", f"{family.name}, {what}, {shown(config)}", call, partial(fingerprint, *watched),
            partial(_require_sound, model, name), own, places,
        )  # fmt: skip


def _require_sound(model: nn.Module, name: str, result: Any) -> None:
    """What was cut has finite weights where those of before were, and every layer has the size that the record says."""
    if name == "analyze" or result.outcome != "cut":
        return
    sizes = {layer.name: layer.state_size for layer in find_layers(model)}
    assert all(sizes[layer.name] == layer.size_after for layer in result.layers), "sizes and record differ"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), "a weight is not finite"
