"""
The Auto classes' knowledge of compressed models.

The ten configuration classes are registered at import. A model class is registered when a configuration of its kind is
first built, as `AutoConfig` does before a model is loaded, so that nobody imports the models of nine other families.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, PreTrainedConfig

from .configuration_compressed import PREFIX, compressed_config_class, when_first_built
from .modeling_compressed import AUTO_CLASSES, compressed_model_class
from .stock_families import STOCK_FAMILIES


def register_configurations() -> None:
    """Let `AutoConfig` read the configurations of compressed models; calling this again changes nothing."""
    for row in STOCK_FAMILIES.values():
        config_class = compressed_config_class(getattr(transformers, row.config))
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    if register_models not in when_first_built:
        when_first_built.append(register_models)


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """
    Let the Auto classes load the models of a compressed configuration class.

    Args:
        config_class (`type`): A class from `compressed_config_class`.
    """
    stem = config_class.__name__.removeprefix(PREFIX).removesuffix("Config")
    for end, auto_class in AUTO_CLASSES.items():
        stock = getattr(transformers, stem + end, None)
        if stock is not None:
            getattr(transformers, auto_class).register(config_class, compressed_model_class(stock), exist_ok=True)
