"""`hf-compressm analyze`: what every layer's state is worth, what a tolerance would keep, and what that would gain."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    GRAMIANS_HELP,
    ROWS_HELP,
    Debug,
    Quiet,
    Revision,
    TrustRemoteCode,
    command,
    in_flags,
    quiet_libraries,
    rows_of,
    say,
)
from .data import DataSource, read_batches, require_tokenizer, told_how_to_give_data

if TYPE_CHECKING:
    from ..compression import Spectrum
    from ..config import CompreSSMConfig

_ENERGIES = (0.9, 0.95, 0.99, 0.999)

_Sizes = Annotated[
    str | None, typer.Option(help="Cut to each of these state sizes, measure, and put back: for example 8,16,32.")
]


@command
def analyze(
    model: Annotated[str, typer.Argument(help="A folder, or a model on the Hub (user/name).")],
    source: DataSource,
    tolerance: Annotated[float, typer.Option(help="Share of the Hankel energy that a cut might drop.")] = 0.01,
    sizes: _Sizes = None,
    gramians: Annotated[str, typer.Option(help=GRAMIANS_HELP)] = "loss_gradient",
    projection_rows: Annotated[str | None, typer.Option(help=ROWS_HELP)] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the spectra into this file, for example spectrum.png.")
    ] = None,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Do not time training steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Measure the Hankel singular values of every layer.

    Prints one row a layer: how many of its states carry 90 to 99.9% of the Hankel energy, how many --tolerance asks
    for, and what `compress` would make of the layer. Nothing is changed, and nothing written but the picture that
    --plot asks for. Mamba needs a little data with the loss it was trained for; time-invariant layers (LRU, S4D) need
    none.

    **Examples**

    ```console
    hf-compressm analyze state-spaces/mamba-130m-hf --text-file book.txt
    hf-compressm analyze my-model --text-file book.txt --plot spectrum.png
    hf-compressm analyze my-model --sizes 8,16,32 --text-file book.txt
    hf-compressm analyze runs/my-lru --tolerance 0.02 --json
    ```
    """
    quiet_libraries()
    from ..api import analyze as measure
    from ..config import CompreSSMConfig
    from ..hub import fetch, load_model

    timed = not no_timing
    settings = {"tolerance": tolerance, "gramians": gramians, "projection_rows": rows_of(projection_rows)}
    config, tried = CompreSSMConfig(**settings), _sizes(sizes)
    folder = fetch(model, revision, trust_remote_code=trust_remote_code)
    require_tokenizer(folder, source)
    loaded = load_model(folder, trust_remote_code)
    batches = read_batches(loaded, folder, source).calibration
    with told_how_to_give_data(source):
        spectrum = measure(loaded, batches or None, config, progress=False if quiet else None, sizes=tried, timed=timed)
        result = _measure(loaded, batches, config, spectrum, quiet, timed)
    result = {
        "model": model,
        "data": source.describe() if source.is_given else None,
        "tolerance": tolerance,
        **result,
        **({"sizes": [asdict(row) for row in spectrum.sizes]} if spectrum.sizes else {}),
    }
    if plot is not None:
        spectrum.plot(plot, tolerance=tolerance)
        result["picture"] = str(plot)
    _tell(result, spectrum, as_json, quiet)


