"""`CompreSSMConfig`: every setting of a compression, validated when it is made, to and from JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

CONFIG_NAME = "compressm_config.json"

STRATEGIES = ("tolerance", "fixed")
REDUCTORS = ("interpolative", "selection")
SELECTION_SCORES = ("hankel", "readout_energy")
SELECTION_RULES = ("largest", "smallest", "random")
GRAMIANS = ("loss_gradient", "white_noise", "averaged")


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
        strategy (`str`, *optional*, defaults to `"tolerance"`):
            How a check finds the new state size. `"tolerance"`: the smallest size that keeps `1 - tolerance` of the
            Hankel energy. `"fixed"`: `keep_ratio` of the present size, whatever the spectrum says.
        keep_ratio (`float`, *optional*, defaults to 0.5):
            Share of the present state size that one check keeps under the strategy `"fixed"`, strictly between 0 and 1.
        window (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.1)`):
            First and last moment at which a check may happen, as shares of the training steps.
        interval (`int`, *optional*):
            Optimizer steps between two checks inside the window. When unset, there is one check, at the window's end.
        minimum_reduction (`float`, *optional*, defaults to 0.05):
            A layer is cut only where its new size is below its present one by at least this share; a smaller gain is
            not worth the disturbance.
        uniform (`bool`, *optional*, defaults to `True`):
            Give all layers the size that the most demanding one needs, so that the stock model class loads the result.
        multiple_of (`int`, *optional*, defaults to 1):
            Round new sizes up to a multiple of this number, for kernels that prefer it.
        min_state_size (`int`, *optional*, defaults to 1):
            No layer becomes smaller than this.
        reductor (`str`, *optional*, defaults to `"interpolative"`):
            How the state is cut. `"interpolative"` keeps some states and folds what they say about the dropped ones
            into the readout; `"selection"` only keeps some states.
        selection_score (`str`, *optional*, defaults to `"hankel"`):
            What ranks the states under `"selection"`: `"hankel"` (the square root of the product of the two Gramians'
            diagonals) or `"readout_energy"` (the sum of \\( h_n^2 C_n^2 \\) over the data).
        selection_rule (`str`, *optional*, defaults to `"largest"`):
            Which states `"selection"` keeps: the `"largest"` scores, or, as ablations, the `"smallest"` or `"random"`
            ones.
        gramians (`str`, *optional*, defaults to `"loss_gradient"`):
            How the Gramians of selective layers are estimated. `"loss_gradient"`: states and adjoint states of the
            training loss; `"white_noise"`: states, and adjoint states of random outputs (needs no labels and no
            backward pass); `"averaged"`: the closed form of the system with its time-varying parts averaged.
        calibration_batches (`int`, *optional*, defaults to 1):
            Batches that one check looks at, in every process.
        seed (`int`, *optional*, defaults to 0):
            Seed of the calibration samples, the probes and random selection. It is combined with the training step and
            leaves the global random state alone.
        fast_cpu_scan (`bool`, *optional*, defaults to `True`):
            Let supported layers on a CPU run through the fused scan of this library.

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
    strategy: str = "tolerance"
    keep_ratio: float = 0.5
    window: tuple[float, float] = (0.0, 0.1)
    interval: int | None = None
    minimum_reduction: float = 0.05
    uniform: bool = True
    multiple_of: int = 1
    min_state_size: int = 1
    reductor: str = "interpolative"
    selection_score: str = "hankel"
    selection_rule: str = "largest"
    gramians: str = "loss_gradient"
    calibration_batches: int = 1
    seed: int = 0
    fast_cpu_scan: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        self._require_share("tolerance")
        self._require_share("keep_ratio")
        self._require_choice("strategy", STRATEGIES)
        self._require_choice("reductor", REDUCTORS)
        self._require_choice("selection_score", SELECTION_SCORES)
        self._require_choice("selection_rule", SELECTION_RULES)
        self._require_choice("gramians", GRAMIANS)
        self._require_window()
        if self.interval is not None:
            self._require_integer("interval", minimum=1)
        if not _is_number(self.minimum_reduction) or not 0 <= self.minimum_reduction < 1:
            raise ConfigurationError(
                f"minimum_reduction is {self.minimum_reduction!r}; give a number in [0, 1), for example 0.05."
            )
        for name in ("multiple_of", "min_state_size", "calibration_batches"):
            self._require_integer(name, minimum=1)
        self._require_integer("seed", minimum=0)
        for name in ("uniform", "fast_cpu_scan"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; give True or False.")

    def _require_share(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not 0 < value < 1:
            raise ConfigurationError(f"{name} is {value!r}; give a number strictly between 0 and 1, for example 0.01.")

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigurationError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")

    def _require_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigurationError(f"{name} is {value!r}; give a whole number of at least {minimum}.")

    def _require_window(self) -> None:
        window = self.window
        if not isinstance(window, tuple) or len(window) != 2 or not all(_is_number(edge) for edge in window):
            raise ConfigurationError(f"window is {window!r}; give two shares of the run, for example (0.0, 0.1).")
        if not 0 <= window[0] < window[1] <= 1:
            raise ConfigurationError(
                f"window is {window!r}, which is empty or leaves the run; give 0 <= start < end <= 1, "
                "for example (0.0, 0.1)."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary that JSON can hold."""
        settings = asdict(self)
        settings["window"] = list(self.window)
        return settings

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> CompreSSMConfig:
        """
        Build a configuration from the dictionary that [`~CompreSSMConfig.to_dict`] gives.

        Raises:
            [`~errors.ConfigurationError`]: a name is unknown, or a value is not allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigurationError(
                f"unknown setting{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; "
                f"CompreSSMConfig has {', '.join(known)}."
            )
        return cls(**settings)

    def to_json_string(self) -> str:
        """The settings as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json_string(cls, text: str) -> CompreSSMConfig:
        """
        Build a configuration from JSON text.

        Raises:
            [`~errors.ConfigurationError`]: the text is not a JSON object, or a setting in it is not allowed.
        """
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"the configuration is not valid JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise ConfigurationError(f"the configuration is a JSON {type(settings).__name__}; give an object.")
        return cls.from_dict(settings)

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `compressm_config.json` to a folder, which is made if needed; returns the file's path."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        path.write_text(self.to_json_string(), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> CompreSSMConfig:
        """
        Read the settings from a JSON file, or from `compressm_config.json` in a folder.

        Raises:
            [`~errors.ConfigurationError`]: a setting in the file is not allowed.
            `FileNotFoundError`: there is no such file.
        """
        path = Path(path)
        file = path / CONFIG_NAME if path.is_dir() else path
        return cls.from_json_string(file.read_text(encoding="utf-8"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
