"""The history of a compression: one entry a check, in memory and in a JSON file that is never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InconsistentModelError
from ..files import read_json_object, replace_file
from .record_fields import known_fields, shortened

HISTORY_NAME = "compressm_history.json"
HISTORY_VERSION = 1


@dataclass(frozen=True)
class LayerRecord:
    r"""
    What a check saw in one layer and did to it.

    Args:
        name (`str`): The layer's module name.
        family (`str`): The layer's family.
        size_before (`int`): State size before the check.
        size_after (`int`): State size after it.
        wanted_size (`int`): State size that the layer's own spectrum asked for.
        hankel_singular_values (`list[float]`): The spectrum before the check, descending; empty where a cut was taken
            back.
        tail (`float`): Sum of the Hankel singular values beyond `size_after`.
        tail_share (`float`): `tail` as a share of the whole sum, between 0 and 1: what a truncation in balanced
            coordinates would drop.
        rank_correlation (`float`, *optional*): Spearman's correlation of the states' scores with those of the previous
            check; unset where there is no comparable one.
        state_scores (`list[float]`): Score of each state that stays, in the layer's own order, for the comparison with
            the next check.
        lost_energy (`float`, *optional*): For a layer whose Gramians are measured, the share of the observable energy
            (the sum of the squared Hankel singular values) that the cut lost, as far as the calibration data show and
            before a readout was fitted.
        reductor (`str`, *optional*): The reductor that made the cut; not the one that was asked for where that one
            failed its checks. Unset where nothing was cut.
        gramians (`str`, *optional*): The form of the Gramians behind the cut of a time-invariant layer, a value of
            `CompreSSMConfig.gramians`; `"measured"` for a selective layer.
        output_error (`float`, *optional*): For a time-invariant layer, the relative error of its output that the cut
            made, on inputs of the layer that the truncation was not made with.
        readout_fitted (`bool`, *optional*): Whether the layer was fitted to the outputs that it had, see
            `CompreSSMConfig.fit_readout`. Unset where nothing was cut.
        state_bytes_before (`int`, *optional*): Memory of the recurrent state of one sequence before the check; unset
            where it was not measured.
        state_bytes_after (`int`, *optional*): The same after it.
        rows_before (`int`, *optional*): Rows that B and C have each where they are projected (in every group), before
            the check; unset for a layer whose projections cannot give rows up.
        rows_after (`int`, *optional*): The same after it.
    """

    name: str
    family: str
    size_before: int
    size_after: int
    wanted_size: int
    hankel_singular_values: list[float]
    tail: float
    tail_share: float
    rank_correlation: float | None = None
    state_scores: list[float] = field(default_factory=list)
    lost_energy: float | None = None
    reductor: str | None = None
    gramians: str | None = None
    output_error: float | None = None
    readout_fitted: bool | None = None
    state_bytes_before: int | None = None
    state_bytes_after: int | None = None
    rows_before: int | None = None
    rows_after: int | None = None


@dataclass(frozen=True)
class TrialRecord:
    """
    A cut that was made to measure its loss on batches that it was not made with, and taken back.

    Args:
        sizes (`dict[str, int]`): The state size of each layer, by name.
        truncation (`str`): How the truncations were made, where several ways were compared; empty for the usual one.
        loss (`float`, *optional*): The mean loss; unset where the cut could not be made or had no finite loss.
    """

    sizes: dict[str, int]
    truncation: str = ""
    loss: float | None = None


@dataclass(frozen=True)
class CheckRecord:
    """
    One check.

    Args:
        outcome (`str`): `"cut"`; `"kept"` where the spectrum asked for no cut or the cut would not pay; `"skipped"`
            where the check could not be completed (the reason says why) and nothing was changed; `"rolled_back"` where
            an earlier cut was taken back.
        reason (`str`): One sentence for a person.
        layers (`list[LayerRecord]`): What was seen in each layer; empty where the spectra are not known.
        step (`int`, *optional*): Training step after which the check was made.
        loss_before (`float`, *optional*): Mean loss of the calibration batches before the cut.
        loss_after (`float`, *optional*): The same after the cut.
        seconds (`float`): Duration of the whole check.
        parameters_before (`int`): Parameters of the model before the check.
        parameters_after (`int`): Parameters after it.
        trials (`list[TrialRecord]`): What was tried before the cut was chosen; the first is the model as it was.
    """

    outcome: str
    reason: str
    layers: list[LayerRecord] = field(default_factory=list)
    step: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0.0
    parameters_before: int = 0
    parameters_after: int = 0
    trials: list[TrialRecord] = field(default_factory=list)

    @property
    def state_bytes(self) -> tuple[int, int] | None:
        """Memory of the recurrent state of one sequence in all layers, before and after; None where it is not known."""
        before = [layer.state_bytes_before for layer in self.layers]
        after = [layer.state_bytes_after for layer in self.layers]
        return None if None in before or not before else (sum(before), sum(after))

    @property
    def narrowed(self) -> str:
        """What rows the projections gave up, in short; empty where they gave up none."""
        rows = [(layer.rows_before, layer.rows_after) for layer in self.layers if layer.rows_after is not None]
        if not any(after < before for before, after in rows):
            return ""
        return f"rows of B and C {size_range(before for before, _ in rows)} -> {size_range(after for _, after in rows)}"

    def to_dict(self) -> dict[str, Any]:
        """The record as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckRecord:
        """
        The record that [`~CheckRecord.to_dict`] gave; fields of a later version are left out.

        Args:
            values (`dict[str, Any]`): The fields.

        Raises:
            [`~errors.InconsistentModelError`]: a field is missing or has a value that no record has.
        """
        values = known_fields(cls, values)
        for name, part in (("layers", LayerRecord), ("trials", TrialRecord)):
            values[name] = [part(**known_fields(part, value)) for value in values.get(name, [])]
        if values["outcome"] == "cut" and not values["layers"]:
            raise InconsistentModelError("a CheckRecord has the outcome 'cut' and no layers; a cut changes a layer.")
        return cls(**values)

    def summary(self) -> str:
        """One line for a person."""
        where = "" if self.step is None else f"step {self.step}: "
        if self.outcome != "cut":
            return f"{where}{self.outcome}, {self.reason}"
        before, after = ({getattr(layer, k) for layer in self.layers} for k in ("size_before", "size_after"))
        loss = ""
        if self.loss_before is not None and self.loss_after is not None:
            loss = f", calibration loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        share = max(layer.tail_share for layer in self.layers)
        narrower = f"{self.narrowed}, " if self.narrowed else ""
        lost = [layer.lost_energy for layer in self.layers if layer.lost_energy is not None]
        measured = f", at most {max(lost):.2%} of the observable energy lost" if lost else ""
        return (
            f"{where}state size {size_range(before)} -> {size_range(after)} in {len(self.layers)} layers, "
            f"at most {share:.2%} of the Hankel energy beyond them{measured}, {narrower}parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,}{loss}, {self.seconds:.2f} s"
        )

    def scalars(self) -> dict[str, float]:
        """The figures of the record that a tracker can plot, by name."""
        values: dict[str, float | None] = {
            "compressm/cut": float(self.outcome == "cut"),
            "compressm/seconds": self.seconds,
            "compressm/parameters": float(self.parameters_after),
            "compressm/loss_before": self.loss_before,
            "compressm/loss_after": self.loss_after,
        }
        if self.layers:
            sizes = [layer.size_after for layer in self.layers]
            values["compressm/state_size"] = sum(sizes) / len(sizes)
            values["compressm/tail_share"] = max(layer.tail_share for layer in self.layers)
            lost = [layer.lost_energy for layer in self.layers if layer.lost_energy is not None]
            values["compressm/lost_energy"] = max(lost) if lost else None
        for layer in self.layers:
            values[f"compressm/state_size/{layer.name}"] = float(layer.size_after)
            values[f"compressm/wanted_size/{layer.name}"] = float(layer.wanted_size)
        return {name: float(value) for name, value in values.items() if value is not None}


