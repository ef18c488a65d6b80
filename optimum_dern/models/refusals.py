"""Validation of models and requests: whatever cannot be compressed is refused with the reason before any work."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.criteria.selection import retained_count, select_experts
from .moe.overrides import routing_hook
from .moe.structure import MoELayer


__all__ = [
    "BROKEN",
    "REFUSED",
    "WRITES_NOTHING",
    "advise_count",
    "check_config",
    "check_materialised",
    "check_model",
    "check_protection",
    "check_router_logits",
    "resolve_count",
]

REFUSED = {
    "jetmoe": "its expert count also sizes the attention experts, so the feed-forward ones cannot shrink alone",
    "dbrx": "its experts are stored as two-dimensional matrices of all experts together",
    "longcat_flash": "its router also chooses identity experts that have no weights",
    "inkling_mm_model": "its router's rows also score the shared experts",
    "inkling_text": "its router's rows also score the shared experts",
    "inkling2": "its layers also read what earlier layers gave, which calibration layer by layer does not follow",
    "inkling2_text": "its layers also read what earlier layers gave, which calibration layer by layer does not follow",
    "zaya": "its router has a class for skipping and passes state between layers",
    "ernie4_5_vl_moe": "each of its layers has two sets of experts that share one count",
    "ernie4_5_vl_moe_text": "each of its layers has two sets of experts that share one count",
    "doge": "its experts are product-key embeddings, not feed-forward networks",
    "openai_privacy_filter": "it is a token classifier, not a language model",
}
WRITES_NOTHING = {  # families that do not predict the next token
    "diffusion_gemma": "it predicts a block of tokens at a time",
    "diffusion_gemma_text": "it predicts a block of tokens at a time",
}
BROKEN = {  # families that a transformers release cannot run: the error, and the releases that work
    ("llama4", "5.24.0"): (
        "every forward pass of its Llama4ForConditionalGeneration ends in "
        "\"'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'\"",
        "transformers>=5.18,<5.24",
    ),
}


def check_config(config: Any) -> None:
    """Refuse a model family that cannot be compressed, judging by its config alone.

    Args:
        config: of transformers, nested or not.

    Raises:
        ValueError: naming the family and the reason, and another release of transformers where one can run it.
    """
    import transformers  # here: this file may itself be imported while transformers is

    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; only decoder language models can be compressed")
    for kind in (config.model_type, config.get_text_config().model_type):
        if kind in REFUSED:
            raise ValueError(f"{kind} models cannot be compressed: {REFUSED[kind]}")
    release = transformers.__version__
    if (config.model_type, release) in BROKEN:
        reason, others = BROKEN[config.model_type, release]
        raise ValueError(
            f"{config.model_type} models cannot be compressed with transformers {release}: {reason}; "
            f"install {others} instead"
        )


def check_model(model: nn.Module, layers: list[MoELayer]) -> None:
    """Refuse a model whose architecture or state cannot be compressed correctly.

    Raises:
        ValueError: naming what was found and what to do instead.
    """
    config = model.config
    check_config(config)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}) has no Mixture-of-Experts layer to compress; "
            "give a sparse MoE checkpoint such as Mixtral, Qwen3-MoE, OLMoE or DeepSeek-V3"
        )
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised; compress the unquantised checkpoint first, then quantise the result")
    if getattr(model, "use_kernels", False):
        raise ValueError("hub kernels replace the model's experts modules; load the model with use_kernels=False")
    counts = {layer.num_experts for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"the layers have different numbers of experts {sorted(counts)}; they must all have the same")
    for layer in layers:
        _check_layer(layer, config.get_text_config().hidden_size)


def check_materialised(layers: list[MoELayer]) -> None:
    """Refuse MoE layers whose weights are offloaded or not loaded.

    Raises:
        ValueError: a parameter is on the meta device.
    """
    for layer in layers:
        if any(p.device.type == "meta" for p in layer.block.parameters()):
            raise ValueError(
                f"the weights of {layer.name} are not in memory (offloaded or not loaded); load the model without "
                "disk offload, for example with device_map=None"
            )


def check_protection(layers: Mapping[int, MoELayer], protected: Mapping[int, list[int]] | str, count: int) -> None:
    """Refuse protected experts that do not exist, or more of them than experts are retained.

    Args:
        layers: MoE layers by the index of their decoder layer.
        protected: lists of experts by decoder layer; "super" always fits.
        count: how many experts every layer keeps.

    Raises:
        ValueError: a layer without experts, an expert out of range, or more protected ones than places.
    """
    for index, experts in protected.items() if protected != "super" else ():
        if index not in layers:
            raise ValueError(f"protect_experts names layer {index}; MoE layers are {sorted(layers)}")
        layer = layers[index]
        scores = torch.zeros(layer.num_experts, dtype=torch.float64)
        select_experts(scores, count, layer.num_groups, experts)


def check_router_logits(method: str, layers: list[MoELayer]) -> None:
    """Refuse a method that compares router logits if these cannot be computed from the experts' inputs.

    Raises:
        ValueError: a router without a single matrix that reads what the experts read.
    """
    for layer in layers:
        first = layer.experts._parameters.get("gate_up_proj", layer.experts._parameters.get("up_proj"))
        inputs, rows = first.shape[1 if layer.layout.transposed else 2], layer.router_weight
        if rows is None or rows.tensor.shape[1] != inputs:
            found = "has no single matrix" if rows is None else f"reads {rows.tensor.shape[1]} inputs"
            raise ValueError(
                f"method={method!r} compares the experts' router logits, but the router of {layer.name} {found}, and "
                f"its experts read {inputs}; choose hc_smoe, mergemoe or sub_moe"
            )


def resolve_count(layer: MoELayer, sparsity: float, num_experts: int | None, multiple_of: int) -> int:
    """Compute the number of experts that every layer keeps, and check it against the router's constraints.

    Args:
        layer: any MoE layer of the model.
        sparsity: fraction dropped, where `num_experts` is None.
        num_experts: the count asked for, or None.
        multiple_of: round up to a multiple of this.

    Returns:
        N.

    Raises:
        ValueError: a count that the model's router cannot work with.
    """
    experts, groups, least = layer.num_experts, layer.num_groups, _least_count(layer)
    asked = f"sparsity={sparsity}" if num_experts is None else f"num_experts={num_experts}"
    dropped = sparsity if num_experts is None else 1 - num_experts / experts
    if num_experts is not None and num_experts > experts:
        raise ValueError(f"{asked}, but each layer has {experts} experts; {advise_count(layer)}")
    if num_experts is not None and num_experts % groups:
        raise ValueError(f"{asked} cannot be shared by the router's {groups} groups; {advise_count(layer)}")
    count = retained_count(experts, dropped, groups, multiple_of)
    if count < least and experts - groups < least:
        raise ValueError(
            f"none of the {experts} experts of a layer can be dropped, whatever is asked for: the router needs at "
            f"least {least} (top_k={layer.top_k}, groups={groups}, groups chosen={layer.topk_group}); dropping "
            "experts cannot make this model smaller"
        )
    if count < least:
        raise ValueError(
            f"{asked} would leave {count} of {experts} experts, but this model needs at least {least} "
            f"(top_k={layer.top_k}, groups={groups}, groups chosen={layer.topk_group}); {advise_count(layer)}"
        )
    return count


def advise_count(layer: MoELayer) -> str:
    """Return advice for an error message: the values of num_experts that compress the model and fit its router."""
    least, most = _least_count(layer), layer.num_experts - layer.num_groups
    if most < least:
        return "none of its experts can be dropped"
    span = f"{least} to {most}" if least < most else f"{least}"
    return f"choose num_experts={span}" + (f", a multiple of {layer.num_groups}" if layer.num_groups > 1 else "")


def _least_count(layer: MoELayer) -> int:
    """Return the fewest experts that the router can work with, a multiple of its groups."""
    groups, least = layer.num_groups, max(2, layer.top_k)
    if groups > 1:  # each group is scored by its two best experts, and the chosen groups must hold top_k experts
        least = max(least, 2 * groups, -(-layer.top_k // layer.topk_group) * groups)
    return -(-least // groups) * groups


def _check_layer(layer: MoELayer, hidden_size: int) -> None:
    _check_sizes(layer)
    _check_router(layer)
    if layer.num_experts == hidden_size:
        raise ValueError(
            f"{layer.name} has as many experts as hidden units ({hidden_size}), so the router's expert dimension "
            "cannot be told from the others"
        )
    if getattr(layer.experts, "has_post_expert_norm", False):
        raise ValueError(f"{layer.name} normalises each expert's output; experts are then not sums of neurons")
    if getattr(layer.experts, "_is_expert_parallel", False):
        raise ValueError(f"{layer.name} is expert-parallel; load the model without expert parallelism")


def _check_sizes(layer: MoELayer) -> None:
    sizes = {
        "experts a token": (layer.top_k, layer.num_experts),
        "groups": (layer.num_groups, layer.num_experts),
        "groups a token": (layer.topk_group, layer.num_groups),
        "neurons an expert": (layer.width, layer.width),
    }
    for name, (found, most) in sizes.items():
        if not isinstance(found, int) or not 1 <= found <= most:
            allowed = f"from 1 to {most}" if most > 1 else "at least 1"
            raise ValueError(
                f"{layer.name} has {found!r} {name} by its config, and it must be {allowed}; mend the config"
            )
    if layer.num_experts % layer.num_groups:
        raise ValueError(
            f"{layer.name} has {layer.num_experts} experts in {layer.num_groups} groups by its config, which cannot "
            "be of equal size; mend the config"
        )


def _check_router(layer: MoELayer) -> None:
    if not any(r.tensor.dim() == 2 and r.tensor.numel() > layer.num_experts for r in layer.routing):
        raise ValueError(
            f"no router weight with a row for each of the {layer.num_experts} experts was found beside "
            f"{layer.name}.experts; this architecture is not supported"
        )
    if any(name.endswith("tid2eid") for name, _ in layer.block.named_buffers()):
        raise ValueError(
            f"{layer.name} is a hash layer: it stores expert numbers for every token of the vocabulary, and those of "
            "dropped experts would lead nowhere; models with hash layers cannot be compressed"
        )
    if routing_hook(layer.experts) is None:
        raise ValueError(
            f"{layer.name}.experts ({type(layer.experts).__name__}) is not called with indices and weights, so "
            "nothing shows which experts a token uses; this architecture is not supported"
        )
