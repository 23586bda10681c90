"""`analyze` and `compress`: the library without a Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .architectures import unsupported_note
from .cards import Provenance
from .compression.compressor import Compressor
from .compression.cut.optimizer import require_trained_layers
from .compression.history import CheckRecord
from .compression.measure.model_pass import LossFunction
from .compression.spectrum import Spectrum
from .config import CompreSSMConfig
from .errors import ConfigurationError
from .saving import follow_saves, provenance_of
from .validation import require_batches, require_bool, require_function

logger = logging.getLogger(__name__)


def analyze(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: CompreSSMConfig | dict[str, Any] | None = None,
    loss_function: LossFunction | None = None,
    progress: bool | None = None,
    sizes: Sequence[int] = (),
    timed: bool = True,
) -> Spectrum:
    """
    Measure the Hankel singular values of every state-space layer of a model. Nothing is changed.

    Args:
        model (`torch.nn.Module`): A model with supported layers anywhere inside.
        batches (`Iterable`, *optional*): Calibration inputs; mappings are passed to the model as keyword arguments. All
            of them are used, so cut a long data loader short with `itertools.islice`. A model whose layers are all
            time-invariant needs none.
        config ([`CompreSSMConfig`] or its `dict`, *optional*): How [`compress`] would measure and cut; how much it
            would cut is not used.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.
        sizes (`Sequence[int]`, *optional*): State sizes to try: the model is cut to each as [`compress`] would do it,
            measured, and put back. The losses are those of the second half of the batches, which makes no cut.
        timed (`bool`, *optional*, defaults to `True`): Time a training step at each of the sizes.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no layer that can be cut.
        [`~errors.ConfigurationError`]: a size is not possible, or an argument is of another type.
        [`~errors.CalibrationError`]: the batches give no finite loss or Gramians.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> from hf_compressm import analyze

    >>> model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, state_size=8))
    >>> tokens = torch.randint(0, 16, (4, 32))
    >>> spectrum = analyze(model, [{"input_ids": tokens, "labels": tokens}])
    >>> sorted(spectrum.ranks(0.01))
    ['backbone.layers.0.mixer', 'backbone.layers.1.mixer']

    ```
    """
    config, batches = _checked(config, batches, loss_function)
    require_bool("timed", timed)
    if not isinstance(sizes, Iterable):
        raise ConfigurationError(f"sizes is {sizes!r}; give several state sizes, as in sizes=[8, 16].")
    sizes = list(sizes)
    compressor = Compressor(model, config, loss_function=loss_function, progress=progress)
    spectrum = compressor.measure(list(batches), sizes, timed)
    _tell_of_chance(model, spectrum.loss, loss_function)
    return spectrum


def compress(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: CompreSSMConfig | dict[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_function: LossFunction | None = None,
    progress: bool | None = None,
) -> CheckRecord:
    """
    Cut the state of a model's layers in place: after training, or between the steps of a training loop of your own.

    Args:
        model (`torch.nn.Module`): A model with supported layers anywhere inside. `save_pretrained` and `push_to_hub`
            afterwards write an ordinary checkpoint of the new size, with a model card, the history and a picture.
        batches (`Iterable`, *optional*): Calibration inputs, as in [`analyze`].
        config ([`CompreSSMConfig`] or its `dict`, *optional*): What to cut and how; its schedule (`window`,
            `interval`) is not used.
        optimizer (`torch.optim.Optimizer`, *optional*): Trains the model on, with moments that move along.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Returns:
        [`CheckRecord`]: What was seen in each layer and done to it.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no layer that can be cut, or the optimizer does not train it.
        [`~errors.ConfigurationError`], [`~errors.CalibrationError`]: as in [`analyze`].

    Example:

    ```python
    >>> import torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> from hf_compressm import CompreSSMConfig, compress

    >>> model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, state_size=8))
    >>> tokens = torch.randint(0, 16, (4, 32))
    >>> batch = {"input_ids": tokens, "labels": tokens}
    >>> record = compress(model, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=0.5))
    >>> record.outcome, model.config.state_size
    ('cut', 4)

    ```
    """
    config, batches = _checked(config, batches, loss_function)
    if config.judged_by_evaluation:
        raise ConfigurationError(
            f"rollback_metric is {config.rollback_metric!r}, a metric of the Trainer's evaluation; compress() "
            "makes none. Set rollback_metric='calibration_loss'."
        )
    compressor = Compressor(model, config, loss_function=loss_function, optimizer=optimizer, progress=progress)
    if optimizer is not None:
        require_trained_layers(optimizer, compressor.layers)
    if (note := unsupported_note(model, compressor.layers)) is not None:
        logger.warning(note)
    record = compressor.check(list(batches))
    _tell_of_chance(model, record.loss_before, loss_function)
    _let_saves_tell(model, compressor)
    return record


def _tell_of_chance(model: nn.Module, loss: float | None, loss_function: Any) -> None:
    """Warn where a language model predicts worse than chance, mostly for a wrong tokenizer."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if loss is None or loss_function is not None or not vocabulary or not type(model).__name__.endswith("ForCausalLM"):
        return
    # Rounding alone is no reason.
    if loss > 1.001 * math.log(vocabulary):
        logger.warning(
            "the loss on the calibration data is %.4f, above log(%d) = %.4f: the model predicts it worse than chance. "
            "Is it trained, and is the tokenizer its own?",
            loss, vocabulary, math.log(vocabulary),
        )  # fmt: skip


def _checked(config: Any, batches: Any, loss_function: Any) -> tuple[CompreSSMConfig, Iterable[Any]]:
    """Settings and batches that were given as they may be."""
    require_function("loss_function", loss_function)
    return CompreSSMConfig.coerced(config), () if require_batches("batches", batches) is None else batches


def _let_saves_tell(model: nn.Module, compressor: Compressor) -> None:
    """Have the card and the history of later saves say what was done, now and in earlier calls."""
    earlier = provenance_of(model) or Provenance([])
    # A cut that was taken back is two records, and the spectra are in the first.
    records = [*earlier.records, *compressor.records]
    follow_saves(model, replace(earlier, records=records, config=compressor.config))
