"""What a MoE block adds to the output of its routed experts: its shared experts, where it has some."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...data.labels import real_tokens
from ...models.forward import replaced_forward
from ...models.moe.overrides import takes_routing
from ...models.moe.structure import MoELayer
from .measured import MeasuredLayer


__all__ = ["output_beside", "runs_alone"]


def runs_alone(layer: MoELayer) -> bool:
    """Return whether a layer's block maps hidden states to hidden states, with experts that can be silenced."""
    attends = any("attn" in name or "attention" in name for name, _ in layer.block.named_children())
    return takes_routing(layer.experts) and not attends


@torch.no_grad()
def output_beside(measured: MeasuredLayer) -> Tensor | None:
    """Run a layer's block on the calibration tokens with experts that give nothing.

    Args:
        measured: the layer, with its original experts.

    Returns:
        (T, o) in the dtype of `measured.target`: the shared experts' output, zeros where there are none; None where
        the block is a whole decoder layer, or its experts cannot be silenced.
    """
    layer = measured.layer
    if not runs_alone(layer):
        return None
    outputs = [measured.target[:0]]
    with replaced_forward(layer.experts, _silent(measured.target.shape[1])):
        for (args, kwargs), mask in zip(measured.block_calls, measured.masks, strict=True):
            found = layer.block(*args, **kwargs)
            found = (found if isinstance(found, Tensor) else found[0]).flatten(0, -2)  # (B S, o)
            outputs.append(found[real_tokens(mask, found.device)].to(measured.target))
    return torch.cat(outputs)


def _silent(size: int) -> Callable[..., Tensor]:
    """Make a forward function of experts whose output, of a given size, is zero."""

    def forward(*args, **kwargs) -> Tensor:
        hidden = next(iter((*args, *kwargs.values())))
        return hidden.new_zeros(*hidden.shape[:-1], size)

    return forward
