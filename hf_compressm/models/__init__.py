"""
Models that transformers does not have: LRU, S4D, sequence classifiers on Mamba and Mamba-2, and compressed models.

Importing this package registers them with the Auto classes.
"""

from .compressed.registration import register_configurations
from .sequence import (
    LRUConfig,
    LRUForCausalLM,
    LRUForSequenceClassification,
    LRUModel,
    Mamba2ClassifierConfig,
    Mamba2ForSequenceClassification,
    MambaClassifierConfig,
    MambaForSequenceClassification,
    S4DConfig,
    S4DForCausalLM,
    S4DForSequenceClassification,
    S4DModel,
)

register_configurations()

__all__ = [
    "LRUConfig",
    "LRUForCausalLM",
    "LRUForSequenceClassification",
    "LRUModel",
    "Mamba2ClassifierConfig",
    "Mamba2ForSequenceClassification",
    "MambaClassifierConfig",
    "MambaForSequenceClassification",
    "S4DConfig",
    "S4DForCausalLM",
    "S4DForSequenceClassification",
    "S4DModel",
]
