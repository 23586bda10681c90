"""What lets a run go on from a checkpoint whose state is smaller (or larger) than that of the model in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from ..architectures import StateSpaceLayer, find_layers, take_forms
from ..compression import CheckRecord
from ..compression.record_fields import known_fields
from ..errors import ConfigurationError, InconsistentModelError
from .saved_names import by_name_in_memory, take_names_of_model
from .shards import shapes_of_whole_checkpoint

if TYPE_CHECKING:
    from .callback import CompreSSMCallback

_FOLLOWS = "_hf_compressm_follows_checkpoints"
_READS = "_hf_compressm_reads_saved_names"


def follow_checkpoints(model: nn.Module) -> None:
    """
    Let every supported layer take the state size of whatever state dict is loaded into the model from now on.

    The Trainer loads a checkpoint's weights into the model that the user built, before any optimizer or wrapper exists;
    the same happens when it goes back to the best checkpoint at the end. A checkpoint that names tensors otherwise than
    the model is read as `from_pretrained` reads it. Calling this again changes nothing.

    Args:
        model (`torch.nn.Module`): A model with supported layers.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no layer that can be cut.
    """
    layers = find_layers(model)
    if not getattr(model, _READS, False):
        model.register_load_state_dict_pre_hook(partial(_read_saved_names, layers))
        setattr(model, _READS, True)
    for layer in layers:
        if not getattr(layer.module, _FOLLOWS, False):
            layer.module.register_load_state_dict_pre_hook(partial(_take_saved_form, model, layer, layers))
            setattr(layer.module, _FOLLOWS, True)


def _read_saved_names(
    layers: list[StateSpaceLayer], model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    # Inside another model this one's tensors have the other's names.
    if prefix:
        return
    shown = by_name_in_memory(model, shapes_of_whole_checkpoint() or state_dict)
    for layer in layers:
        _take_form_shown(model, layer, layers, shown, f"{layer.name}." if layer.name else "")
    take_names_of_model(model, state_dict)


def _take_saved_form(
    model: nn.Module,
    layer: StateSpaceLayer,
    layers: list[StateSpaceLayer],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    # One file of several does not show the form.
    _take_form_shown(model, layer, layers, shapes_of_whole_checkpoint() or state_dict, prefix)


def _take_form_shown(
    model: nn.Module, layer: StateSpaceLayer, layers: list[StateSpaceLayer], state_dict: dict[str, Any], prefix: str
) -> None:
    # Tensors of another kind of model are left to the load, which refuses them and changes nothing.
    if not _fits_some_size(layer, state_dict, prefix):
        return
    form = layer.saved_form(state_dict, prefix)
    if form is not None:
        take_forms(model, layers, {layer.name: form})


def _fits_some_size(layer: StateSpaceLayer, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether the shapes in a state dict are those of this layer at one state size."""
    entries = {name: state_dict[prefix + name] for name in layer.state_parameters() if prefix + name in state_dict}
    present = layer.state_shapes(layer.state_size)
    if any(len(entry.shape) != len(present[name]) for name, entry in entries.items()):
        return False
    form = layer.saved_form(state_dict, prefix)
    if form is None or form.size < 1:
        return False
    wanted = layer.shapes_of_form(form)
    return all(name not in wanted or tuple(entry.shape) == wanted[name] for name, entry in entries.items())


def arguments_json_cannot_hold(callback: CompreSSMCallback) -> list[str]:
    """The names of what a callback was given that no checkpoint holds."""
    given = {
        "loss_function": callback.loss_function is not None,
        "calibration_batches": callback.calibration_batches is not None,
        "averaged_weights": bool(callback.averaged_weights),
    }
    return [name for name, present in given.items() if present]


def require_arguments_of_saved(callback: CompreSSMCallback) -> None:
    """
    Refuse a callback that the Trainer has made of a checkpoint, which holds not all of its arguments.

    Args:
        callback ([`CompreSSMCallback`]): It has `saved_arguments` where it was made of a checkpoint.

    Raises:
        [`~errors.ConfigurationError`]: an argument is lost.
    """
    lost = sorted(set(getattr(callback, "saved_arguments", [])) - set(arguments_json_cannot_hold(callback)))
    if lost:
        raise ConfigurationError(
            f"restore_callback_states_from_checkpoint=True has put a new callback without its {', '.join(lost)} in "
            "the place of the one that you gave. Leave it at False: the callback restores its state by itself."
        )


@dataclass(frozen=True)
class SavedRun:
    """
    What a checkpoint holds of the compression of its run.

    Args:
        records (`list[CheckRecord]`): What every check up to the checkpoint saw and did.
        pending (`dict`, *optional*): What a cut that was still to be judged is compared with, and when.
    """

    records: list[CheckRecord] = field(default_factory=list)
    pending: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Judgement:
    """What [`~training.evaluation_watch.EvaluationWatch`] saves."""

    before: float | None = None
    judge_at: int | None = None


def _judgement_in(saved: Any) -> dict[str, Any] | None:
    if saved is None:
        return None
    judgement = _Judgement(**known_fields(_Judgement, saved))
    if judgement.judge_at is not None and judgement.before is None:
        raise InconsistentModelError(f"a cut is to be judged after step {judgement.judge_at}, and by no earlier value.")
    return asdict(judgement)


def saved_run(state: TrainerState, callback: ExportableState) -> SavedRun:
    """
    What the checkpoint of a resumed run holds; nothing for a run that starts at its first step.

    Args:
        state (`transformers.TrainerState`): The run's state. It gets an entry for the callback where it has none, as
            after a checkpoint that was written without it; the Trainer could not write its next checkpoint otherwise.
        callback (`transformers.trainer_callback.ExportableState`): The callback whose `state()` was saved.

    Raises:
        [`~errors.InconsistentModelError`]: what the checkpoint holds is not what a callback saves.
    """
    saved = state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
    if state.global_step == 0:
        return SavedRun()
    # Of several callbacks of one class the Trainer keeps a list.
    try:
        attributes = (saved[0] if isinstance(saved, list) else saved).get("attributes", {})
        records = [CheckRecord.from_dict(record) for record in attributes.get("saved_records", [])]
        return SavedRun(records, _judgement_in(attributes.get("saved_judgement")))
    except (InconsistentModelError, LookupError, TypeError, AttributeError) as error:
        raise InconsistentModelError(
            f"the entry of {type(callback).__name__} in the trainer_state.json of the checkpoint of step "
            f"{state.global_step} cannot be read: {error!r:.200}. Resume from another checkpoint."
        ) from error
