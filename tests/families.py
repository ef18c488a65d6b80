"""Tiny models of all Mixture-of-Experts families of transformers that can be compressed."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import EOS, EXPERTS, HIDDEN, PAD, TOP_K, VOCABULARY, WIDTH


@dataclass(frozen=True)
class Family:
    """Config fields of a tiny model of one family, and how its checkpoints differ from others."""

    fields: dict[str, Any]  # of the config that sizes the experts
    nested: str | None = None  # that config's name inside the model's, where it is not the model's own
    outer: dict[str, Any] = field(default_factory=dict)  # fields of the model's config around it
    architecture: str | None = None  # class of models that are not in transformers' list of causal language models
    fused: bool = False  # on disk all experts of a layer are one tensor
    transposed: bool = False  # in published checkpoints, but not in what transformers 5 saves


ROPE = {"rope_type": "default", "rope_theta": 20000.0}  # no class's default, to see that it survives
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that a wrong expert shows in the logits
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": ROPE,
}
OWN_ROPE = {"rope_parameters": None}  # one for each kind of layer
OUTER = {name: COMMON[name] for name in ("tie_word_embeddings", "initializer_range")}  # of composite models
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}  # of sparse attention
SHARED_INDEXER = {**INDEXER, "indexer_types": ["full", "shared", "full"]}  # the second layer is told by the first
LINEAR = {  # gated delta net in the first layer
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
DENSE_FIRST = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
K_DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
ROUTED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
SCALED = {"routed_scaling_factor": 2.5}
SHARED = {"shared_expert_intermediate_size": 24}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {  # vision tower of the Qwen kind
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
GEMMA4 = {
    **OWN_ROPE,
    "num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "num_experts_per_tok": None,
    "enable_moe_block": True,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,  # the last two attend to keys and values of the first two
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
}
ARIA = {
    "moe_num_experts": EXPERTS,
    "moe_topk": TOP_K,
    "num_experts_per_tok": None,
    "moe_num_shared_experts": 1,
    "intermediate_size": WIDTH,
}
IMAGE_TOKENS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
QWEN3_OMNI = {
    "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
    "audio_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "output_dim": HIDDEN,
        "downsample_hidden_size": 16,
        "num_mel_bins": 16,
    },
    "image_token_id": 290,
    "video_token_id": 291,
    "audio_token_id": 292,
    "vision_start_token_id": 293,
}
GLM5 = {
    "layer_types": ["full_attention", "full_attention", "linear_attention"],
    "index_kpool": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "qk_rope_head_dim": 0,
    "head_dim": 0,
    "hc_mult": 2,
}
KIMI = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "q_lora_rank": None,
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}

FAMILIES: dict[str, Family] = {
    "mixtral": Family({"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "minimax": Family(
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        }
    ),
    "minimax_m2": Family({"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "phimoe": Family({"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "qwen2_moe": Family({"num_experts": EXPERTS, **SHARED}),
    "qwen3_moe": Family({"num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen3_next": Family({"num_experts": EXPERTS, **SHARED, **LINEAR}),
    "qwen3_5_moe_text": Family({"num_experts": EXPERTS, **SHARED, **LINEAR}),
    "qwen3_5_moe": Family(
        {"num_experts": EXPERTS, **SHARED, **LINEAR},
        "text_config",
        {"vision_config": QWEN_TOWER, **IMAGE_TOKENS},
        "Qwen3_5MoeForConditionalGeneration",
    ),
    "qwen4_exp_text": Family({"num_experts": EXPERTS, **SHARED, **LINEAR, **QWEN4}),
    "qwen4_exp": Family(
        {"num_experts": EXPERTS, **SHARED, **LINEAR, **QWEN4},
        "text_config",
        {"vision_config": QWEN_TOWER, **IMAGE_TOKENS},
        "Qwen4ExpForConditionalGeneration",
    ),
    "qwen3_vl_moe": Family(
        {"num_experts": EXPERTS, "moe_intermediate_size": 12, **SECTIONS},
        "text_config",
        {"vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}, **IMAGE_TOKENS},
        "Qwen3VLMoeForConditionalGeneration",
        fused=True,
        transposed=True,
    ),
    "qwen3_omni_moe_thinker": Family(
        {"num_experts": EXPERTS, **SECTIONS},
        "text_config",
        QWEN3_OMNI,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "olmoe": Family({"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "flex_olmo": Family({"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "mellum": Family(
        {
            **OWN_ROPE,
            "num_experts": EXPERTS,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
        }
    ),
    "deepseek_v2": Family({**LATENT, **K_DENSE_FIRST, **ROUTED}),
    "deepseek_v3": Family({**LATENT, **K_DENSE_FIRST, **ROUTED, **GROUPS, **SCALED}),
    "deepseek_v32": Family({**LATENT, **DENSE_FIRST, **ROUTED, **GROUPS, **SCALED, **INDEXER}),
    "deepseek_v4": Family(
        {
            **OWN_ROPE,
            "n_routed_experts": EXPERTS,
            "mlp_layer_types": ["moe", "moe"],  # published ones begin with hash layers, and are refused
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "hc_mult": 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
            "sliding_window": 16,
        }
    ),
    "kimi_k25": Family(
        {"model_type": "deepseek_v3", **LATENT, **K_DENSE_FIRST, **ROUTED, **GROUPS, **SCALED},
        "text_config",
        {
            "vision_config": {**TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
            **IMAGE_TOKENS,
            "projection_hidden_size": 16,
        },
        "Kimi_K25ForConditionalGeneration",
    ),
    "deepseek_ocr2": Family(
        {"num_key_value_heads": 4, **DENSE_FIRST, **ROUTED},
        "text_config",
        {
            "vision_config": {
                "sam_config": {
                    **TOWER,
                    "mlp_dim": 16,
                    "image_size": 64,
                    "output_channels": 8,
                    "downsample_channels": [8, 16],
                    "global_attn_indexes": [0],
                    "window_size": 2,
                },
                "encoder_config": {**TOWER, "num_key_value_heads": 2, "vocab_size": 8},
            },
            "image_token_id": 290,
        },
        "DeepseekOcr2ForConditionalGeneration",
    ),
    "dots1": Family({**K_DENSE_FIRST, **ROUTED, **SCALED, "num_key_value_heads": 4}),
    "glm4_moe": Family({**K_DENSE_FIRST, **ROUTED, **SCALED}),
    "glm4_moe_lite": Family({**LATENT, **DENSE_FIRST, **ROUTED, **GROUPS}),
    "glm4v_moe": Family(
        {
            **K_DENSE_FIRST,
            **ROUTED,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
        },
        "text_config",
        {"vision_config": {**QWEN_TOWER, "image_size": 28}, **IMAGE_TOKENS, "image_start_token_id": 294},
        "Glm4vMoeForConditionalGeneration",
    ),
    "glm_moe_dsa": Family({**LATENT, **DENSE_FIRST, **ROUTED, **SCALED, **SHARED_INDEXER}),
    "glm5_next": Family(
        {**LATENT, **DENSE_FIRST, **ROUTED, **SCALED, **SHARED_INDEXER, **GLM5},
        "text_config",
        {
            "vision_config": {**QWEN_TOWER, "image_size": 28, "projection_intermediate_size": 16},
            **IMAGE_TOKENS,
            "image_start_token_id": 294,
        },
        "Glm5NextForConditionalGeneration",
    ),
    "solar_open": Family(ROUTED),
    "mistral4": Family(
        {**LATENT, **K_DENSE_FIRST, **ROUTED, **OWN_ROPE, "head_dim": 16},
        architecture="Mistral4ForCausalLM",
        fused=True,
    ),
    "mimo_v2_flash": Family(
        {**OWN_ROPE, "n_routed_experts": EXPERTS, "v_head_dim": 8, "mlp_layer_types": ["sparse"] * 2}
    ),
    "kimi_linear": Family(
        {**LATENT, **DENSE_FIRST, **KIMI, **GROUPS, "num_experts": EXPERTS, "num_shared_experts": 1}
    ),
    "axk1": Family({**LATENT, **DENSE_FIRST, **ROUTED, **GROUPS}),
    "axk2": Family({**LATENT, **DENSE_FIRST, **ROUTED, **INDEXER}),
    "exaone_moe": Family({**DENSE_FIRST, **GROUPS, "num_experts": EXPERTS, "sliding_window": 16}),
    "hy_v3": Family({**DENSE_FIRST, "num_experts": EXPERTS}),
    "hy_v4": Family({**LATENT, **DENSE_FIRST, **ROUTED, **SHARED_INDEXER}, fused=True),
    "hunyuan_v1_moe": Family({"num_experts": EXPERTS, "moe_topk": TOP_K, "intermediate_size": WIDTH}),
    "ernie4_5_moe": Family(
        {
            "num_hidden_layers": 3,
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        }
    ),
    "laguna": Family({**OWN_ROPE, **DENSE_FIRST, **SHARED, "num_experts": EXPERTS}),
    "afmoe": Family({"num_hidden_layers": 3, "num_dense_layers": 1, "num_experts": EXPERTS, "num_shared_experts": 1}),
    "lfm2_moe": Family(
        {
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "num_experts": EXPERTS,
            "layer_types": ["conv", "full_attention", "conv"],
        }
    ),
    "jamba": Family(
        {
            "num_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
        }
    ),
    "granitemoe": Family({"num_local_experts": EXPERTS, "intermediate_size": WIDTH}, fused=True),
    "granitemoeshared": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "shared_intermediate_size": 24}, fused=True
    ),
    "granitemoehybrid": Family(
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
        },
        fused=True,
    ),
    "granitemoe_swa": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "shared_intermediate_size": 24}, fused=True
    ),
    "aria_text": Family(
        ARIA,
        fused=True,
    ),
    "aria": Family(
        {"model_type": "aria_text", **ARIA},
        "text_config",
        {"vision_config": {**TOWER, "image_size": 64}, "image_token_index": 290},
        "AriaForConditionalGeneration",
        fused=True,
    ),
    "gpt_oss": Family(
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        },
        fused=True,
    ),
    "cohere2_moe": Family(
        {**DENSE_FIRST, "num_experts": EXPERTS, "intermediate_size": WIDTH, "num_shared_experts": 1}
    ),
    "gemma4_text": Family(GEMMA4, fused=True),
    "gemma4": Family(
        GEMMA4,
        "text_config",
        {
            "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
            "image_token_id": 290,
            "video_token_id": 291,
            "audio_token_id": 292,
        },
        "Gemma4ForConditionalGeneration",
        fused=True,
    ),
    "diffusion_gemma": Family(
        {**GEMMA4, "num_kv_shared_layers": 0},
        "text_config",
        {
            "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
            "image_token_id": 290,
            "canvas_length": 8,
            "tie_word_embeddings": True,  # this also lets encoder and decoder share their experts
        },
        "DiffusionGemmaForBlockDiffusion",
        fused=True,
    ),
    "nemotron_h": Family(
        {
            **ROUTED,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "num_hidden_layers": 4,
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": 24,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 2,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        }
    ),
    "minimax_m3_vl_text": Family(
        {
            **DENSE_FIRST,
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 24,
            "rotary_dim": 4,
        },
        fused=True,
    ),
    "minimax_m3_vl": Family(
        {
            **DENSE_FIRST,
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 24,
            "rotary_dim": 4,
        },
        "text_config",
        {"vision_config": TOWER, "image_token_index": 290, "video_token_index": 291, "projector_hidden_size": 16},
        "MiniMaxM3SparseForConditionalGeneration",
    ),
    "step3p7": Family(
        {**DENSE_FIRST, "n_routed_experts": EXPERTS, "share_expert_dim": 24, "sliding_window": 16},
        "text_config",
        {"vision_config": {**TOWER, "image_size": 56}, "image_token_id": 290},
        "Step3p7ForConditionalGeneration",
        fused=True,
    ),
    "llama4_text": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "intermediate_size_mlp": 48}, fused=True
    ),
    "llama4": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "intermediate_size_mlp": 48},
        "text_config",
        {
            "vision_config": {
                **TOWER,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": 290,
            "boi_token_index": 291,
            "eoi_token_index": 292,
        },
        "Llama4ForConditionalGeneration",
        fused=True,
    ),
}
ROUTERS = ("gate.weight", "router.weight", "gate.wg.weight", "router.gate.weight", "router.proj.weight")
BIASES = ("e_score_correction_bias", "expert_bias", "router.bias", "_proj_bias")
EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")


def make_config(name: str) -> Any:
    """Make the config of a tiny model of one family."""
    from transformers import AutoConfig

    family = FAMILIES[name]
    fields = deepcopy({**COMMON, **family.fields})  # configs add to what they are given
    if family.nested is None:
        return AutoConfig.for_model(name, **fields, dtype="float32")
    return AutoConfig.for_model(name, **{**OUTER, **deepcopy(family.outer), family.nested: fields}, dtype="float32")


def model_class(name: str) -> Any:
    """Return the class that loads a family's checkpoints."""
    import transformers

    return getattr(transformers, FAMILIES[name].architecture or "AutoModelForCausalLM")


