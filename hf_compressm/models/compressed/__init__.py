"""Compressed forms of the selective models of transformers; their classes are made when they are asked for."""

from .configuration_compressed import compressed_config_class
from .modeling_compressed import compressed_class_of, compressed_model_class, saves_itself

__all__ = ["compressed_class_of", "compressed_config_class", "compressed_model_class", "saves_itself"]
