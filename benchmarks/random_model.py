"""A random Mixture-of-Experts checkpoint of given sizes, and random calibration tokens for it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


__all__ = ["Sizes", "random_tokens", "write_fine_tuned", "write_model"]

VOCABULARY = 4096


class Sizes(NamedTuple):
    """Sizes of a Qwen3-MoE; by default 105 million parameters, 401 MiB in float32."""

    layers: int = 4
    experts: int = 64
    top_k: int = 8
    hidden: int = 512
    width: int = 256


def write_model(folder: Path, sizes: Sizes) -> None:
    """Write a random float32 checkpoint, the same for the same sizes."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        moe_intermediate_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(8, sizes.hidden // 8),
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.05)
    model.save_pretrained(folder)


def write_fine_tuned(folder: Path, base: Path, seed: int) -> None:
    """Write a checkpoint that differs from another by noise, as if it were fine-tuned from it."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3MoeForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def random_tokens(sequences: int, length: int) -> Tensor:
    """Make random token ids (sequences, length), always the same."""
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))
