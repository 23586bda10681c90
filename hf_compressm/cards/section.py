"""From facts to a model card: the tables and sentences of `template.md`, and the metadata that the Hub indexes."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate

from ..architectures import registered_families
from ..compression.cut.snapshot import LAYERS_NAME
from ..compression.history import CheckRecord, size_range
from ..systems import registered_reductors
from .escaping import code, escaped, one_line, python_string
from .notes import evaluation_note, fit_note, form_note
from .provenance import Evaluation, Provenance

PICTURE_NAME = "compressm_spectrum.png"

PAPER = "https://arxiv.org/abs/2510.02823"
SOURCE_NAME = "hf_compressm"
"""Marks the entries of a card's `model-index` that this library writes."""

# By the ending of a model class's name: the task that the Hub files the model under, and the class that loads it.
_TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForConditionalGeneration": ("image-text-to-text", "AutoModelForImageTextToText"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "Model": (None, "AutoModel"),
}

# More layers than this are folded away.
_MOST_LAYERS_SHOWN = 8

_CITATIONS = """```bibtex
@inproceedings{chahine2026compressm,
  title     = {The Curious Case of In-Training Compression of State Space Models},
  author    = {Chahine, Makram and Nazari, Philipp and Rus, Daniela and Rusch, T. Konstantin},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  url       = {https://arxiv.org/abs/2510.02823}
}
```"""


def template_text() -> str:
    """The card's template, as it is installed with the package (`model_cards/template.md` in the repository)."""
    return (resources.files(__package__) / "template.md").read_text(encoding="utf-8")


def render_card(provenance: Provenance, has_picture: bool = True) -> str:
    """
    A whole model card, from its metadata to its citations.

    Every name in it (layers, data sets, repositories) is escaped, so that none can end a table, open an HTML element or
    reach the template as code.

    Args:
        provenance ([`Provenance`]): The facts.
        has_picture (`bool`, *optional*, defaults to `True`): Whether the spectrum picture is next to the card.

    Raises:
        `ValueError`: a check has no layer, so that there is nothing to report.
    """
    layers = provenance.layers()
    if not layers:
        raise ValueError("no check has seen a layer; there is nothing to write a card about.")
    variables = {
        "title": escaped(_short_name(provenance)),
        "base_model": escaped(provenance.base_model) if provenance.base_model else None,
        "is_from_training": provenance.is_from_training,
        "cuts": provenance.cuts,
        "n_layers": len(layers),
        "most_layers_shown": _MOST_LAYERS_SHOWN,
        "family": escaped(", ".join(sorted({layer.family for _, layer in layers}))),
        "size_before": size_range(first for first, _ in layers),
        "size_after": size_range(layer.size_after for _, layer in layers),
        "reason": escaped(provenance.records[-1].reason),
        "taken_back": _taken_back(provenance),
        "settings": _settings(provenance),
        "checks_table": checks_table([record for record in provenance.records if record.layers]),
        "has_picture": has_picture,
        "picture": PICTURE_NAME,
        "layers_table": layers_table(provenance),
        "bound_note": _bound_note(provenance),
        "evaluation_table": evaluation_table(provenance.evaluations),
        "evaluation_note": evaluation_note(provenance),
        "form_note": form_note(provenance),
        "fit_note": fit_note(provenance),
        "speed": _speed(provenance),
        "loading": _loading(provenance),
        "loading_note": _loading_note(provenance),
        "limits": _limits(provenance),
        "citations": _CITATIONS,
    }
    card = ModelCard.from_template(card_metadata(provenance), template_str=template_text(), **variables)
    return re.sub(r"\n{3,}", "\n\n", str(card))


def card_metadata(provenance: Provenance) -> ModelCardData:
    """The metadata at the head of the card: library, tags, base model, data sets, the evaluation as a model index."""
    task, _ = _task(provenance)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=one_line(evaluation.dataset) if evaluation.dataset else "custom",
            dataset_name=one_line(evaluation.data),
            metric_type=evaluation.metric,
            metric_name=evaluation.metric,
            metric_value=evaluation.after,
            source_name=SOURCE_NAME,
            source_url=PAPER,
        )
        for evaluation in provenance.evaluations
        if evaluation.after is not None
    ]
    families = sorted({layer.family for _, layer in provenance.layers()})
    return ModelCardData(
        library_name="transformers" if provenance.model_type else "pytorch",
        license=one_line(provenance.license) if provenance.license else None,
        tags=["compressm", "state-space-model", *families],
        base_model=one_line(provenance.base_model) if provenance.base_model else None,
        datasets=[one_line(name) for name in provenance.datasets] or None,
        pipeline_tag=task,
        model_name=one_line(_short_name(provenance)) if results else None,
        eval_results=results or None,
    )