def size_range(sizes: Iterable[int]) -> str:
    """The smallest and the largest size, in short; at least one is given."""
    sizes = set(sizes)
    return str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)}..{max(sizes)}"


def sizes_after(records: list[CheckRecord]) -> dict[str, int]:
    """The state size that each layer has after the records, by name; layers that no record knows are missing."""
    return {layer.name: layer.size_after for record in records for layer in record.layers}


def standing_cuts(records: Sequence[CheckRecord]) -> list[CheckRecord]:
    """The checks that cut something and were not taken back, in their order."""
    standing: list[CheckRecord] = []
    for record in records:
        if record.outcome == "cut":
            standing.append(record)
        elif record.outcome == "rolled_back" and standing:
            standing.pop()
    return standing


def write_history(records: list[CheckRecord], folder: str | os.PathLike) -> Path:
    """
    Write all records to `compressm_history.json` in a folder, replacing the file as a whole.

    The file is an object with `version` (1) and `checks`, a list of the fields of [`CheckRecord`] in the order in
    which the checks were made.
    """
    content = {"version": HISTORY_VERSION, "checks": [record.to_dict() for record in records]}
    text = json.dumps(content, indent=1, allow_nan=False)
    path = Path(folder) / HISTORY_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8"))
    return path


def keep_old_history(folder: str | os.PathLike) -> Path | None:
    """
    Rename the history of an earlier run in a folder, before a new one writes there.

    Args:
        folder (`str` or `os.PathLike`): The folder, which need not exist.

    Returns:
        `Path` or `None`: The file's new path, `compressm_history.N.json`, where there was one.
    """
    path = Path(folder) / HISTORY_NAME
    if not path.is_file():
        return None
    number = 1
    while (renamed := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(renamed)


def read_history(folder: str | os.PathLike) -> list[CheckRecord]:
    """
    The records in a folder's `compressm_history.json`, in the order in which the checks were made.

    Args:
        folder (`str` or `os.PathLike`): The folder of a training, a checkpoint or a saved model.

    Raises:
        `FileNotFoundError`: the folder has no history.
        [`~errors.InconsistentModelError`]: the file is there and is no history.
    """
    path = Path(folder) / HISTORY_NAME
    try:
        checks = read_json_object(path).get("checks")
        if not isinstance(checks, list):
            raise InconsistentModelError(f"its checks are {shortened(checks)}; they have to be a list.")
        return [CheckRecord.from_dict(check) for check in checks]
    except InconsistentModelError as error:
        raise InconsistentModelError(
            f"{path} is not a history of hf_compressm: {error} Remove or restore the file."
        ) from error


def history_of(folder: str | os.PathLike) -> list[CheckRecord]:
    """
    The records in a folder's history; none where it has no history.

    Args:
        folder (`str` or `os.PathLike`): The folder.

    Raises:
        [`~errors.InconsistentModelError`]: the file is there and is no history.
    """
    return read_history(folder) if (Path(folder) / HISTORY_NAME).is_file() else []
