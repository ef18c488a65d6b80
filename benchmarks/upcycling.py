"""Sparse upcycling of a dense Llama into a Mixtral, with a share of every expert's neurons reinitialised."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_tiny_moe import upcycle  # noqa: E402


SHARED = (  # config fields with the same name in both families
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def load_base(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a dense model in float32, and its tokenizer."""
    is_gguf = path.suffix == ".gguf"
    folder, options = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    dense = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    biases = [name for name, _ in dense.named_parameters() if name.endswith(".bias")]
    if biases:
        raise SystemExit(f"{path} has biases ({biases[0]}, ...), for which Mixtral has no place; choose another base")
    return dense, AutoTokenizer.from_pretrained(folder, **options)


def build_model(dense: LlamaForCausalLM, experts: int, top_k: int, reset: float, seed: int) -> MixtralForCausalLM:
    """Build the upcycled model, before training."""
    shape = {name: getattr(dense.config, name) for name in SHARED}
    torch.manual_seed(seed)
    sparse = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=top_k))
    upcycle(dense, sparse)
    reset_neurons_(sparse, reset, seed)
    return sparse


@torch.no_grad()
def reset_neurons_(model: MixtralForCausalLM, share: float, seed: int) -> None:
    """Reinitialise a share of every expert's neurons at random, with the mean and spread of their projection."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)  # (E, f, d) each, views
        neurons = (gate, up, layer.mlp.experts.down_proj.transpose(1, 2))
        scales = [(projection[0].mean().item(), projection[0].std().item()) for projection in neurons]
        experts, width, _ = gate.shape
        for expert in range(experts):
            chosen = torch.randperm(width, generator=generator)[: round(share * width)]
            for projection, (mean, spread) in zip(neurons, scales, strict=True):
                new = torch.randn(len(chosen), projection.shape[2], generator=generator)
                projection[expert, chosen] = mean + spread * new
