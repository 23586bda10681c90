"""Sentences of a card that depend on how the cut was made."""

from __future__ import annotations

from .provenance import Provenance


def evaluation_note(provenance: Provenance) -> str:
    """
    What two evaluations of a training say, and what they do not; empty where they are of one step.

    Args:
        provenance ([`Provenance`]): The facts.
    """
    if not any(evaluation.before_step is not None for evaluation in provenance.evaluations):
        return ""
    return (
        "The model was trained on between these evaluations, so that their difference is mostly training. What the cut "
        "itself did is the calibration loss in the table of checks."
    )


def form_note(provenance: Provenance) -> str:
    """
    Where the rest of the state went, by what the saved class holds.

    Args:
        provenance ([`Provenance`]): The facts.
    """
    if provenance.narrowed_layers():
        return (
            "two small trained matrices a layer bring what the projections give to fewer states, and the rows of the "
            "projections that these matrices hardly read were cut out of the weights"
        )
    if (provenance.model_class or "").startswith("Compressed") and any(
        cut.parameters_after > cut.parameters_before for cut in provenance.cuts
    ):
        return (
            "two small trained matrices a layer bring what the projections give to fewer states: the recurrent state "
            "and the scan are smaller, the weights are not"
        )
    return "the rest was cut out of the weights"


def fit_note(provenance: Provenance) -> str:
    """
    That layers were fitted after a cut; empty where none was.

    Args:
        provenance ([`Provenance`]): The facts.
    """
    layers = provenance.cuts[-1].layers if provenance.cuts else []
    fitted = sum(bool(layer.readout_fitted) for layer in layers)
    if not fitted:
        return ""
    whose = "all layers" if fitted == len(layers) else f"{fitted} of {len(layers)} layers"
    return (
        f"After the cut, {whose} were fitted to the outputs that they had before it, on the calibration data "
        "(`fit_readout`)."
    )
