"""`hf-compressm compress`: cut a trained model, evaluate it before and after, and save it with its card."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    GRAMIANS_HELP,
    NOTHING_TO_CUT,
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
from .data import DataSource, load_tokenizer, read_batches, require_tokenizer, told_how_to_give_data

if TYPE_CHECKING:
    from ..config import CompreSSMConfig

# What belongs to a model beside its weights and configuration; read by nobody here, and never code.
_COMPANIONS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template.*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class CutOptions:
    """
    How much to cut and how; in the command, an option a field.

    Args:
        tolerance (`float`, *optional*): Share of the Hankel energy that may be dropped.
        state_size (`int`, *optional*): States to keep in every layer.
        ratio (`float`, *optional*): Share of the states to keep.
        max_loss_increase (`str`, *optional*): How much worse the loss may become, as `"0.5%"` or `"0.005"`.
        method (`str`, *optional*): The reductor.
        per_layer (`bool`): Give each layer a size of its own.
        stock (`bool`): Only make what the model's class in transformers holds.
        allow_growth (`bool`): Cut where the weights grow by more than the state saves, too.
        projection_rows (`str`, *optional*): How many rows the projections of layers that mix states keep, or the share.
        multiple_of (`int`): Round sizes up to a multiple of this.
        gramians (`str`): How selective layers are measured.
        seed (`int`): Seed of the calibration.
    """

    tolerance: Annotated[
        float | None, typer.Option(help="Drop at most this share of the Hankel energy (default 0.01).")
    ] = None
    state_size: Annotated[int | None, typer.Option(min=1, help="Keep this many states in every layer.")] = None
    ratio: Annotated[float | None, typer.Option(help="Keep this share of the states.")] = None
    max_loss_increase: Annotated[
        str | None,
        typer.Option(help="Keep as few states as the loss allows: it may rise by this share of it, for example 0.5%."),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(help="interpolative, selection or balanced; by default what suits the family."),
    ] = None
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Give each layer a size of its own, where the family can hold it.")
    ] = False
    stock: Annotated[bool, typer.Option("--stock", help="Only make what the model's class in transformers holds.")] = (
        False
    )
    allow_growth: Annotated[
        bool,
        typer.Option(
            "--allow-growth", help="Cut even where the weights grow by more than the recurrent state shrinks."
        ),
    ] = False
    projection_rows: Annotated[str | None, typer.Option(help=ROWS_HELP)] = None
    multiple_of: Annotated[int, typer.Option(min=1, help="Round sizes up to a multiple of this.")] = 1
    gramians: Annotated[str, typer.Option(help=GRAMIANS_HELP)] = "loss_gradient"
    seed: Annotated[int, typer.Option(min=0, help="Seed of the calibration.")] = 0

    def config(self) -> CompreSSMConfig:
        """
        The same as a configuration.

        Raises:
            [`~errors.ConfigurationError`]: two of the options exclude each other.
        """
        from ..config import CompreSSMConfig
        from ..errors import ConfigurationError

        amounts = (self.tolerance, self.state_size, self.ratio, self.max_loss_increase)
        if sum(value is not None for value in amounts) > 1:
            raise ConfigurationError("give one of --tolerance, --state-size, --ratio and --max-loss-increase.")
        if self.state_size is not None and self.per_layer:
            raise ConfigurationError("--state-size gives every layer the same size; leave out --per-layer.")
        amount: dict[str, Any] = {"tolerance": 0.01 if self.tolerance is None else self.tolerance}
        if self.state_size is not None:
            amount = {"strategy": "target", "target_state_size": self.state_size}
        elif self.ratio is not None:
            amount = {"strategy": "target", "target_ratio": self.ratio}
        elif self.max_loss_increase is not None:
            amount = {"strategy": "loss", "max_loss_increase": _share(self.max_loss_increase)}
        if self.allow_growth:
            if amount.get("strategy") == "target":
                raise ConfigurationError("--state-size and --ratio always cut; leave out --allow-growth.")
            amount["allow_growth"] = True
        if self.method is not None:
            amount["reductor"] = self.method
        amount["projection_rows"] = rows_of(self.projection_rows)
        same = {name: getattr(self, name) for name in ("stock", "multiple_of", "gramians", "seed")}
        return CompreSSMConfig(**amount, uniform=not self.per_layer, **same)

    def require_smaller(self, model: Any) -> None:
        """
        Check that the state size that was asked for is one that the model can be cut to.

        Args:
            model (`torch.nn.Module`): The model.

        Raises:
            [`~errors.ConfigurationError`]: no layer has as many states.
        """
        from ..architectures import find_layers
        from ..errors import ConfigurationError

        largest = max((layer.state_size for layer in find_layers(model)), default=0)
        if self.state_size is not None and self.state_size > largest:
            raise ConfigurationError(
                f"--state-size is {self.state_size}, and the model has {largest} states; give 1 to {largest - 1}."
            )


def _share(text: str) -> float:
    from ..errors import ConfigurationError

    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigurationError(f"--max-loss-increase is {text!r}; give a share above 0, such as 0.5% or 0.005.")
    return share


@command
def compress(
    model: Annotated[str, typer.Argument(help="A folder, or a model on the Hub (user/name).")],
    cut: CutOptions,
    source: DataSource,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the smaller model; --dry-run needs none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what sizes, parameters, bytes and loss would become; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Push the result to this repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Compress a trained model.

    The spectra are measured on calibration data, the rest of the state is cut out, and the model is evaluated before
    and after on sequences that the calibration has not seen. What is saved loads like any other model.

    **Examples**

    ```console
    hf-compressm compress state-spaces/mamba-130m-hf -o smaller --tolerance 0.01 --text-file book.txt
    hf-compressm compress my-model -o smaller --max-loss-increase 0.5% --text-file book.txt
    hf-compressm compress my-model -o smaller --state-size 8 --data-file train.parquet --push-to-hub me/smaller
    ```
    """
    config = cut.config()
    output = _output(output, overwrite, dry_run)
    quiet_libraries()
    from ..hub import fetch, load_model

    say(_announcement(model, config, source, output, dry_run, push_to_hub), quiet)
    folder = fetch(model, revision, trust_remote_code=trust_remote_code)
    require_tokenizer(folder, source)
    loaded = load_model(folder, trust_remote_code)
    cut.require_smaller(loaded)
    batches = read_batches(loaded, folder, source)
    with told_how_to_give_data(source):
        if dry_run:
            _show_plan(loaded, batches.calibration, config, quiet)
            return
        provenance, summary = _cut(loaded, folder, batches, config, source, model, quiet)
    if not provenance.cuts:
        typer.echo(f"{in_flags(provenance.records[-1].reason)}; nothing was written.")
        raise typer.Exit(NOTHING_TO_CUT)
    _save(loaded, folder, output, provenance, load_tokenizer(folder, source) if source.tokenizer else None)
    typer.echo(summary)
    typer.echo(f"Saved: {output}")
    if push_to_hub is not None:
        from ..hub import push_folder

        address = push_folder(output, push_to_hub, private=private or None, trust_remote_code=trust_remote_code)
        typer.echo(f"Pushed: {address}")


