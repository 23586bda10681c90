"""What was done to a model, on which data, and what came of it: the facts behind a model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..compression.history import CheckRecord, LayerRecord, standing_cuts
from ..config import CONFIG_NAME, CompreSSMConfig
from ..errors import InconsistentModelError
from ..files import read_json_object


@dataclass(frozen=True)
class Evaluation:
    """
    One metric before and after the compression.

    Args:
        metric (`str`): The metric's name as the Hub knows it, for example `"perplexity"` or `"accuracy"`.
        before (`float`, *optional*): Its value before the first cut.
        after (`float`, *optional*): Its value after the last one.
        data (`str`): What it was measured on, in words.
        dataset (`str`, *optional*): The Hub name of that data.
        before_step (`int`, *optional*): The training step after which `before` was measured; the training between the
            two values changed them too.
        after_step (`int`, *optional*): The same of `after`.
    """

    metric: str
    before: float | None
    after: float | None
    data: str
    dataset: str | None = None
    before_step: int | None = None
    after_step: int | None = None


@dataclass(frozen=True)
class Provenance:
    """
    The facts that a model card reports about a compression.

    Args:
        records (`Sequence[CheckRecord]`): Every check, in the order in which they were made.
        config ([`CompreSSMConfig`], *optional*): The settings of the checks.
        model_class (`str`, *optional*): Name of the model's class.
        model_type (`str`, *optional*): The `model_type` of its configuration.
        reads_tokens (`bool`): Whether the model reads tokens rather than measured values.
        needs_code (`bool`): Whether loading needs `trust_remote_code=True`.
        base_model (`str`, *optional*): Hub name of the model that was compressed or trained further.
        license (`str`, *optional*): License of the base model, which a compressed model inherits.
        datasets (`Sequence[str]`): Hub names of the data.
        calibration_data (`str`, *optional*): What the spectra were measured on, in words.
        evaluations (`Sequence[Evaluation]`): Metrics before and after.
        step_seconds (`tuple[float, float]`, *optional*): Median duration of a training step before the first cut and
            after the last one.
        is_adapter (`bool`): Whether an adapter is saved, without the model below it that was cut.
        name (`str`, *optional*): The model's name, or its repository's (`"user/name"`).
    """

    records: Sequence[CheckRecord]
    config: CompreSSMConfig | None = None
    model_class: str | None = None
    model_type: str | None = None
    reads_tokens: bool = True
    needs_code: bool = False
    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    calibration_data: str | None = None
    evaluations: Sequence[Evaluation] = ()
    step_seconds: tuple[float, float] | None = None
    is_adapter: bool = False
    name: str | None = None

    @property
    def cuts(self) -> list[CheckRecord]:
        """The checks that cut something and were not taken back, in their order."""
        return standing_cuts(self.records)

    @property
    def is_from_training(self) -> bool:
        """Whether the cuts were made between training steps."""
        return any(record.step is not None for record in self.cuts)

    def layers(self) -> list[tuple[int, LayerRecord]]:
        """Each layer's state size before the first check and its latest record, in the model's order."""
        first: dict[str, int] = {}
        last: dict[str, LayerRecord] = {}
        for record in self.records:
            for layer in record.layers:
                first.setdefault(layer.name, layer.size_before)
                last[layer.name] = layer
        return [(first[name], layer) for name, layer in last.items()]

    def narrowed_layers(self) -> list[str]:
        """The layers, by name, whose projections have given rows up since the first check."""
        first: dict[str, int] = {}
        for record in self.records:
            for layer in record.layers:
                if layer.rows_before is not None:
                    first.setdefault(layer.name, layer.rows_before)
        return [layer.name for _, layer in self.layers() if (layer.rows_after or 0) < first.get(layer.name, 0)]

    def sizes(self) -> dict[str, int]:
        """The state size that each layer has after the last check, by its name."""
        return {layer.name: layer.size_after for _, layer in self.layers()}


def describe_folder(folder: str | os.PathLike, provenance: Provenance) -> Provenance:
    """
    The facts, completed from a saved folder where they are missing: the model's class and type, and the settings.

    Args:
        folder (`str` or `os.PathLike`): A folder with `config.json`.
        provenance ([`Provenance`]): What is known.

    Raises:
        [`~errors.InconsistentModelError`]: `config.json` is no JSON object, or names no class.
        [`~errors.ConfigurationError`]: the settings in the folder are not allowed.
    """
    folder = Path(folder)
    written = read_json_object(folder / "config.json")
    architectures = written.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InconsistentModelError(
            f"architectures in {folder / 'config.json'} is {architectures!r:.60}; give a list with the model's class."
        )
    settings = CompreSSMConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
    return replace(
        provenance,
        config=provenance.config or settings,
        model_class=provenance.model_class or next(iter(architectures), None),
        model_type=provenance.model_type or written.get("model_type"),
        reads_tokens=provenance.reads_tokens and written.get("vocab_size", True) is not None,
        needs_code=provenance.needs_code or bool(written.get("auto_map")),
    )
