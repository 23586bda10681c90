"""The LRU (Orvieto et al. 2023), registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_lru import LRUConfig
from .modeling_lru import LRUForCausalLM, LRUForSequenceClassification, LRUModel, LRUPreTrainedModel

AutoConfig.register("lru", LRUConfig)
AutoModel.register(LRUConfig, LRUModel)
AutoModelForCausalLM.register(LRUConfig, LRUForCausalLM)
AutoModelForSequenceClassification.register(LRUConfig, LRUForSequenceClassification)

# `save_pretrained` writes the code beside the weights, for those who load them without this library.
LRUConfig.register_for_auto_class()
LRUModel.register_for_auto_class("AutoModel")
LRUForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LRUForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["LRUConfig", "LRUForCausalLM", "LRUForSequenceClassification", "LRUModel", "LRUPreTrainedModel"]
