"""Hooks that record a layer's routing; the only code that is specific to single model families.

Nearly every experts module is called with hidden states, expert indices and gate weights.  Those that are not have a
hook of their own here, by the name of their experts' class.
"""

import inspect
from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.layer.mixture import Routing


__all__ = ["experts_routing", "routing_hook", "takes_routing"]

RoutingHook = Callable[[nn.Module, nn.Module, Callable[[Routing], None]], RemovableHandle]


def routing_hook(experts: nn.Module) -> RoutingHook | None:
    """Find the hook that records the routing of a layer.

    Args:
        experts: the layer's experts module.

    Returns:
        `hook(block, experts, receive)`, which calls `receive` with the `Routing` of every forward pass, before the
        experts have run, until its handle is removed; None if it is unknown how these experts receive their routing.
    """
    if type(experts).__name__ in HOOKS:
        return HOOKS[type(experts).__name__]
    return hook_experts if _is_called_with_three(experts) else None


def hook_experts(block: nn.Module, experts: nn.Module, receive: Callable[[Routing], None]) -> RemovableHandle:
    """Record the routing from the experts' arguments: hidden states (..., d), indices and gate weights (T, k)."""

    def before_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        receive(experts_routing(args, kwargs))

    return experts.register_forward_pre_hook(before_experts, with_kwargs=True)


def takes_routing(experts: nn.Module) -> bool:
    """Return whether the experts are called with their routing, and return the routed output of every token."""
    return type(experts).__name__ not in HOOKS


def experts_routing(args: tuple, kwargs: dict) -> Routing:
    """Read the routing from the arguments of experts that take it."""
    hidden, index, weight = [*args, *kwargs.values()][:3]
    return Routing(hidden.detach().flatten(0, -2), index.detach(), weight.detach())


def hook_llama4(block: nn.Module, experts: nn.Module, receive: Callable[[Routing], None]) -> RemovableHandle:
    """Record the routing of Llama 4 from its router; gate weights (sigmoid scores) scale the experts' inputs."""

    def after_router(router: nn.Module, args: tuple, output: tuple) -> None:
        scores, _ = output  # (T, E)
        weight, index = scores.detach().topk(router.top_k, dim=1)  # (T, k)
        receive(Routing(args[0].detach(), index, weight, weighs_input=True))

    return block.router.register_forward_hook(after_router)


HOOKS: dict[str, RoutingHook] = {"Llama4TextExperts": hook_llama4}


def _is_called_with_three(experts: nn.Module) -> bool:
    """Return whether the module can be called as (hidden, indices, weights)."""
    try:
        inspect.signature(experts.forward).bind(None, None, None)
    except TypeError:
        return False
    return True