def _announcement(
    model: str, config: CompreSSMConfig, source: DataSource, output: Path, dry_run: bool, push_to_hub: str | None
) -> str:
    amount = {
        "tolerance": f"drop at most {config.tolerance:g} of each layer's Hankel energy",
        "target": f"keep {config.target_state_size} states"
        if config.target_state_size
        else f"keep {config.target_ratio} of the states",
        "loss": f"keep as few states as make the loss at most {config.max_loss_increase or 0:.3g} of it worse",
    }[config.strategy]
    sizes = "one size for all layers" if config.uniform else "each layer its own size"
    data = f"measured on {source.sequences} sequences of {source.describe()}" if source.is_given else "without data"
    then = "write nothing" if dry_run else f"save to {output}" + (f", push to {push_to_hub}" if push_to_hub else "")
    return f"{model}: {amount}, {sizes}, {data}; then {then}."


def _show_plan(model: Any, batches: list, config: CompreSSMConfig, quiet: bool) -> None:
    from tabulate import tabulate

    from ..api import compress as cut_layers

    # The model is not saved, so that the cut itself shows best what would become of it.
    record = cut_layers(model, batches or None, config, progress=False if quiet else None)
    rows = [[layer.name, layer.size_before, layer.wanted_size, layer.size_after] for layer in record.layers]
    asks = "the loss allows" if config.strategy == "loss" else "its spectrum asks for"
    typer.echo(tabulate(rows, headers=["layer", "N", asks, "would become"]))
    narrowed = record.narrowed and f", {record.narrowed}"
    typer.echo(f"{record.parameters_before:,} -> {record.parameters_after:,} parameters{narrowed}")
    if record.state_bytes is not None:
        before, after = record.state_bytes
        typer.echo(f"{before:,} -> {after:,} bytes of recurrent state a sequence")
    if record.loss_before is not None and record.loss_after is not None:
        typer.echo(f"loss on the calibration data {record.loss_before:.4f} -> {record.loss_after:.4f}")
    if record.outcome != "cut":
        typer.echo(f"{record.outcome}: {in_flags(record.reason)}")
    typer.echo("Dry run: nothing was written.")


