"""Router distillation (arXiv 2603.02217): train only a compressed model's routers, on the original's predictions.

After dropping experts a router still has the rows
that were trained with all of them; they are less than a thousandth of the parameters, so a few hundred steps suffice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.moe.structure import find_moe_layers
from .distillation import DistillationTrainer


__all__ = ["RouterDistillationTrainer", "only_routers_trainable", "router_parameters"]


class RouterDistillationTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose `train` updates only the routers.

    Routers in a 16-bit dtype are trained in float32 and rounded after every step.

    Args:
        model: the compressed model.
        *args, **options: of `DistillationTrainer`.

    Raises:
        ValueError: the model has no MoE layers, or as in `DistillationTrainer`.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        router_parameters(model)  # refused before any work
        super().__init__(model, *args, **options)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in `Trainer`, with only the routers trainable; afterwards `requires_grad` is as before."""
        with only_routers_trainable(self.model):
            return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as in `Trainer`, over float32 copies of parameters in a 16-bit dtype."""
        optimizer = super().create_optimizer(*args, **kwargs)
        _keep_float32_copies_(optimizer)
        return optimizer


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the routers' parameters that have one entry per expert.

    Raises:
        ValueError: the model has none.
    """
    tensors = [routing.tensor for layer in find_moe_layers(model) for routing in layer.routing if routing.is_parameter]
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no router to train; give a Mixture-of-Experts model")
    return list({id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def only_routers_trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Freeze everything but the routers while the context is open, and restore `requires_grad` afterwards."""
    routers = router_parameters(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in routers:
        parameter.requires_grad_(True)
    try:
        yield routers
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _keep_float32_copies_(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer update float32 copies of 16-bit parameters, in which small steps would be rounded away."""
    copies: list[tuple[nn.Parameter, nn.Parameter]] = []
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter.dtype != torch.float32:
                group["params"][i] = nn.Parameter(parameter.detach().float())
                copies.append((parameter, group["params"][i]))
    if not copies:  # all float32, or copied already by an earlier training with the same optimizer
        return

    def take_gradients(*_: Any) -> None:
        for parameter, copy in copies:
            copy.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def write_back(*_: Any) -> None:
        for parameter, copy in copies:
            parameter.copy_(copy)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(write_back)
