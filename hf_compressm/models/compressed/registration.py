"""
The Auto classes' knowledge of compressed models.

The configuration classes are registered at import. A model class is registered when a configuration of its kind is
first built, as `AutoConfig` does before a model is loaded, so that nobody imports the models of the other families.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ...errors import ConfigurationError
from .configuration_compressed import PREFIX, compressed_config_class, when_first_built
from .modeling_compressed import AUTO_CLASSES, compressed_model_class
from .stock_families import STOCK_FAMILIES, StockFamily, family_of


def register_stock_family(name: str, row: StockFamily) -> StockFamily:
    """
    Let models of a family that is not in `STOCK_FAMILIES` be compressed, saved and loaded.

    A folder with a compressed model of the family loads wherever its row is registered.

    Args:
        name (`str`): The family's name, as its layer class has it.
        row ([`StockFamily`]): What its classes and sizes are called.

    Returns:
        [`StockFamily`]: The row.

    Raises:
        [`~errors.ConfigurationError`]: another row has the family's name or the name of one of its classes, or its
            module has no such configuration.
    """
    rows = (STOCK_FAMILIES.get(name), *(family_of(cls) for cls in (row.mixer, row.norm, *row.configs) if cls))
    known = next((found for found in rows if found not in (None, row)), None)
    if known is not None:
        raise ConfigurationError(f"the family {name!r} is known, or a class of it: {known}. Register another name.")
    if row.class_named(row.config) is None:
        raise ConfigurationError(f"{row.modeling} has no {row.config}, the configuration of the family {name!r}.")
    STOCK_FAMILIES[name] = row
    _register_configuration(row)
    return row


def register_configurations() -> None:
    """Let `AutoConfig` read the configurations of compressed models; calling this again changes nothing."""
    for row in STOCK_FAMILIES.values():
        if row.is_installed:
            _register_configuration(row)
    if register_models not in when_first_built:
        when_first_built.append(register_models)


def _register_configuration(row: StockFamily) -> None:
    for name in row.configs:
        config_class = compressed_config_class(row.class_named(name))
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """
    Let the Auto classes load the models of a compressed configuration class.

    Args:
        config_class (`type`): A class from `compressed_config_class`.
    """
    name = config_class.__name__.removeprefix(PREFIX)
    row = family_of(name)
    for end, auto_class in AUTO_CLASSES.items():
        stock = row.model_class(end, name)
        if stock is not None:
            getattr(transformers, auto_class).register(config_class, compressed_model_class(stock), exist_ok=True)