def _cut(
    model: Any, folder: Path, batches: Any, config: CompreSSMConfig, source: DataSource, name: str, quiet: bool
) -> tuple[Any, str]:
    """Evaluate, cut, evaluate again; returns the facts for the card and what to print."""
    from ..api import compress as cut_layers
    from ..cards import Evaluation, Provenance, evaluation_table
    from ..compression import history_of
    from .evaluate import evaluate

    unseen = batches.evaluation or batches.calibration
    on = source.describe() + (" (sequences after the calibration)" if batches.evaluation else " (the calibration data)")
    show = not quiet
    before = evaluate(model, unseen, show) if unseen else {}
    record = cut_layers(model, batches.calibration or None, config, progress=None if show else False)
    after = evaluate(model, unseen, show) if unseen and record.outcome == "cut" else {}
    inherited = _inherited(folder)
    provenance = Provenance(
        records=[*history_of(folder), record],
        config=config,
        base_model=inherited.get("base_model") if Path(name).is_dir() else name,
        license=inherited.get("license"),
        datasets=[source.dataset_name] if source.dataset_name else [],
        calibration_data=source.describe() or None,
        evaluations=[Evaluation(m, before.get(m), after[m], on, source.dataset_name) for m in after],
    )
    lines = [record.summary()]
    if provenance.evaluations:
        lines += ["", evaluation_table(provenance.evaluations), ""]
    return provenance, "\n".join(lines)


def _inherited(folder: Path) -> dict[str, str]:
    """License and base model that the model's card names; a card that cannot be read names none."""
    from ..cards import read_metadata
    from ..errors import CardError
    from ..saving import read_card

    try:
        data = read_metadata(read_card(folder) or "")
    except CardError:
        return {}
    return {name: data[name] for name in ("license", "base_model") if isinstance(data.get(name), str)}


def _output(output: Path | None, overwrite: bool, dry_run: bool) -> Path:
    """The folder to write to, which is free."""
    from ..errors import ConfigurationError

    if dry_run:
        return Path()
    if output is None:
        raise ConfigurationError("name a folder for the smaller model with -o FOLDER, or look first with --dry-run.")
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; give another folder, or --overwrite.")
    return output


def _save(model: Any, source: Path, output: Path, provenance: Any, tokenizer: Any) -> None:
    """Write everything into a folder beside the output and put that in its place as a whole."""
    from ..saving import follow_saves

    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        for pattern in _COMPANIONS:
            for path in source.glob(pattern):
                shutil.copyfile(path, staging / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        follow_saves(model, replace(provenance, name=output.name))
        model.save_pretrained(staging)
        os.chmod(staging, 0o755)
        _put_in_place(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _put_in_place(staging: Path, output: Path) -> None:
    """Rename the new folder to its name; an old one is deleted only after that."""
    try:
        os.replace(staging, output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old."))
        os.replace(output, old / output.name)
        try:
            os.replace(staging, output)
        except OSError:
            os.replace(old / output.name, output)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
