"""What all commands share: options, messages, progress, and errors in one line."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..errors import CompreSSMError, ConfigurationError, UnsupportedModelError

WRONG_USAGE = 2
NOTHING_TO_CUT = 3

# What a person typed, for the setting of `CompreSSMConfig` that a message names.
_FLAGS = {
    "Leave uniform=True": "Leave it out",
    "uniform=False": "--per-layer",
    "stock=True": "--stock",
    "set allow_growth=True": "give --allow-growth",
    "projection_rows": "--projection-rows",
    "target_state_size": "--state-size",
    "state_size": "--state-size",
    "target_ratio": "--ratio",
    "ratio": "--ratio",
    "max_loss_increase": "--max-loss-increase",
    "tolerance": "--tolerance",
    "reductor": "--method",
    "multiple_of": "--multiple-of",
    "gramians": "--gramians",
    "sizes": "--sizes",
}

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks; results and errors only.")]
GRAMIANS_HELP = (
    "How states are measured: loss_gradient, white_noise or averaged; for LRU and S4D also input_weighted (no labels "
    "needed) or closed_form (no data needed)."
)
ROWS_HELP = (
    "Where layers mix their states, keep this many rows of the projections of B and of C, or this share of them: 32 or "
    "0.5."
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings along.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]

_Command = TypeVar("_Command", bound=Callable[..., None])


def say(text: str, quiet: bool = False) -> None:
    """A remark to a person, on the error stream, so that results can be piped."""
    if not quiet:
        typer.echo(text, err=True)


def command(function: _Command) -> _Command:
    """
    Give a command quiet libraries, errors of one line, and options that belong together as one object.

    Args:
        function (`Callable`): Takes `quiet` and `debug`. A parameter that is a dataclass gets one option a field,
            which is annotated as a parameter of a command is.
    """
    parameters, groups = [], {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            hints = get_type_hints(parameter.annotation, include_extras=True)
            groups[parameter.name] = parameter.annotation
            parameters += [
                parameter.replace(name=field.name, annotation=hints[field.name], default=field.default)
                for field in fields(parameter.annotation)
            ]
        else:
            parameters.append(parameter)

    @functools.wraps(function)
    def wrapped(*, quiet: bool, debug: bool, **options: Any) -> None:
        _hush(quiet, debug)
        try:
            for name, group in groups.items():
                options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
            function(quiet=quiet, debug=debug, **options)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo("hf-compressm: interrupted; nothing was left half-written.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if debug:
                raise
            typer.echo(f"hf-compressm: error: {explanation(error)}", err=True)
            raise typer.Exit(WRONG_USAGE if isinstance(error, ConfigurationError) else 1) from None

    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def explanation(error: Exception) -> str:
    """One line that says what went wrong and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, (ConfigurationError, UnsupportedModelError)):
        return in_flags(text)
    if isinstance(error, CompreSSMError):
        return text
    if _is_full_disk(error):
        return "the disk is full. Free some space and run it again; files that were there before are whole."
    if isinstance(error, PermissionError):
        return f"no permission: {text}. Choose another folder, or change its rights."
    if isinstance(error, (FileNotFoundError, FileExistsError)):
        return text
    if isinstance(error, ModuleNotFoundError):
        return f'{text}. Install it with `pip install "hf_compressm[recipes]"`.'
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def rows_of(text: str | None) -> float | int | None:
    """
    The value of --projection-rows.

    Args:
        text (`str`, *optional*): What was typed: a number, or a share.

    Raises:
        [`~errors.ConfigurationError`]: it is neither.
    """
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ConfigurationError(
            f"projection_rows is {text!r}; give a share such as 0.5, or a number of rows such as 32."
        ) from error


def in_flags(text: str) -> str:
    """
    The message of a configuration with the flags that a person typed in place of its settings.

    Args:
        text (`str`): The message.
    """
    for name, flag in _FLAGS.items():
        # A setting is followed by its value, or stands beside another one; words of a sentence stay.
        text = re.sub(rf"(?<![\w'-]){re.escape(name)}(?=( is | has | would |$|[,.;]))", flag, text)
    if "--ratio is" in text or "--ratio " in text[:8]:
        text = text.replace("for example 0.01", "for example 0.5")
    return text


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether the disk is full; safetensors says so in words only."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return "No space left on device" in str(error) or _is_full_disk(error.__cause__)


def _hush(quiet: bool, debug: bool) -> None:
    """Let other libraries speak of errors only, and show progress only to a person who wants it."""
    if debug:
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_compressm").setLevel(logging.ERROR if quiet else logging.NOTSET)


def quiet_libraries() -> None:
    """Set the same for libraries that have to be imported for it; call it before they work."""
    import datasets
    import huggingface_hub
    import transformers

    # Of a broken connection one error tells enough.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    # Reading a file is over before a bar for it could be read.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
