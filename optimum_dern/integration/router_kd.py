"""Router distillation (arXiv 2603.02217): train only a compressed model's routers, on the original's predictions.

    L = tau^2 / |T| sum over the predicted tokens t of KL(softmax(z_t / tau) || softmax(z'_t / tau))

with the original's logits z_t and the compressed model's z'_t.  After dropping experts a router still has the rows
that were trained with all of them; they are less than a thousandth of the parameters, so a few hundred steps suffice.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..evaluation.agreement.logits_cache import LogitsCache, predicted_positions
from ..evaluation.loss.metrics import IGNORED_LABEL
from ..models.moe.structure import find_moe_layers
from .teacher import CachedTeacher, ModelTeacher


__all__ = ["RouterDistillationTrainer", "only_routers_trainable", "router_parameters"]


class RouterDistillationTrainer(Trainer):
    """A `Trainer` whose `train` updates only the routers, towards the original model's next-token distribution.

    `eval_loss` is the divergence, too.  Rows need no labels; where they have some, tokens with ignored labels are left
    out.  Routers in a 16-bit dtype are trained in float32 and rounded after every step.

    Args:
        model: the compressed model.
        args: of transformers' `Trainer`.
        teacher: the original model, on any device and quantised or not; or a `LogitsCache` of its predictions for the
            sequences to train and evaluate on, so that the two never need to be in memory together.
        temperature: tau; must be 1 with a cache.
        **options: of transformers' `Trainer`.

    Raises:
        ValueError: the model has no MoE layers, or the temperature is invalid; in training, the teacher has another
            vocabulary, or the cache lacks a sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teacher: nn.Module | LogitsCache,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        router_parameters(model)  # refused before any work
        self.teacher = _teacher(teacher, temperature)
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = False  # each micro-batch's loss is a mean of its own

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in `Trainer`, with only the routers trainable; afterwards `requires_grad` is as before."""
        with only_routers_trainable(self.model):
            return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as in `Trainer`, over float32 copies of parameters in a 16-bit dtype."""
        optimizer = super().create_optimizer(*args, **kwargs)
        _keep_float32_copies_(optimizer)
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the mean divergence from the teacher on a batch."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        outputs, predicted = model(**batch, use_cache=False), _predicted(inputs)
        loss = self.teacher.divergence(outputs.logits, batch, predicted) / predicted.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss


def _teacher(source: nn.Module | LogitsCache, temperature: float) -> CachedTeacher | ModelTeacher:
    """Make a teacher from a model or a cache of its predictions; refuses invalid temperatures."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}, but it must be finite and above 0; the paper's is 1")
    if not isinstance(source, LogitsCache):
        return ModelTeacher(source, temperature)
    if temperature != 1:
        raise ValueError(f"temperature={temperature!r}, but predictions are cached at temperature 1; leave it out")
    return CachedTeacher(source)


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


def _predicted(inputs: Mapping[str, Tensor]) -> Tensor:
    """Mark positions (batch, sequence - 1) whose next token counts, by the attention mask and by labels if given."""
    mask = inputs.get("attention_mask")
    predicted = predicted_positions(torch.ones_like(inputs["input_ids"]) if mask is None else mask)
    labels = inputs.get("labels")
    return predicted if labels is None else predicted & (labels[:, 1:] != IGNORED_LABEL)


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
