"""`ExperimentSettings`: one experiment as its YAML file says it, at one scale, with a few values overridden."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = ("data", "model", "training", "compression", "distillation", "hankel_regularization")


@dataclass(frozen=True)
class TrainingSettings:
    """
    How a model is trained.

    Args:
        max_steps (`int`): Optimizer steps.
        batch_size (`int`): Sequences in a batch, in every process.
        learning_rate (`float`): Of everything but the state-space parameters.
        state_space_lr_factor (`float`, *optional*, defaults to 1.0): Learning rate of the state-space parameters, as a
            multiple of `learning_rate`. They get no weight decay.
        weight_decay (`float`, *optional*, defaults to 0.0): AdamW's.
        warmup (`float`, *optional*, defaults to 0.0): Share of the steps with a linearly growing learning rate.
        schedule (`str`, *optional*, defaults to `"constant_with_warmup"`): Any schedule of transformers.
        max_grad_norm (`float`, *optional*, defaults to 1.0): Gradients are clipped to this norm.
        eval_batch_size (`int`, *optional*, defaults to 200): Sequences in a batch of the test.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    state_space_lr_factor: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: str = "constant_with_warmup"
    max_grad_norm: float = 1.0
    eval_batch_size: int = 200


@dataclass(frozen=True)
class ExperimentSettings:
    """
    Everything that decides what an experiment computes, except for the method and the seed.

    Args:
        recipe (`str`): Name of the experiment.
        data (`dict`): Arguments of [`load_data`].
        model (`dict`): `name` (`"lru"`, `"s4d"`, `"mamba"`, `"mamba2"`) and fields of that model's config.
        training ([`TrainingSettings`]): How it is trained.
        compression (`dict`): Fields of [`CompreSSMConfig`].
        distillation (`dict`): Arguments of [`DistillationLoss`].
        hankel_regularization (`dict`): Arguments of [`HankelPenalty`].
    """

    recipe: str
    data: dict[str, Any]
    model: dict[str, Any]
    training: TrainingSettings
    compression: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    hankel_regularization: dict[str, Any] = field(default_factory=dict)

    @property
    def state_size(self) -> int:
        """State size of the full-size model."""
        return int(self.model["state_size"])

    def fingerprint(self, *sections: str) -> str:
        """Twelve hexadecimal digits that change with any setting, or with any setting of the named sections."""
        values = asdict(self)
        chosen = {name: values[name] for name in sections} if sections else values
        # Where the same files lie on this machine does not change what is computed.
        if "data" in chosen:
            chosen["data"] = {k: v for k, v in chosen["data"].items() if k not in ("data_dir", "data_files")}
        return fingerprint(chosen)


def fingerprint(values: Any) -> str:
    """Twelve hexadecimal digits that depend on nothing but the values, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def load_settings(
    path: str | Path, scale: str = "paper", overrides: dict[str, Any] | None = None
) -> ExperimentSettings:
    """
    Read an experiment's YAML file.

    Args:
        path (`str` or `Path`): The file, or the name of one in `recipes/configs`. Its sections are the fields of
            [`ExperimentSettings`]; what `scales` has under a name replaces single values of them at that scale.
        scale (`str`, *optional*, defaults to `"paper"`): `"paper"` for the file's own values, or a name in `scales`.
        overrides (`dict`, *optional*): Dotted names and their values, for example `{"training.max_steps": 100}`.

    Raises:
        `ValueError`: a section, a name or a scale is unknown.
    """
    path = Path(path) if Path(path).exists() else CONFIGS / Path(path).name
    if not path.exists():
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no configuration {path}; recipes/configs has {known}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    scales = content.pop("scales", {})
    unknown = sorted(set(content) - {"recipe", *SECTIONS})
    if unknown:
        raise ValueError(f"{path} has the unknown sections {', '.join(unknown)}; known are {', '.join(SECTIONS)}.")
    if scale != "paper":
        if scale not in scales:
            raise ValueError(f"{path} has no scale {scale!r}; choose one of {', '.join(['paper', *scales])}.")
        content = _merge(content, scales[scale] or {})
    for name, value in (overrides or {}).items():
        _set(content, name, value)
    training = content.pop("training", {})
    unknown = sorted(set(training) - {f.name for f in fields(TrainingSettings)})
    if unknown:
        raise ValueError(f"unknown training settings {', '.join(unknown)} in {path}.")
    return ExperimentSettings(**content, training=TrainingSettings(**training))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else copy.deepcopy(value)
    return merged


def _set(content: dict[str, Any], name: str, value: Any) -> None:
    section, _, rest = name.partition(".")
    if section not in SECTIONS or not rest:
        raise ValueError(f"{name!r} is not SECTION.NAME with a section of {', '.join(SECTIONS)}.")
    content[section] = {**content.get(section, {}), rest: value}
