"""
LRU (Orvieto et al. 2023), S4D (Gu et al. 2022) and sequence classifiers on Mamba and Mamba-2, registered with the Auto
classes.

The folder is flat, and its modules import no other folder: `save_pretrained` copies them next to the weights.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_lru import LRUConfig
from .configuration_mamba_classifiers import Mamba2ClassifierConfig, MambaClassifierConfig
from .configuration_s4d import S4DConfig
from .modeling_lru import LRUForCausalLM, LRUForSequenceClassification, LRUModel, LRUPreTrainedModel
from .modeling_mamba_classifiers import Mamba2ForSequenceClassification, MambaForSequenceClassification
from .modeling_s4d import S4DForCausalLM, S4DForSequenceClassification, S4DModel, S4DPreTrainedModel

_MODELS = {
    LRUConfig: {
        AutoModel: LRUModel,
        AutoModelForCausalLM: LRUForCausalLM,
        AutoModelForSequenceClassification: LRUForSequenceClassification,
    },
    S4DConfig: {
        AutoModel: S4DModel,
        AutoModelForCausalLM: S4DForCausalLM,
        AutoModelForSequenceClassification: S4DForSequenceClassification,
    },
    MambaClassifierConfig: {AutoModelForSequenceClassification: MambaForSequenceClassification},
    Mamba2ClassifierConfig: {AutoModelForSequenceClassification: Mamba2ForSequenceClassification},
}

for _config, _models in _MODELS.items():
    AutoConfig.register(_config.model_type, _config)
    # `save_pretrained` writes the code next to the weights, for those who load them without this library.
    _config.register_for_auto_class()
    for _auto_class, _model in _models.items():
        _auto_class.register(_config, _model)
        _model.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "LRUConfig",
    "LRUForCausalLM",
    "LRUForSequenceClassification",
    "LRUModel",
    "LRUPreTrainedModel",
    "Mamba2ClassifierConfig",
    "Mamba2ForSequenceClassification",
    "MambaClassifierConfig",
    "MambaForSequenceClassification",
    "S4DConfig",
    "S4DForCausalLM",
    "S4DForSequenceClassification",
    "S4DModel",
    "S4DPreTrainedModel",
]
