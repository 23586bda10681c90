"""
Models with selective layers that the classes of transformers cannot hold: a state size of each layer, and mixed states.

`CompressedMamba2ForCausalLM`, `CompressedJambaModel` and so on are made of `Mamba2ForCausalLM`, `JambaModel` and so on
when they are first asked for. They build the stock model and give each of its state-space layers the form that the
configuration says.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .configuration_compressed import PREFIX, compressed_config_class, sized_config
from .mixing import mix
from .stock_families import STOCK_FAMILIES, family_of, family_of_mixer

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}


class CompressedStates:
    """
    What a compressed model does when it is built.

    Args:
        config (`transformers.PreTrainedConfig`): A compressed configuration.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.state_sizes is not None:
            give_forms(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the initial values are set by code of transformers, which knows what has been loaded."""
        return False


def state_space_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """
    The mixers of a model whose state can have a size of its own, by name and in the model's order.

    Args:
        model (`torch.nn.Module`): A model of transformers.
    """
    return {name: module for name, module in model.named_modules() if family_of_mixer(type(module)) is not None}


def give_forms(model: PreTrainedModel) -> None:
    """
    Give every state-space layer of a freshly built stock model the sizes and the form of its compressed configuration.

    Args:
        model (`transformers.PreTrainedModel`): A model whose configuration has `state_sizes`.

    Raises:
        `ValueError`: the configuration has not one size for each state-space layer.
    """
    config, mixers = model.config, state_space_mixers(model)
    if len(mixers) != len(config.state_sizes):
        raise ValueError(
            f"`state_sizes` has {len(config.state_sizes)} numbers; {type(model).__name__} has {len(mixers)} "
            "state-space layers."
        )
    for (name, mixer), size, projected in zip(mixers.items(), config.state_sizes, config.projected_state_sizes):
        if projected != getattr(mixer, family_of_mixer(type(mixer)).size_name):
            mixer = _of_size(model, name, mixer, projected)
        if size < projected:
            mix(mixer, size)


def _of_size(model: PreTrainedModel, name: str, mixer: nn.Module, size: int) -> nn.Module:
    """Put a mixer of another state size in the place of one; returns it."""
    config = copy.deepcopy(sized_config(model.config))
    setattr(config, model.config.state_size_name, size)
    new = type(mixer)(config, layer_idx=mixer.layer_idx)
    # Private API of transformers.
    for module in new.modules():
        model._initialize_weights(module)
    if hasattr(mixer, "mup_vector"):
        raise ValueError(
            "`projected_state_sizes` differ between layers of a FalconH1, whose multipliers transformers keeps for one "
            "size; they must be equal."
        )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new


@functools.cache
def compressed_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    The compressed class of a stock model class, made at its first use.

    Args:
        stock (`type`): A model class of transformers whose configuration class is in `STOCK_FAMILIES`.

    Raises:
        `KeyError`: its configuration class is none of them.
    """
    config_class = compressed_config_class(stock.config_class)
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with the state sizes and forms of a `{config_class.__name__}`.",
        "config_class": config_class,
    }
    made = type(PREFIX + stock.__name__, (CompressedStates, stock), namespace)
    auto_class = next((auto for end, auto in AUTO_CLASSES.items() if stock.__name__.endswith(end)), None)
    if auto_class is not None:
        made.register_for_auto_class(auto_class)
    _convert_checkpoints_alike(config_class.model_type, stock.config_class.model_type)
    return made


def compressed_class_of(model: nn.Module) -> type[PreTrainedModel] | None:
    """
    The compressed class that a model can take over by its `__class__`, or None where there is none.

    Args:
        model (`torch.nn.Module`): Any module; one of a stock family's own model classes has a compressed one.
    """
    row = family_of(type(model.config).__name__) if isinstance(model, PreTrainedModel) else None
    # A class that someone has derived from one of these does what the compressed class does not know of.
    return compressed_model_class(type(model)) if row is not None and type(model).__module__ == row.modeling else None


def stock_class_of(model: nn.Module) -> type[PreTrainedModel] | None:
    """
    The stock class of a model of a compressed class, or None for any other model.

    Args:
        model (`torch.nn.Module`): Any module; its class may be that of code which came with a checkpoint.
    """
    classes = type(model).__mro__
    # In the classes that this module makes, the stock one follows.
    after = (stock for cls, stock in zip(classes, classes[1:]) if cls.__name__ == CompressedStates.__name__)
    return next(after, None)


def saves_itself(model: nn.Module) -> bool:
    """Whether a model has a class and a configuration of its own that `from_pretrained` would build it by."""
    return isinstance(model, PreTrainedModel)


def _convert_checkpoints_alike(model_type: str, stock_type: str) -> None:
    """Let the weights of a type of model be renamed and joined, on their way to and from files, as those of another."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers that converts nothing
        return
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(stock_type)
    if mapping is not None and conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, mapping)


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(PREFIX)
    rows = [row for row in STOCK_FAMILIES.values() if stock != name and stock.startswith(row.stem)]
    found = next((cls for row in rows if (cls := row.class_named(stock)) is not None), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or family_of(found.config_class.__name__) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return compressed_model_class(found)