def checks_table(records: list[CheckRecord]) -> str:
    """
    One row a check: when it was, what it did to the sizes and to the calibration loss.

    Args:
        records (`list[CheckRecord]`): The checks.
    """
    rows = []
    for record in records:
        sizes = [(layer.size_before, layer.size_after) for layer in record.layers]
        rows.append(
            [
                "after training" if record.step is None else f"step {record.step:,}",
                record.outcome,
                f"{size_range(b for b, _ in sizes)} -> {size_range(a for _, a in sizes)}" if sizes else "",
                f"{max(layer.tail_share for layer in record.layers):.3%}" if record.layers else "",
                _pair(record.loss_before, record.loss_after),
                f"{record.parameters_before:,} -> {record.parameters_after:,}",
                f"{record.seconds:.2f} s",
            ]
        )
    header = [
        "when",
        "outcome",
        "state size",
        "Hankel energy dropped, at most",
        "calibration loss",
        "parameters",
        "took",
    ]
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def layers_table(provenance: Provenance, mark: Callable[[str], str] | None = None) -> str:
    """
    One row a layer: its sizes, the share of energy that its last check dropped, and what is known of its error: a bound
    where it has one, else the error of its output where it was measured.

    Args:
        provenance ([`Provenance`]): The facts.
        mark (`Callable`, *optional*): How a layer's name is written; as inline code when unset.
    """
    has_bound = _has_error_bound(provenance)
    has_error = any(layer.output_error is not None for _, layer in provenance.layers())
    rows = [
        [
            (mark or code)(layer.name or "(model)"),
            f"{first}",
            f"{layer.size_after}",
            f"{layer.tail_share:.3%}",
            *([f"{2 * layer.tail:.3g}"] if has_bound else []),
            *(["" if layer.output_error is None else f"{layer.output_error:.2%}"] if has_error else []),
        ]
        for first, layer in provenance.layers()
    ]
    header = ["layer", "states at first", "states now", "Hankel energy dropped by the last check"]
    header += ["error bound"] if has_bound else []
    header += ["relative error of the output on other data"] if has_error else []
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def evaluation_table(evaluations: list[Evaluation] | tuple[Evaluation, ...]) -> str:
    """One row a metric; empty where nothing was evaluated."""
    if not evaluations:
        return ""
    rows = [
        [escaped(e.metric), _figure(e.before, e.metric), _figure(e.after, e.metric), escaped(e.data)]
        for e in evaluations
    ]
    before = next(
        (f"step {e.before_step:,}" for e in evaluations if e.before_step is not None), "before the compression"
    )
    after = next((f"step {e.after_step:,}" for e in evaluations if e.after_step is not None), "after it")
    header = ["metric", before, after, "measured on"]
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def _short_name(provenance: Provenance) -> str:
    return (provenance.name or provenance.model_class or "model").rstrip("/").split("/")[-1]


def _pair(before: float | None, after: float | None) -> str:
    if before is None:
        return ""
    return f"{before:.4f}" if after is None else f"{before:.4f} -> {after:.4f}"


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"


def _settings(provenance: Provenance) -> str:
    config = provenance.config
    if config is None:
        return ""
    names = {
        "tolerance": ["tolerance"],
        "target": ["target_state_size", "target_ratio"],
        "loss": ["max_loss_increase"],
    }
    amounts = [(name, getattr(config, name)) for name in names.get(config.strategy, ["keep_ratio"])]
    stated = [f"{name.replace('_', ' ')} {value:g}" for name, value in amounts if value is not None]
    if config.projection_rows is not None:
        stated.append(f"projection rows {config.projection_rows:g}")
    stated += [f"reductor `{config.reductor}`", f"Gramians `{config.gramians}`", f"seed {config.seed}"]
    return ", ".join(stated)


def _taken_back(provenance: Provenance) -> str:
    last = provenance.records[-1]
    return escaped(last.reason) if provenance.cuts and last.outcome == "rolled_back" else ""


