"""The scale of a layer's output with another number of active experts: the trained number's, token by token."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..engine.measure.recording import record_routing
from ..models.forward import run_until_stopped
from ..models.moe.structure import MoELayer
from .thread_counts import as_trained, asked, router_modules


__all__ = ["corrected_scale", "sums_stay"]

PROBED = 4  # tokens on which a router is tried


def sums_stay(layer: MoELayer, k: int) -> bool:
    """Return whether the weights of k experts have the sum of the trained number's, on a few random tokens."""
    trained = as_trained(layer, lambda: _sums(layer, None))
    return torch.allclose(_sums(layer, k), trained, rtol=1e-3)


@torch.no_grad()
def _sums(layer: MoELayer, k: int | None) -> Tensor:
    """Return the sums of the weights of a few random tokens; refuses a router that does not choose k experts."""
    reference, size = next(layer.block.parameters()), layer.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBED, size, generator=generator).to(reference.device, reference.dtype)
    with record_routing(layer.block, layer.experts, stop=True) as record:
        run_until_stopped(layer.block, hidden)
    routing = record.routings[0]
    if k is not None and routing.index.shape[1] != k:
        raise ValueError(
            f"the router of {layer.name} chooses {routing.index.shape[1]} experts whatever it is told; its number "
            "cannot be changed"
        )
    return routing.weight.float().sum(1)


@contextmanager
def corrected_scale(layer: MoELayer) -> Iterator[None]:
    """Scale every token's weights to the sum that the trained number of experts gives."""
    own, trained = {id(module) for module in router_modules(layer)}, threading.local()

    def is_asked() -> bool:
        return bool(own & asked().keys())

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_asked() and not getattr(trained, "running", False):
            trained.running = True
            try:
                trained.sums = as_trained(layer, lambda: _weight_sums(layer, args, kwargs))
            finally:
                trained.running = False

    def before_experts(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not is_asked() or getattr(trained, "running", False):
            return None
        values = [*args, *kwargs.values()]
        weight = values[2]
        factor = trained.sums.to(weight.device) / weight.float().sum(1, keepdim=True)
        values[2] = (weight * factor).to(weight.dtype)
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    handles = [
        layer.block.register_forward_pre_hook(before_block, with_kwargs=True, prepend=True),
        layer.experts.register_forward_pre_hook(before_experts, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_sums(layer: MoELayer, args: tuple, kwargs: dict) -> Tensor:
    """Return the sum (T, 1) of the weights that the router gives the experts it chooses now."""
    with record_routing(layer.block, layer.experts, stop=True) as record:
        run_until_stopped(layer.block, *args, **kwargs)
    return record.routings[0].weight.float().sum(1, keepdim=True)
