"""A tiny dense model, models that stand for fine-tunes of another, and token batches for each of them."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def dense():
    """Make a random dense model whose head is tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config)


def changed(model, seed, size=0.02):
    """Add noise to all weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def texts(count=2, rows=2):
    """Make some batches of one sequence for each of several models."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(200, (1, 12), generator=generator) for _ in range(count * rows)]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    return [batches[i * rows : (i + 1) * rows] for i in range(count)]