def _reductors(provenance: Provenance) -> set[str]:
    """The methods that cut the layers."""
    chosen = "auto" if provenance.config is None else provenance.config.reductor
    families = {layer.family for _, layer in provenance.layers()}
    if chosen != "auto":
        return {chosen}
    known, stock = registered_families(), provenance.config is not None and provenance.config.stock
    return {known[family].default_reductor(stock) if family in known else "unknown" for family in families}


def _has_error_bound(provenance: Provenance) -> bool:
    """Whether all were cut by balanced truncation on Gramians in closed form alone, whose error has a bound."""
    names, known = _reductors(provenance), registered_reductors()
    cut = [layer for record in provenance.cuts for layer in record.layers]
    # What was recorded by an earlier version had no other form.
    if any(layer.gramians not in ("closed_form", None) or layer.readout_fitted for layer in cut):
        return False
    bounded = bool(names) and all(name in known and known[name].error_bound is not None for name in names)
    return bool(provenance.cuts) and _is_time_invariant(provenance) and bounded


def _is_time_invariant(provenance: Provenance) -> bool:
    """Whether no layer's Gramians were measured on data."""
    known = registered_families()
    return all(layer.family in known and not known[layer.family].is_selective for _, layer in provenance.layers())


def _bound_note(provenance: Provenance) -> str:
    if not _has_error_bound(provenance):
        return ""
    return (
        "The error bound is twice the sum of the dropped Hankel singular values of the last check: no input makes the "
        "layer's output differ by more than this factor times the input's energy norm (Glover, 1984)."
    )


def _speed(provenance: Provenance) -> str:
    if provenance.step_seconds is None:
        return ""
    before, after = provenance.step_seconds
    return f"{before:.4f} s before the first cut, {after:.4f} s after the last one ({before / after:.2f}x)"


def _task(provenance: Provenance) -> tuple[str | None, str | None]:
    name = provenance.model_class or ""
    task, auto = next((found for ending, found in _TASKS.items() if name.endswith(ending)), (None, None))
    return task if provenance.reads_tokens or task is None or not task.startswith("text") else None, auto


def _loading(provenance: Provenance) -> str:
    _, auto_class = _task(provenance)
    name = provenance.name or "path/to/this/folder"
    if provenance.model_type is None:
        return f"from hf_compressm import load_cut_layers\n\nload_cut_layers(model, {python_string(name)})"
    trust = ", trust_remote_code=True" if provenance.needs_code else ""
    auto_class = auto_class or "AutoModel"
    if provenance.is_adapter:
        base, name = python_string(provenance.base_model or "path/to/the/uncut/model"), python_string(name)
        return (
            f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
            "from hf_compressm import load_cut_layers\n\n"
            f"model = {auto_class}.from_pretrained({base}{trust})\n"
            f"load_cut_layers(model, {name})\nmodel = PeftModel.from_pretrained(model, {name})"
        )
    return (
        f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({python_string(name)}{trust})"
    )


def _loading_note(provenance: Provenance) -> str:
    if provenance.model_type is None:
        name = code(provenance.model_class or "the model's own class")
        return (
            f"`model` is a {name}, built as for the training, with any state size: the call gives its layers the "
            "shapes that they have here, and loads all weights."
        )
    if provenance.is_adapter:
        return (
            "This is an adapter. The model below it was cut while the adapter was trained; its layers, as they are "
            f"now, lie in `{LAYERS_NAME}`. Without them the adapter is put on the uncut model, which is another one. "
            "`model.merge_and_unload().save_pretrained(...)` makes one whole model of both."
        )
    if provenance.needs_code:
        return (
            "The model's code is saved next to its weights; hf_compressm need not be installed. The stock class of "
            "transformers cannot hold these layers, and refuses the folder."
        )
    return "hf_compressm need not be installed: `config.json` holds the new state size."


def _limits(provenance: Provenance) -> str:
    data = escaped(provenance.calibration_data) if provenance.calibration_data else None
    forms = {layer.gramians for cut in provenance.cuts for layer in cut.layers}
    if _is_time_invariant(provenance) and forms <= {"closed_form", None}:
        return (
            "The spectra were computed from the weights alone. They bound what a layer's linear recurrence loses, not "
            "what the whole model does on a task; evaluate it on your own data."
        )
    return (
        f"The spectra were measured on {data or 'sample data'}. A state that this data hardly uses counts as "
        "negligible, so inputs of another kind, or much longer ones, can need what was cut; evaluate the model on your "
        "own data before relying on it."
    )
