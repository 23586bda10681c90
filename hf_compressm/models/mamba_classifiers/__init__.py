"""Sequence classifiers on Mamba and Mamba-2, registered with the Auto classes."""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .configuration_mamba_classifiers import Mamba2ClassifierConfig, MambaClassifierConfig
from .modeling_mamba_classifiers import Mamba2ForSequenceClassification, MambaForSequenceClassification

for _config, _model in (
    (MambaClassifierConfig, MambaForSequenceClassification),
    (Mamba2ClassifierConfig, Mamba2ForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _model)
    # `save_pretrained` writes the code beside the weights, for those who load them without this library.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "Mamba2ClassifierConfig",
    "Mamba2ForSequenceClassification",
    "MambaClassifierConfig",
    "MambaForSequenceClassification",
]
