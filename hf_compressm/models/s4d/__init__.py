"""S4D (Gu et al. 2022), registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_s4d import S4DConfig
from .modeling_s4d import S4DForCausalLM, S4DForSequenceClassification, S4DModel, S4DPreTrainedModel

AutoConfig.register("s4d", S4DConfig)
AutoModel.register(S4DConfig, S4DModel)
AutoModelForCausalLM.register(S4DConfig, S4DForCausalLM)
AutoModelForSequenceClassification.register(S4DConfig, S4DForSequenceClassification)

# `save_pretrained` writes the code beside the weights, for those who load them without this library.
S4DConfig.register_for_auto_class()
S4DModel.register_for_auto_class("AutoModel")
S4DForCausalLM.register_for_auto_class("AutoModelForCausalLM")
S4DForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["S4DConfig", "S4DForCausalLM", "S4DForSequenceClassification", "S4DModel", "S4DPreTrainedModel"]