def _tell(result: dict[str, Any], spectrum: Spectrum, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    typer.echo("\n\n".join([_table(result), *([spectrum.size_table()] if spectrum.sizes else [])]))
    if "picture" in result:
        say(f"The spectra: {result['picture']}", quiet)


def _sizes(text: str | None) -> list[int]:
    from ..errors import ConfigurationError

    try:
        return [] if text is None else [int(size) for size in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--sizes is {text!r}; give whole numbers with commas, such as 8,16,32.") from error


def _measure(
    model: Any, batches: list, config: CompreSSMConfig, spectrum: Spectrum, quiet: bool, timed: bool
) -> dict[str, Any]:
    """What the model is, what each of its layers is worth, and what a cut would make of them."""
    from ..architectures import find_layers
    from ..compression import Compressor
    from ..compression.costs import training_step_seconds

    layers, batch = find_layers(model), batches[0] if batches else {}
    parameters = model.num_parameters()
    counts = {layer.name: (_count(layer.state_parameters().values()), _count_all(layer)) for layer in layers}
    seconds = training_step_seconds(model, batch) if timed and "labels" in batch else None
    # The model is not saved, so that the cut itself shows best what would become of it.
    record = Compressor(model, config, progress=False if quiet else None).check(batches)
    measured = {layer.name: layer for layer in record.layers}
    ranks = {energy: spectrum.ranks(1 - energy) for energy in _ENERGIES}
    entries = []
    for layer in [layer for layer in layers if layer.name in measured]:
        (state_parameters, whole), seen = counts[layer.name], measured[layer.name]
        entries.append(
            {
                "name": layer.name,
                "family": layer.family,
                "state_size": seen.size_before,
                "effective_rank": {f"{energy:g}": ranks[energy][layer.name] for energy in _ENERGIES},
                "wanted_at_tolerance": seen.wanted_size,
                "kept_at_tolerance": seen.size_after,
                "state_parameters": state_parameters,
                "state_parameters_at_tolerance": state_parameters + _count_all(layer) - whole,
                "rows": seen.rows_before,
                "rows_at_tolerance": seen.rows_after,
                "state_bytes": seen.state_bytes_before,
                "state_bytes_at_tolerance": seen.state_bytes_after,
                "hankel_singular_values": spectrum.sigma[layer.name].tolist(),
            }
        )
    step = None
    if seconds is not None:
        size = max(entry["kept_at_tolerance"] for entry in entries)
        shape = list(next(iter(batch.values())).shape[:2])
        after = training_step_seconds(model, batch) if record.outcome == "cut" else seconds
        step = {"state_size": size, "seconds": seconds, "seconds_at_tolerance": after, "batch_and_length": shape}
    return {
        "parameters": parameters,
        "parameters_at_tolerance": record.parameters_after,
        "loss": record.loss_before,
        "loss_at_tolerance": record.loss_after if record.outcome == "cut" else record.loss_before,
        "narrowed": record.narrowed,
        "outcome": record.outcome,
        "reason": in_flags(record.reason),
        "layers": entries,
        "training_step": step,
    }


def _count(parameters: Iterable[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _count_all(layer: Any) -> int:
    return _count(layer.module.parameters())


def _table(result: dict[str, Any]) -> str:
    from tabulate import tabulate

    header = ["layer", "N", *(f"{energy:.4g}" for energy in _ENERGIES)]
    header += [f"asks at {result['tolerance']:g}", "would keep", "state parameters", "state bytes"]
    rows = [
        [
            entry["name"] or "(model)",
            entry["state_size"],
            *entry["effective_rank"].values(),
            entry["wanted_at_tolerance"],
            entry["kept_at_tolerance"],
            f"{entry['state_parameters']:,} -> {entry['state_parameters_at_tolerance']:,}",
            ""
            if entry["state_bytes"] is None
            else f"{entry['state_bytes']:,} -> {entry['state_bytes_at_tolerance']:,}",
        ]
        for entry in result["layers"]
    ]
    align = ["left", *["right"] * (len(header) - 1)]
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, {len(rows)} layers"
        + (f"; measured on {result['data']}, loss {result['loss']:.4f}" if result["loss"] is not None else ""),
        "",
        tabulate(rows, headers=header, colalign=align, disable_numparse=True),
        "",
        "0.9 to 0.999: states that keep that share of the Hankel energy. State bytes: recurrent state of one sequence.",
    ]
    cut = result["outcome"] == "cut"
    if cut:
        loss = "" if result["loss"] is None else f", loss {result['loss']:.4f} -> {result['loss_at_tolerance']:.4f}"
        parameters = f"{result['parameters']:,} -> {result['parameters_at_tolerance']:,} parameters"
        narrowed = f", {result['narrowed']}" if result["narrowed"] else ""
        lines.append(f"`compress` at this tolerance: {parameters}{narrowed}{loss}.")
    else:
        lines.append(f"`compress` would leave the model as it is: {result['reason'].removeprefix('left as it was: ')}.")
    step = result["training_step"]
    if step is not None:
        batch, length = step["batch_and_length"]
        before, after = step["seconds"], step["seconds_at_tolerance"]
        then = f", {after * 1e3:.1f} ms after the cut ({before / after:.2f}x)" if cut else ""
        lines.append(f"Training step of {batch} x {length} on this machine: {before * 1e3:.1f} ms now{then}.")
    return "\n".join(lines)
