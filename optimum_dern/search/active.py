"""Run a model with another number of active experts, for the thread that asks for it alone.

A router reads its number from an attribute of its own (`top_k`), or from its config.  While a context is open, the
router's class is one in which that attribute depends on the thread, so that two threads may generate with different
numbers at once.

Where a router does not normalise the weights of the chosen experts, their sum grows with the number, and with it the
output.  By default every token's weights are scaled to the sum that the trained number k gives, for k' experts

    w'_j = w_j  sum(w of the trained k) / sum(w of the k'),

which changes nothing where weights are normalised.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from ..models.moe.overrides import takes_routing
from ..models.moe.structure import MoELayer, find_decoder_layers, find_moe_layers, layers_by_position
from .scale import corrected_scale, sums_stay
from .thread_counts import following_thread, router_modules, set_counts


__all__ = ["active_experts"]


@contextmanager
def active_experts(
    model: nn.Module, count: int | Sequence[int] | Mapping[int, int], correct_scale: bool = True
) -> Iterator[None]:
    """Run a model with another number of active experts while the context is open, in this thread.

    Args:
        model: a causal language model with MoE layers.
        count: experts per token: one number, a list with one for each MoE layer, or a map from decoder layers to
            numbers, in which other layers keep theirs.
        correct_scale: scale the weights of a token's experts to the sum that the trained number gives.

    Raises:
        ValueError: a number that a layer's router cannot take, or a list of another length.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Mixture-of-Experts layer; give a sparse MoE model")
    changed = [(layer, k) for layer, k in _by_layer(model, layers, count) if k != layer.top_k]
    for layer, k in changed:
        _check(layer, k)
    numbers = {id(module): k for layer, k in changed for module in router_modules(layer)}
    with ExitStack() as stack:
        for layer, _ in changed:
            for module in router_modules(layer):
                stack.enter_context(following_thread(module))
        stack.enter_context(set_counts(numbers))
        decoder = find_decoder_layers(model, layers[0])[1]
        for layer, k in changed:
            alone = all(layer.block is not decoder_layer for decoder_layer in decoder)
            normalised = alone and sums_stay(layer, k)  # a decoder layer needs more than hidden states to be tried
            if correct_scale and not normalised:
                _check_corrects(layer)
                stack.enter_context(corrected_scale(layer))
        yield


def _by_layer(
    model: nn.Module, layers: Sequence[MoELayer], count: int | Sequence[int] | Mapping[int, int]
) -> list[tuple[MoELayer, int]]:
    if isinstance(count, int):
        return [(layer, count) for layer in layers]
    if isinstance(count, Mapping):
        places = layers_by_position(model, list(layers))
        if wrong := sorted(count.keys() - places.keys()):
            raise ValueError(f"layers {wrong} have no experts; MoE layers are {sorted(places)}")
        return [(places[position], k) for position, k in count.items()]
    if len(count) != len(layers):
        raise ValueError(f"{len(count)} numbers of active experts for {len(layers)} MoE layers; give one for each")
    return list(zip(layers, count, strict=True))


def _check(layer: MoELayer, k: int) -> None:
    """Refuse a number of active experts that a layer's router cannot take."""
    most = layer.num_experts // layer.num_groups * layer.topk_group
    if not 1 <= k <= most:
        raise ValueError(f"{k} active experts in {layer.name}; its router can choose 1 to {most}")
    if not router_modules(layer):
        raise ValueError(
            f"nothing in the router of {layer.name} says how many experts it chooses; it cannot be changed"
        )


def _check_corrects(layer: MoELayer) -> None:
    if not takes_routing(layer.experts):
        raise ValueError(
            f"the weights of {layer.name} scale the experts' inputs, so the scale of its output cannot be corrected; "
            "give correct_scale=False"
        )
