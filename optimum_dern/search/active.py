"""Run a model with another number of active experts, for as long as a context is open."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.moe.overrides import takes_routing
from ..models.moe.structure import TOP_K_KEYS, MoELayer, find_moe_layers


__all__ = ["Counts", "active_experts", "trained_counts"]

Counts = int | Sequence[int] | Mapping[int, int]
FIXED = {"phimoe": "its router (SparseMixer) is written for two experts"}
HOOKING = threading.Lock()  # torch numbers hooks without one


@contextmanager
def active_experts(model: nn.Module, counts: Counts, *, correct_scale: bool = True) -> Iterator[None]:
    """Let every token use another number of experts than the model was trained with, until the context exits.

    It holds for the thread that enters it; other threads run the same model with their own numbers, or the trained
    one.  No module and no config of the model is changed, but for a hook on every router.

    Where a router does not normalise its weights, the sum of them, and with it the layer's output, grows with k.  By
    default they are rescaled for every token to the sum that those of the trained k_0 experts have:
    w'_j = w_j sum_i w_i^(k_0) / sum_i w_i^(k).  Llama 4 weighs the inputs of its experts, so there it holds for them.

    Args:
        model: of transformers, with MoE layers.
        counts: experts a token, k; for all MoE layers, or a list with one for each, or {MoE layer: k}, counted from 0.
        correct_scale: rescale the weights; with False they are what the router gives for k.

    Raises:
        ValueError: k is not possible with these routers, or a count names no layer.

    Source: Dynamic Experts Search, arXiv 2509.22572; the rescaling is this package's own.
    """
    layers = find_moe_layers(model)
    blocks = [
        (each, k) for layer, k in zip(layers, _by_layer(layers, counts), strict=True) for each in (layer, *layer.twins)
    ]
    with HOOKING:
        hooks = [(_router(each), _choice(each, k, correct_scale)) for each, k in blocks]
        handles = [router.register_forward_hook(hook, with_kwargs=True) for router, hook in hooks if hook is not None]
    try:
        yield
    finally:
        with HOOKING:
            for handle in handles:
                handle.remove()


def trained_counts(model: nn.Module) -> list[int]:
    """Return the number of experts a token that every MoE layer was trained with, in module order.

    Raises:
        ValueError: the model has no MoE layers, or some whose number cannot be changed.
    """
    layers = find_moe_layers(model)
    return _by_layer(layers, {})


@dataclass(frozen=True, eq=False)
class Choice:
    """Hook on a router that replaces what it returns by what it would return for another number of experts."""

    router: nn.Module  # a second module on the same tensors, with its own k
    owner: int  # thread that it is for
    position: int  # of the weights in what the router returns
    correct: bool
    nested: bool  # inside a context of the same thread

    def __call__(self, router: nn.Module, args: tuple, *rest: Any) -> Any:
        if threading.get_ident() != self.owner:  # that thread may see a hook half added, without keyword arguments
            return None
        kwargs, trained = rest
        chosen = type(router).forward(self.router, *args, **kwargs)
        if not self.correct:
            return chosen
        if self.nested:
            trained = type(router).forward(router, *args, **kwargs)
        weight = rescaled(chosen[self.position], trained[self.position])
        return (*chosen[: self.position], weight, *chosen[self.position + 1 :])


def rescaled(weight: Tensor, trained: Tensor) -> Tensor:
    """Rescale routing weights (T, k) so that each token's sum is that of the trained ones (T, k_0)."""
    total = weight.sum(-1, keepdim=True, dtype=torch.float32)  # (T, 1)
    factor = trained.sum(-1, keepdim=True, dtype=torch.float32) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return (weight * factor).to(weight.dtype)


def _choice(layer: MoELayer, k: int, correct: bool) -> Choice | None:
    """Make the hook that gives a layer k experts; None where nothing has to change."""
    router, owner = _router(layer), threading.get_ident()
    nested = any(isinstance(hook, Choice) and hook.owner == owner for hook in router._forward_hooks.values())
    if k == _trained(layer) and not nested:
        return None
    other = copy(router)  # its parameters and buffers are the same dicts
    if hasattr(router, "top_k"):
        other.top_k = k
    else:
        other.config = copy(router.config)
        setattr(other.config, _config_key(router), k)
    return Choice(other, owner, 1 if takes_routing(layer.experts) else 0, correct, nested)


def _router(layer: MoELayer) -> nn.Module:
    """Return the module that chooses the experts."""
    return next(part for name in ("gate", "router") if (part := getattr(layer.block, name, None)) is not None)


def _config_key(router: nn.Module) -> str | None:
    """Return the config key that a router without a number of its own reads in every forward pass (Gemma 4)."""
    config = getattr(router, "config", None)
    return next((key for key in TOP_K_KEYS if getattr(config, key, None) is not None), None)


def _trained(layer: MoELayer) -> int:
    """Return the number of experts a token that a layer was trained with."""
    router = _router(layer)
    return router.top_k if hasattr(router, "top_k") else getattr(router.config, _config_key(router))


def _by_layer(layers: Sequence[MoELayer], counts: Counts) -> list[int]:
    """Check the numbers of experts and give every layer its own."""
    if not layers:
        raise ValueError("the model has no MoE layers, so there are no active experts to choose")
    for layer in layers:
        _check(layer)
    if isinstance(counts, Mapping):
        if unknown := sorted(set(counts) - set(range(len(layers)))):
            raise ValueError(f"counts name the MoE layers {unknown}, but there are {len(layers)}, counted from 0")
        wanted = [counts.get(position, _trained(layer)) for position, layer in enumerate(layers)]
    else:
        wanted = [counts] * len(layers) if isinstance(counts, int) else list(counts)
    if len(wanted) != len(layers):
        raise ValueError(f"counts are for {len(wanted)} layers, but the model has {len(layers)} MoE layers")
    for layer, k in zip(layers, wanted, strict=True):
        most = layer.num_experts * layer.topk_group // layer.num_groups
        if not isinstance(k, int) or not 1 <= k <= most:
            groups = f" in the {layer.topk_group} of {layer.num_groups} groups that its router allows"
            raise ValueError(
                f"{layer.name} cannot use {k!r} experts a token: give a number from 1 to {most}, as many as it has"
                + groups * (layer.num_groups > 1)
            )
    return wanted


def _check(layer: MoELayer) -> None:
    """Refuse a layer whose number of active experts cannot be changed."""
    kind, router = layer.config.model_type, _router(layer)
    reason = FIXED.get(kind)
    if hasattr(router, "tid2eid"):
        reason = "a table gives every token its experts, by its id"
    elif not hasattr(router, "top_k") and _config_key(router) is None:
        reason = f"its router ({type(router).__name__}) keeps no number of experts; newer releases of transformers may"
    elif any(parameter.is_meta for parameter in router.parameters()):
        reason = "its router has no weights in memory; load the model without offloading"
    if reason:
        raise ValueError(f"{layer.name} of {kind} cannot use another number of experts: {reason}")