def runnable(names: Iterable[str]) -> list[Any]:
    """Make pytest parameters of families; those that the installed transformers cannot run are skipped."""
    import transformers

    from optimum_dern.models.refusals import BROKEN

    skip = pytest.mark.skip(f"refused with transformers {transformers.__version__}")
    return [pytest.param(name, marks=[skip] * ((name, transformers.__version__) in BROKEN)) for name in names]


@torch.no_grad()
def make_model(name: str, seed: int = 0) -> torch.nn.Module:
    """Make a random float32 model of one family in evaluation mode, reproducible by its seed.

    Routers are sharp and biased, so that the load is uneven; experts are noisy copies of one another, so that some of
    their neurons pass the default similarity threshold.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls = model_class(name)
        build = getattr(cls, "from_config", None) or cls._from_config
        model = build(make_config(name), dtype=torch.float32).eval()
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if path.endswith(ROUTERS):
                tensor.copy_(torch.randn_like(tensor) * 0.4)
            elif path.endswith("per_expert_scale"):
                tensor.copy_(1 + 0.5 * torch.rand_like(tensor))
            elif path.endswith(BIASES):
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            elif path.endswith(EXPERT_WEIGHTS):
                tensor.mul_(0.7).add_(0.7 * tensor.std() * torch.randn_like(tensor[:1]))
    return model


# Families that transformers 4.57 has too.
TRANSFORMERS_4 = (
    "mixtral",
    "minimax",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "olmoe",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "glm4_moe",
    "glm4v_moe",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "jamba",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "aria_text",
    "aria",
    "gpt_oss",
    "llama4_text",
    "llama4",
)


def published_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Convert a config.json to the form that transformers 4 wrote: rope fields at the top level, `num_experts`."""
    result = {
        key: published_config(name, value) if isinstance(value, dict) else value for key, value in config.items()
    }
    rope = result.pop("rope_parameters", None)
    if rope:
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        partial = rest.pop("partial_rotary_factor", None)
        result["rope_theta"] = rope["rope_theta"]
        result["rope_scaling"] = rest if rest != {"rope_type": "default"} else None
        result |= {} if partial is None else {"partial_rotary_factor": partial}
    if "dtype" in result:
        result["torch_dtype"] = result.pop("dtype")
    if name == "granitemoehybrid" and "layer_types" in result:
        kinds = {"linear_attention": "mamba", "full_attention": "attention"}
        result["layer_types"] = [kinds[kind] for kind in result["layer_types"]]
    if name in ("qwen3_moe", "qwen3_vl_moe") and "num_local_experts" in result:
        result["num_experts"] = result.pop("num_local_experts")
    if "transformers_version" in result:
        result["transformers_version"] = "4.57.6"
    return result
