"""A model whose saves are followed: wherever it is saved or pushed, card, history and picture go along."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import find_layers
from ..cards.provenance import Provenance
from ..compression.cut.snapshot import LAYERS_NAME, Snapshot
from ..errors import CardError, UnsupportedModelError
from ..files import checkpoint_step
from .adapters import holds_adapter
from .files import write_model_files
from .one_model import INDEX_NAME, WEIGHTS_NAME, require_one_model
from .own_class import own_class, with_own_class

logger = logging.getLogger(__name__)

# The last thing that transformers calls before it uploads what `model.push_to_hub` or `save_pretrained` wrote.
_UPLOAD = "_upload_modified_files"
_FOLLOWED = "_hf_compressm_followed_saves"


def follow_saves(model: nn.Module, provenance: Provenance) -> None:
    """
    From now on `model.save_pretrained` and `model.push_to_hub` write the model's card, history and picture too.

    The two methods are shadowed on this one object, and only once; later calls replace the facts. A model without
    `save_pretrained` (a module of the user's own) is left as it is. A pushed model is checked first: nothing is
    uploaded whose configuration disagrees with its weights. Of a model with an adapter (PEFT), which is saved without
    the model below it, the layers of that are written too; see [`~saving.load_cut_layers`].

    Args:
        model (`torch.nn.Module`): The model that was compressed.
        provenance ([`Provenance`]): The facts.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        return
    if hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
        # What is left when the adapter is merged.
        follow_saves(model.get_base_model(), provenance)
    followed = vars(model).get(_FOLLOWED)
    if followed is not None:
        followed.provenance = provenance
        return
    followed = _FollowedSaves(model, provenance, model.save_pretrained, _stock_upload(model))
    # Past nn.Module.__setattr__, which would look for parameters and modules in it.
    vars(model)[_FOLLOWED] = followed
    vars(model)["save_pretrained"] = followed.save_pretrained
    if followed.stock_upload is not None:
        vars(model)[_UPLOAD] = followed.upload


def _stock_upload(model: nn.Module) -> Callable[..., Any] | None:
    """The upload to check before; a model that can be pushed but does not upload through it is warned of."""
    if not callable(getattr(model, "push_to_hub", None)):
        return None
    try:
        # Private API of transformers.
        return model._upload_modified_files
    except AttributeError:
        logger.warning(
            "%s has push_to_hub but no %s, as a transformers that this library was not tried with: what it pushes is "
            "not checked before the upload. Save the model and push the folder with push_folder() instead.",
            type(model).__name__,
            _UPLOAD,
        )
        return None


def provenance_of(model: nn.Module) -> Provenance | None:
    """The provenance of a model that was cut or measured, or None."""
    followed = vars(model).get(_FOLLOWED)
    return None if followed is None else followed.provenance


@dataclass
class _FollowedSaves:
    """The facts and the stock methods; plain attributes, so that a copy of the model gets a copy of its own."""

    model: nn.Module
    provenance: Provenance
    stock_save: Callable[..., Any]
    stock_upload: Callable[..., Any] | None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The model's own `save_pretrained`, and the files of its provenance."""
        with with_own_class(self.model):
            result = self.stock_save(save_directory, *args, **kwargs)
        is_main_process = kwargs.get("is_main_process", args[0] if args else True)
        if is_main_process and os.path.isdir(save_directory):
            self._save_layers_below_adapter(Path(save_directory))
            name = self.provenance.name or Path(save_directory).absolute().name
            self._write(save_directory, replace(self.provenance, name=name))
        return result

    def _save_layers_below_adapter(self, folder: Path) -> None:
        if not holds_adapter(folder) or not self.provenance.layers():
            return
        try:
            narrowed = self.provenance.narrowed_layers()
            Snapshot.of(find_layers(self.model), whole=narrowed).save(folder, LAYERS_NAME)
        except UnsupportedModelError as error:
            logger.warning("%s holds the adapter without the cut layers below it: %s", folder, error)
            return
        # A checkpoint is resumed from, which puts the layers back.
        if self.provenance.cuts and checkpoint_step(folder) is None:
            logger.warning(
                "%s holds the adapter alone, of a model whose state was cut; the cut layers are next to it in %s. "
                "Loading the adapter puts it on the uncut model, without an error: call load_cut_layers(model, %r) on "
                "that model first, or save a whole one with model.merge_and_unload().save_pretrained(...).",
                folder,
                LAYERS_NAME,
                str(folder),
            )

    def upload(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """The model's own upload, of a folder that was checked and whose card names the repository."""
        # Adapters have no configuration of the model, and variants other names; they are pushed as they are.
        found = {name for name in ("config.json", WEIGHTS_NAME, INDEX_NAME) if (Path(working_dir) / name).is_file()}
        if "config.json" in found and len(found) > 1:
            require_one_model(working_dir, own_class(self.model), self.provenance.sizes())
        self._write(working_dir, replace(self.provenance, name=repo_id))
        return self.stock_upload(working_dir, repo_id, *args, **kwargs)

    def _write(self, folder: str | os.PathLike, provenance: Provenance) -> None:
        try:
            write_model_files(folder, describe(self.model, provenance))
        except CardError as error:
            # The weights are saved; a card that cannot be read is no reason to lose them.
            logger.warning("the model card in %s was left as it is: %s", folder, error)


def describe(model: nn.Module, provenance: Provenance) -> Provenance:
    """
    The facts, completed by the model itself where they are missing: its class, its type and where it came from.

    Args:
        model (`torch.nn.Module`): The model.
        provenance ([`Provenance`]): What is known.
    """
    config = getattr(model, "config", None)
    # Private API of transformers.
    source = getattr(config, "_name_or_path", None) or None
    is_local = source is not None and (os.path.exists(source) or source.count("/") != 1)
    return replace(
        provenance,
        model_class=provenance.model_class or own_class(model).__name__,
        model_type=provenance.model_type or getattr(config, "model_type", None),
        reads_tokens=provenance.reads_tokens and getattr(config, "vocab_size", True) is not None,
        needs_code=provenance.needs_code or bool(getattr(config, "auto_map", None)),
        base_model=provenance.base_model or (None if is_local else source),
    )
