"""Tiny Mixture-of-Experts models, a byte-level tokenizer, and texts, all created in memory."""

from typing import Any

import torch


VOCABULARY = 300
EOS, PAD, BOS = 256, 257, 258  # BOS of `adding_tokenizer` only
MESSAGE = "<{{ message.role }}>{{ message.content }}\n"
TEMPLATE = f"{{{{ bos_token }}}}{{% for message in messages %}}{MESSAGE}{{% endfor %}}{{{{ eos_token }}}}"
EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 32, 16

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,  # large, so that a wrong expert shows in the logits
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "intermediate_size": 48,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "intermediate_size": 48,
        "moe_intermediate_size": WIDTH,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
    "deepseek_v3": {  # groups of four: every group is scored by its two best experts, so 8 -> 4 needs two groups
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "intermediate_size": 48,
        "moe_intermediate_size": WIDTH,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "routed_scaling_factor": 2.5,
    },
}
AUX_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # families whose config has `output_router_logits`
FIRST_MOE = {"deepseek_v3": 1}  # decoder layers before it are dense


def make_config(family: str, **overrides: Any) -> Any:
    """Make the config of one of `FAMILIES`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides}, dtype="float32")


@torch.no_grad()
def make_model(family: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Make a random float32 model in evaluation mode, reproducible by its seed; keeps the global random state.

    Routers are sharp, so that the load is uneven.  Experts are noisy copies of one another, so that some of their
    neurons pass the default similarity threshold.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, **overrides), dtype=torch.float32).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(".gate.weight"):
                tensor.mul_(2)  # 20 x the usual standard deviation of 0.02
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensor.mul_(0.7).add_(0.7 * 0.2 * torch.randn_like(tensor[:1]))
    return model


def tiny_tokenizer() -> Any:
    """Make a byte-level tokenizer with EOS and padding tokens, which adds no special tokens by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<eos>": EOS, "<pad>": PAD}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def adding_tokenizer(bos: str = "<bos>") -> Any:
    """Make a byte-level tokenizer that puts BOS in front of every text, and whose chat template writes it as well.

    Args:
        bos: the token; "<eos>" for one that is both.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos})
    start = (bos, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[start])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def random_tokens(n: int = 5, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Make random calibration data as token dicts, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(EOS, (length,), generator=generator)} for _ in range(n)]


def sample_texts() -> list[str]:
    """Make a dozen short texts of different lengths."""
    words = "the router sends each token to two experts and sums what they return with its own weights".split()
    return [" ".join(words[i:] + words[: i // 2]).capitalize() + "." for i in range(12)]


def padded_batch(lengths: list[int], side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make one batch of random sequences, padded on the left or on the right."""
    rows = [random_tokens(1, length, seed + i)[0]["input_ids"] for i, length in enumerate(lengths)]
    ids = torch.full((len(rows), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(len(row)) if side == "right" else slice(max(lengths) - len(row), None)
        ids[i, part], mask[i, part] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters and buffers that a model saves."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two results of `state_of` are bitwise equal."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def make_checkpoint(folder: Any, seed: int = 0) -> Any:
    """Save a tiny Mixtral with its tokenizer, and return the folder."""
    make_model("mixtral", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def compress(model: torch.nn.Module, **fields: Any) -> Any:
    """Compress a model with random tokens, by default from 8 to 4 experts, and return the compressor."""
    from optimum_dern import DernCompressor

    compressor = DernCompressor(**{"num_experts": 4, "dataset": random_tokens(), "batch_size": 4, **fields})
    assert compressor.compress_model(model) is model
    return compressor
