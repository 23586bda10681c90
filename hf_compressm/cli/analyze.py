"""`hf-compressm analyze`: what every layer's state is worth, what a tolerance would keep, and what that would gain."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import GRAMIANS_HELP, Debug, Quiet, Revision, TrustRemoteCode, command, quiet_libraries, say
from .data import DataSource, read_batches, require_tokenizer, told_how_to_give_data

if TYPE_CHECKING:
    from ..compression import Spectrum

_ENERGIES = (0.9, 0.95, 0.99, 0.999)


@command
def analyze(
    model: Annotated[str, typer.Argument(help="A folder, or a model on the Hub (user/name).")],
    source: DataSource,
    tolerance: Annotated[float, typer.Option(help="Share of the Hankel energy that a cut might drop.")] = 0.01,
    sizes: Annotated[
        str | None, typer.Option(help="Cut to each of these state sizes, measure, and put back: for example 8,16,32.")
    ] = None,
    gramians: Annotated[str, typer.Option(help=GRAMIANS_HELP)] = "loss_gradient",
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

    Prints one row a layer: how many of its states carry 90 to 99.9% of the Hankel energy, and what a cut at --tolerance
    would keep. Nothing is changed, and nothing written but the picture that --plot asks for. Mamba needs a little data
    with the loss it was trained for; time-invariant layers (LRU, S4D) need none.

    **Examples**

    ```console
    hf-compressm analyze state-spaces/mamba-130m-hf --text-file book.txt
    hf-compressm analyze my-model --text-file book.txt --plot spectrum.png
    hf-compressm analyze my-model --sizes 8,16,32 --text-file book.txt
    hf-compressm analyze runs/my-lru --tolerance 0.02 --json
    ```
    """
    quiet_libraries()
    from ..config import CompreSSMConfig
    from ..hub import fetch, load_model

    config, tried = CompreSSMConfig(tolerance=tolerance, gramians=gramians), _sizes(sizes)
    folder = fetch(model, revision, trust_remote_code=trust_remote_code)
    require_tokenizer(folder, source)
    loaded = load_model(folder, trust_remote_code)
    batches = read_batches(loaded, folder, source).calibration
    with told_how_to_give_data(source):
        spectrum, layers = _measure(loaded, batches, config, quiet, tried)
    result = {
        "model": model,
        "data": source.describe() if source.is_given else None,
        "tolerance": tolerance,
        "parameters": loaded.num_parameters(),
        "loss": spectrum.loss,
        "layers": layers,
        "training_step": None if no_timing or not batches else _time(loaded, batches[0], layers),
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
    model: Any, batches: list, config: Any, quiet: bool, sizes: list[int]
) -> tuple[Spectrum, list[dict[str, Any]]]:
    """The spectra, and one entry a layer for the table."""
    from ..api import analyze as measure
    from ..architectures import find_layers
    from ..compression.costs import parameters_at, state_costs

    spectrum = measure(model, batches or None, config, progress=False if quiet else None, sizes=sizes)
    layers = find_layers(model)
    costs = state_costs(model, layers, batches[0] if batches else None)
    ranks = {energy: spectrum.ranks(1 - energy) for energy in _ENERGIES}
    kept = spectrum.ranks(config.tolerance)
    entries = []
    for layer in layers:
        cost, size = costs[layer.name], layer.state_size
        entries.append(
            {
                "name": layer.name,
                "family": layer.family,
                "state_size": size,
                "effective_rank": {f"{energy:g}": ranks[energy][layer.name] for energy in _ENERGIES},
                "kept_at_tolerance": kept[layer.name],
                "state_parameters": cost.parameters,
                "state_parameters_at_tolerance": parameters_at(layer, kept[layer.name]),
                "state_bytes": cost.state_bytes,
                "state_bytes_at_tolerance": None
                if cost.state_bytes is None
                else cost.state_bytes * kept[layer.name] // size,
                "hankel_singular_values": spectrum.sigma[layer.name].tolist(),
            }
        )
    return spectrum, entries


def _time(model: Any, batch: dict, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """
    A training step now and with the state that all layers together need, both timed on this machine.

    The estimate is a measurement: the same model is given the smaller size and run. From the number of operations it
    cannot be known, as most of a scan's time goes into memory and launches.
    """
    from ..architectures import find_layers
    from ..compression.costs import resize_for_timing, training_step_seconds

    if "labels" not in batch:
        return None
    size = max(entry["kept_at_tolerance"] for entry in entries)
    before = training_step_seconds(model, batch)
    resize_for_timing(find_layers(model), size)
    after = training_step_seconds(model, batch)
    shape = list(next(iter(batch.values())).shape[:2])
    return {"state_size": size, "seconds": before, "seconds_at_tolerance": after, "batch_and_length": shape}


def _table(result: dict[str, Any]) -> str:
    from tabulate import tabulate

    header = ["layer", "N", *(f"{energy:.4g}" for energy in _ENERGIES)]
    header += [f"keeps at {result['tolerance']:g}", "state parameters", "state bytes"]
    rows = [
        [
            entry["name"] or "(model)",
            entry["state_size"],
            *entry["effective_rank"].values(),
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
    step = result["training_step"]
    if step is not None:
        batch, length = step["batch_and_length"]
        before, after = step["seconds"], step["seconds_at_tolerance"]
        lines.append(
            f"Training step of {batch} x {length} on this machine: {before * 1e3:.1f} ms now, {after * 1e3:.1f} ms "
            f"with {step['state_size']} states in every layer ({before / after:.2f}x)."
        )
    return "\n".join(lines)
