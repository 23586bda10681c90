"""`CompreSSMConfig`: every setting of a compression, validated when it is made, to and from JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from .consistency import CALIBRATION_LOSS, inferred, require_consistent, without_ignored
from .errors import ConfigurationError
from .files import replace_file
from .systems.reductors.reductor import SelectionRule, SelectionScore, registered_reductors
from .validation import (
    require_bool,
    require_choice,
    require_integer,
    require_pattern,
    require_share,
    require_share_or_zero,
    require_window,
    settings_in,
)

CONFIG_NAME = "compressm_config.json"

STRATEGIES = ("tolerance", "fixed", "pragmatic", "target", "loss")
BUDGETS = ("layer", "model")
GRAMIANS = ("loss_gradient", "input_weighted", "closed_form", "white_noise", "averaged")
OPTIMIZER_MOMENTS = ("carry", "slice", "reset")
AFTER_ROLLBACK = ("stop", "halve")


@dataclass(frozen=True)
class CompreSSMConfig:
    r"""
    Settings of an in-training or post-training compression.

    The object is immutable; use [`dataclasses.replace`] to derive another one. Unknown names are refused, so that a
    misspelt setting never passes for the default.

    Args:
        tolerance (`float`, *optional*, defaults to 0.01):
            Share of the Hankel energy (the sum of a layer's Hankel singular values) that one check may drop, strictly
            between 0 and 1. This is \\( \tau \\) of Chahine et al., 2026 (arXiv 2510.02823). Used by the strategy
            `"tolerance"`.
        strategy (`str`, *optional*):
            How a check finds the new state size. `"tolerance"` when unset, or what `state_size`, `ratio` or
            `max_loss_increase` call for; a setting that the strategy ignores is refused. `"tolerance"`: the smallest
            size that keeps `1 - tolerance` of the Hankel energy. `"fixed"`: `keep_ratio` of the present size, whatever
            the spectrum says. `"pragmatic"`: `"fixed"`, with a rollback where a cut hurts (`rollback_tolerance` is 0.02
            unless set). `"target"`: equal ratios from check to check, so that the last one reaches `target_state_size`
            or `target_ratio`. `"loss"`: the smallest size at which the loss rises by no more than `max_loss_increase`,
            measured on batches that the cut was not made with.
        keep_ratio (`float`, *optional*, defaults to 0.5):
            Share of the present state size that one check keeps under the strategies `"fixed"` and `"pragmatic"`,
            strictly between 0 and 1.
        max_loss_increase (`float`, *optional*):
            For the strategy `"loss"` (0.005 there unless set): how much a check may make the loss worse, as a share of
            it, strictly between 0 and 1. Each layer has the size that the order of the Hankel singular values gives it,
            see `uniform` and `budget`.
        target_state_size (`int`, *optional*):
            State size at the end of the window, for the strategy `"target"`.
        target_ratio (`float`, *optional*):
            The same as a share of the size at the start of the run, strictly between 0 and 1.
        state_size (`int`, *optional*):
            Short for `strategy="target", target_state_size=state_size`.
        ratio (`float`, *optional*):
            Short for `strategy="target", target_ratio=ratio`.
        window (`tuple[float, float]` or `tuple[int, int]`, *optional*, defaults to `(0.0, 0.3)`):
            First and last point at which a check may happen: as shares of the training steps where the end is at most
            1, else as optimizer steps (two whole numbers). In a long run the spectrum settles earlier: Chahine et al.
            (2026) cut in the first tenth of 180,000 steps.
        interval (`int`, *optional*):
            Optimizer steps between two checks inside the window. When unset, there is one check, at the window's end
            (with `when_stable`, ten checks in the window).
        when_stable (`float`, *optional*):
            Cut a layer as soon as the order of its states has settled: once the rank correlation of their Hankel scores
            between successive checks has been at least this twice running, strictly between 0 and 1. The window's end
            is the limit. Each layer is cut once; with `uniform`, all are cut together when all have settled.
        minimum_reduction (`float`, *optional*, defaults to 0.05):
            A layer is cut only where its new size is below its present one by at least this share.
        uniform (`bool`, *optional*, defaults to `True`):
            Give all layers the size that the most demanding one needs, so that the stock model class loads the result.
        target_layers (`str` or `list[str]`, *optional*):
            The only layers that may be cut, all when unset: a regular expression that matches the whole name of a
            layer's module, or names and ends of names (after a dot), as `target_modules` of peft.
        exclude_layers (`str` or `list[str]`, *optional*):
            Layers that keep their state, written in the same way; it goes before `target_layers`. With `uniform`, the
            others have one size among themselves.
        budget (`str`, *optional*, defaults to `"layer"`):
            What the strategy `"tolerance"` holds the dropped Hankel energy against. `"layer"`: each layer against its
            own. `"model"`: the sum over all layers against the sum of theirs, with the fewest states in the whole model
            that keep it, so that layers with more energy keep more states; needs `uniform=False`. The strategy `"loss"`
            spends states in the same order.
        multiple_of (`int`, *optional*, defaults to 1):
            Round new sizes up to a multiple of this number, for kernels that prefer it.
        min_state_size (`int`, *optional*, defaults to 1):
            No layer becomes smaller than this.
        reductor (`str`, *optional*, defaults to `"auto"`):
            How the state is cut. `"balanced"` (time-invariant layers and Mamba-2) keeps the directions with the largest
            Hankel singular values; `"interpolative"` (selective layers) keeps some states and folds what they say about
            the dropped ones into the readout; `"selection"` only keeps some states. `"auto"` takes the best that the
            family can hold, see `stock`.
        stock (`bool`, *optional*, defaults to `False`):
            Make nothing but what the stock model class of transformers loads, where another form would lose less.
        allow_growth (`bool`, *optional*, defaults to `False`):
            Whether `"tolerance"` and `"loss"` make a mixed cut whose two small matrices a layer take more bytes than
            the recurrent state of one sequence loses. The other strategies name a size and always cut.
        projection_rows (`float` or `int`, *optional*):
            Rows that the projections of B and C each keep where states are mixed, now or before: a number, or a share
            of those at the start of the run. The rows that the mixing hardly reads go; there are always more than
            states. All stay when unset.
        optimizer_moments (`str`, *optional*, defaults to `"carry"`):
            What happens to the optimizer's moments of a cut parameter. `"carry"` moves them as the gradients move,
            `"slice"` keeps the entries of the kept states (of the leading ones, where states are mixed), `"reset"`
            drops them. Moments of all other parameters are always kept.
        rollback_tolerance (`float`, *optional*):
            Take a cut back where it makes `rollback_metric` worse by more than this (an absolute difference). Unset: no
            cut is taken back (but see the strategy `"pragmatic"`).
        rollback_metric (`str`, *optional*, defaults to `"calibration_loss"`):
            What is watched. `"calibration_loss"`: the loss of the calibration batches, compared at the cut itself. Any
            other name is a metric of the Trainer's evaluation, such as `"eval_loss"` or `"eval_accuracy"`; evaluations
            are then made one step before a check and `rollback_after` steps after a cut.
        rollback_after (`int`, *optional*, defaults to 0):
            Training steps that a cut gets to recover before it is judged by a metric of the evaluation.
        after_rollback (`str`, *optional*, defaults to `"stop"`):
            `"stop"` makes no further cut after a rollback; `"halve"` goes on with half the step (half the tolerance,
            half the share that a fixed cut drops).
        selection_score (`str`, *optional*, defaults to `"greedy"`):
            What ranks the states under `"selection"`: `"greedy"` (states are dropped one after the other, each time the
            one whose loss changes the layer's output the least), `"hankel"` (the square root of the product of the two
            Gramians' diagonals), or `"readout_energy"` (the sum of \\( h_n^2 C_n^2 \\) over the data).
            Time-invariant layers, and a `selection_rule` other than `"largest"`, take `"hankel"` for `"greedy"`.
        selection_rule (`str`, *optional*, defaults to `"largest"`):
            Which states `"selection"` keeps: the `"largest"` scores, or, as ablations, the `"smallest"` or `"random"`
            ones.
        gramians (`str`, *optional*, defaults to `"loss_gradient"`):
            How Gramians are found. `"loss_gradient"`: from states, and adjoint states of the training loss, on the
            calibration batches. For selective layers there are two more: `"white_noise"`, states, and adjoint states of
            random outputs (needs no labels and no backward pass), and `"averaged"`, the closed form of the system with
            its time-varying parts averaged. For time-invariant layers too: `"input_weighted"`, states on the
            calibration batches and the closed form of the observability Gramian (needs no labels), and `"closed_form"`,
            both in closed form, which assumes white noise at the layer's input and needs no data. Where batches have no
            loss a time-invariant layer takes `"input_weighted"` for `"loss_gradient"`, and without batches
            `"closed_form"`.
        fit_readout (`bool`, *optional*):
            Fit cut layers to the outputs that they had, on the calibration batches; else they stay as the Gramians make
            them. Of time-invariant layers the readout is fitted, at the cost of a forward pass a layer and batch. Of
            selective layers and linear attention it is what makes B and C (mixing matrices, or rows of the projection
            that they were folded into), at the cost of up to eighty forward and backward passes of each layer on 32,768
            steps. When unset, layers are fitted where no training goes on, in which a fit gains nothing, and one
            cut in closed form keeps its readout and its error bound. Without effect on `"selection"` and xLSTM.
        compare_truncations (`bool`, *optional*, defaults to `False`):
            Make several truncations of the size that was found, measure the loss of each on batches that it was not
            made with, and keep the best.
        calibration_batches (`int`, *optional*, defaults to 1):
            Batches that one check measures the Gramians on, in every process. As many more are drawn where a loss has
            to be measured on other ones, and one more to measure what a cut of a time-invariant layer does to its
            output.
        seed (`int`, *optional*, defaults to 0):
            Seed of the calibration samples, the probes and random selection. It is combined with the training step and
            leaves the global random state alone.
        fast_cpu_scan (`bool`, *optional*, defaults to `True`):
            Let supported layers on a CPU run through the kernels of this library: the scan and what stands around it.

    Raises:
        [`~errors.ConfigurationError`]: a setting has a value that is not allowed, or `window` is empty.

    Example:

    ```python
    >>> from hf_compressm import CompreSSMConfig

    >>> config = CompreSSMConfig(tolerance=0.02, window=(0.05, 0.3))
    >>> CompreSSMConfig.from_json_string(config.to_json_string()) == config
    True

    ```
    """

    tolerance: float = 0.01
    strategy: str | None = None
    keep_ratio: float = 0.5
    target_state_size: int | None = None
    target_ratio: float | None = None
    window: tuple[float, float] | tuple[int, int] = (0.0, 0.3)
    interval: int | None = None
    when_stable: float | None = None
    minimum_reduction: float = 0.05
    uniform: bool = True
    budget: str = "layer"
    multiple_of: int = 1
    min_state_size: int = 1
    reductor: str = "auto"
    stock: bool = False
    optimizer_moments: str = "carry"
    rollback_tolerance: float | None = None
    rollback_metric: str = CALIBRATION_LOSS
    rollback_after: int = 0
    after_rollback: str = "stop"
    selection_score: str = "greedy"
    selection_rule: str = "largest"
    gramians: str = "loss_gradient"
    calibration_batches: int = 1
    seed: int = 0
    fast_cpu_scan: bool = True
    target_layers: str | list[str] | None = None
    exclude_layers: str | list[str] | None = None
    max_loss_increase: float | None = None
    fit_readout: bool | None = None
    compare_truncations: bool = False
    allow_growth: bool = False
    projection_rows: float | int | None = None
    state_size: InitVar[int | None] = None
    ratio: InitVar[float | None] = None

    def __post_init__(self, state_size: int | None, ratio: float | None) -> None:
        for name, value in inferred(self, {"target_state_size": state_size, "target_ratio": ratio}).items():
            object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        require_choice("reductor", self.reductor, ("auto", *registered_reductors()))
        for name in ("tolerance", "keep_ratio"):
            require_share(name, getattr(self, name))
        for name in ("target_ratio", "when_stable", "max_loss_increase"):
            if getattr(self, name) is not None:
                require_share(name, getattr(self, name))
        for name in ("interval", "target_state_size"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), minimum=1)
        for name in ("multiple_of", "min_state_size", "calibration_batches", "seed", "rollback_after"):
            require_integer(name, getattr(self, name), minimum=int(name not in ("seed", "rollback_after")))
        for name in ("uniform", "stock", "fast_cpu_scan", "fit_readout", "compare_truncations", "allow_growth"):
            if not (name == "fit_readout" and self.fit_readout is None):
                require_bool(name, getattr(self, name))
        require_share_or_zero("minimum_reduction", self.minimum_reduction)
        for name in ("target_layers", "exclude_layers"):
            require_pattern(name, getattr(self, name))
        require_window("window", self.window)
        require_consistent(self)

    @property
    def can_roll_back(self) -> bool:
        """Whether cuts are judged afterwards."""
        return self.rollback_tolerance is not None

    @property
    def may_grow(self) -> bool:
        """Whether cuts are made that add more to the weights than they save in the state, as where a size is named."""
        return self.allow_growth or self.strategy not in ("tolerance", "loss")

    @property
    def judged_on_other_batches(self) -> bool:
        """Whether a check measures losses on batches that its truncations were not made with."""
        return self.strategy == "loss" or self.compare_truncations

    @property
    def judged_by_evaluation(self) -> bool:
        """Whether cuts are judged by a metric of the Trainer's evaluation."""
        return self.can_roll_back and self.rollback_metric != CALIBRATION_LOSS

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary that JSON can hold."""
        settings = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> CompreSSMConfig:
        """
        Build a configuration from the dictionary that [`~CompreSSMConfig.to_dict`] gives.

        Raises:
            [`~errors.ConfigurationError`]: it is no `dict`, a name is unknown, or a value is not allowed.
        """
        if not isinstance(settings, Mapping):
            raise ConfigurationError(f"the settings are a {type(settings).__name__}; give a dict of names and values.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known), key=str)
        if unknown:
            raise ConfigurationError(
                f"unknown setting{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; "
                f"CompreSSMConfig has {', '.join(known)}."
            )
        return cls(**settings)

    @classmethod
    def coerced(cls, config: CompreSSMConfig | dict[str, Any] | None) -> CompreSSMConfig:
        """
        What a caller gave as settings: a configuration as it is, a `dict` of settings, or the defaults for `None`.

        Raises:
            [`~errors.ConfigurationError`]: it is of another type, or a setting in it is not allowed.
        """
        if isinstance(config, dict):
            return cls.from_dict(config)
        if config is not None and not isinstance(config, cls):
            raise ConfigurationError(f"config is a {type(config).__name__}; give a CompreSSMConfig or a dict.")
        return config or cls()

    def to_json_string(self) -> str:
        """The settings as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json_string(cls, text: str) -> CompreSSMConfig:
        """
        Build a configuration from JSON text.

        Raises:
            [`~errors.ConfigurationError`]: the text is not a JSON object, or a setting in it is not allowed or
                given twice.
        """
        return cls.from_dict(settings_in(text))

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `compressm_config.json` to a folder, which is made if needed; returns the file's path."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        replace_file(path, self.to_json_string().encode("utf-8"))
        return path

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> CompreSSMConfig:
        """
        Read the settings from a JSON file, or from `compressm_config.json` in a folder.

        Earlier versions saved settings that their strategy ignored; those are left at their defaults.

        Raises:
            [`~errors.ConfigurationError`]: a setting in the file is not allowed.
            `FileNotFoundError`: there is no such file.
        """
        path = Path(path)
        file = path / CONFIG_NAME if path.is_dir() else path
        return cls.from_dict(without_ignored(settings_in(file.read_bytes())))


_CHOICES = {
    "strategy": STRATEGIES,
    "budget": BUDGETS,
    "optimizer_moments": OPTIMIZER_MOMENTS,
    "selection_score": get_args(SelectionScore),
    "selection_rule": get_args(SelectionRule),
    "gramians": GRAMIANS,
    "after_rollback": AFTER_ROLLBACK,
}
