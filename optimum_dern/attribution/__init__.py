"""Who does what: how much every expert and neuron works for each domain of text, and models without some of them."""

from .masking import mask_checkpoint, masked_experts
from .measure import attribute_experts
from .result import Attribution


__all__ = ["Attribution", "attribute_experts", "mask_checkpoint", "masked_experts"]
