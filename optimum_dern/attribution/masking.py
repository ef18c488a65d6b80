"""Models without some experts or neurons: while a context is open, or as a checkpoint of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.format.changes import unchanged
from ..checkpoint.format.sidecars import copy_companions
from ..checkpoint.output.new_folder import check_new, new_folder
from ..checkpoint.source.resolve import resolve_checkpoint
from ..compressor import DernCompressor
from ..errors import naming
from ..models.loading import load_model
from ..models.moe.original import original_kept
from ..models.moe.structure import MoELayer, find_moe_layers, layers_by_position
from ..models.moe.view import LayerWeights, read_layer, retained_routing, write_layer_
from .result import Attribution


__all__ = ["mask_checkpoint", "masked_experts", "masked_neurons_"]


@contextmanager
def masked_experts(model: nn.Module, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Run a model in memory without some experts while the context is open: no token is routed to them.

    The layers are those of a pruned model, so the others' routing is what slicing the router makes it.

    Args:
        model: a causal language model with MoE layers.
        experts: those to leave out, by the index of their decoder layer.

    Raises:
        ValueError: an expert or layer that does not exist, or more experts than the router can do without.
    """
    places = layers_by_position(model, find_moe_layers(model))
    kept = {position: _others(places, position, masked) for position, masked in experts.items()}
    with torch.no_grad(), ExitStack() as stack:
        for position, retained in kept.items():
            layer = places[position]
            stack.enter_context(original_kept(layer))
            weights = read_layer(layer)
            routing = retained_routing(layer, weights, retained)
            write_layer_(layer, LayerWeights(weights.segments.select(retained), routing))
        with torch.enable_grad():
            yield


def _others(places: Mapping[int, MoELayer], position: int, masked: Sequence[int]) -> torch.Tensor:
    """Return the experts of a layer that are not masked, ascending."""
    if position not in places:
        raise ValueError(f"layer {position} has no experts; MoE layers are {sorted(places)}")
    layer = places[position]
    if wrong := [expert for expert in masked if not 0 <= expert < layer.num_experts]:
        raise ValueError(f"layer {position} has no experts {wrong}; give numbers from 0 to {layer.num_experts - 1}")
    kept = [expert for expert in range(layer.num_experts) if expert not in set(masked)]
    size = layer.num_experts // layer.num_groups
    groups = [sum(expert // size == group for expert in kept) for group in range(layer.num_groups)]
    if len(kept) < layer.top_k or len(set(groups)) > 1:
        raise ValueError(
            f"layer {position} would keep {len(kept)} experts, in its router's groups {groups}; leave at least "
            f"{layer.top_k}, and as many in each group"
        )
    return torch.tensor(kept)


def masked_neurons_(model: nn.Module, neurons: Mapping[int, Sequence[tuple[int, int]]]) -> None:
    """Zero some neurons of a model in memory, in place.

    Args:
        model: a causal language model with MoE layers.
        neurons: as (expert, neuron), by the index of the decoder layer.
    """
    places = layers_by_position(model, find_moe_layers(model))
    with torch.no_grad():
        for position, pairs in neurons.items():
            down = read_layer(places[position]).segments.down  # a view of the parameter
            for expert, neuron in pairs:
                down[expert, neuron] = 0


def mask_checkpoint(
    model: str | Path,
    output: str | Path,
    attribution: Attribution,
    domain: str,
    *,
    experts: int = 0,
    neurons: int = 0,
    tokenizer: Any = None,
    **source: Any,
) -> Path:
    """Write a plain checkpoint without the experts, or the neurons, that are most a domain's own.

    Args:
        model: folder or Hub id.
        output: folder to write, which must not exist where neurons go.
        attribution: of the model.
        domain: one of its domains.
        experts: how many of every layer go, with their router rows: the checkpoint is smaller.
        neurons: how many of every layer are zeroed instead: the checkpoint has its size.
        tokenizer: saved with it; by default the model's own.
        **source: `revision`, `token` and `trust_remote_code`.

    Raises:
        FileExistsError: the output exists.
        ValueError: both or neither are given, or more than the model can do without.
    """
    if (experts > 0) == (neurons > 0):
        raise ValueError(f"experts={experts} and neurons={neurons}: give how many experts go, or how many neurons")
    output = Path(output)
    if experts:
        count = attribution.measures["share"].shape[2]
        masked = attribution.most_skewed(domain, experts)
        kept = {p: [e for e in range(count) if e not in own] for p, own in masked.items()}
        options = {"method": "prune", "preset": "paper", "selection": "random", "num_experts": count - experts}
        DernCompressor(**options, protect_experts=kept).compress_checkpoint(model, output, tokenizer, **source)
        return output
    check_new(output)
    folder, _ = resolve_checkpoint(model, **{name: source[name] for name in ("revision", "token") if name in source})
    with new_folder(output) as part, unchanged(folder):  # loaded weights may be mapped from the files
        loaded = load_model(model, "cpu", **source)
        masked_neurons_(loaded, attribution.most_skewed_neurons(domain, neurons))
        with naming(output):
            loaded.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        copy_companions(folder, part, keep=True)
    return output
