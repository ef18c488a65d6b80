"""A family whose own code reads the number of experts layer by layer; its checkpoints carry this file."""

import copy

from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock


class RaggedConfig(MixtralConfig):
    model_type = "ragged_mixtral"


class RaggedForCausalLM(MixtralForCausalLM):
    config_class = RaggedConfig

    def __init__(self, config):
        uniform = copy.deepcopy(config)
        uniform.per_layer_config = None
        super().__init__(uniform)
        self.config = self.model.config = config
        for position, layer in enumerate(self.model.layers):
            layer.mlp = MixtralSparseMoeBlock(config.per_layer_config[position])
            layer.mlp.experts.config = config  # as an unchanged family's
        self.post_init()


RaggedConfig.register_for_auto_class()
RaggedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
