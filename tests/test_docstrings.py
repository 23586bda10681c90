"""Every public thing says what it does, and names every argument."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pkgutil

import pytest
import torch

import hf_compressm


def public_things() -> list[tuple[str, object]]:
    things = []
    for info in pkgutil.walk_packages(hf_compressm.__path__, "hf_compressm."):
        if info.name.endswith("_triton") and not importlib.util.find_spec("triton"):
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            is_code = inspect.isclass(thing) or inspect.isfunction(thing)
            if name.startswith("_") or not is_code or thing.__module__ != info.name:
                continue
            things.append((f"{info.name}.{name}", thing))
            if inspect.isclass(thing):
                things += [
                    (f"{info.name}.{name}.{method}", member)
                    for method, member in vars(thing).items()
                    if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
                ]
    return things


THINGS = public_things()


@pytest.mark.parametrize("thing", [thing for _, thing in THINGS], ids=[name for name, _ in THINGS])
def test_is_documented(thing: object) -> None:
    assert inspect.getdoc(thing), "a public name needs a docstring"


def documented_arguments(thing: object) -> list[str]:
    """Arguments that a docstring must name: all of a class or function with more than two."""
    if isinstance(thing, property):
        return []
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            own = inspect.get_annotations(thing)
            return [field.name for field in dataclasses.fields(thing) if field.init and field.name in own]
        if "__init__" not in vars(thing) or issubclass(thing, (torch.autograd.Function,)):
            return []
        signature = inspect.signature(thing.__init__)
    else:
        is_command = thing.__module__.startswith("hf_compressm.cli.") and hasattr(thing, "__wrapped__")
        signature = inspect.signature(thing, eval_str=is_command)
    names = [name for name in signature.parameters if name not in ("self", "cls", "ctx", "args", "kwargs")]
    # An option of a command is documented where --help finds it.
    names = [name for name in names if not _help_of(signature.parameters[name])]
    is_event = getattr(thing, "__name__", "").startswith("on_")
    return [] if is_event or (not inspect.isclass(thing) and len(names) < 3) else names


def _help_of(parameter: inspect.Parameter) -> str | None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        return None
    return next(
        (found for extra in getattr(annotation, "__metadata__", ()) if (found := getattr(extra, "help", None))), None
    )


@pytest.mark.parametrize("thing", [thing for _, thing in THINGS], ids=[name for name, _ in THINGS])
def test_names_its_arguments(thing: object) -> None:
    text = inspect.getdoc(thing) or ""
    missing = [name for name in documented_arguments(thing) if f"{name} (" not in text and name not in text]
    assert not missing, f"the docstring does not name {missing}"


def test_there_is_something_to_test() -> None:
    assert len(THINGS) > 50
