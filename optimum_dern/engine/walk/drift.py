"""Drift: the error that earlier compressed layers leave in a layer's input, and the refit target that corrects it.

Behind compressed layers a layer gets the input x' instead of x.  Refitting it to y(x'), the output of the original
layer, would keep the error H - H': H is the output of the original decoder layer in the original model, H' its output
behind the compressed layers.  The target of the refits is therefore

    y(x') + c (H - H'),        each token weighted by 1 / |H|,

since the norm that follows makes an error count relative to the size of the residual stream.  This requires that the
experts' output is added to the residual stream unchanged, which is tested: where it is scaled or normalised before,
the target stays y(x').
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.layer.reduction import any_process
from ...data.labels import real_tokens
from ...machine.processes import ALONE, Processes
from ...models.forward import replaced_forward
from ...models.moe.structure import MoELayer
from ..measure.expert_run import ExpertRun
from ..measure.measured import Goal
from .stream import HiddenStream


__all__ = ["Drift", "measure_drift"]

TOLERANCE = 0.05  # relative deviation of a layer's output from the noise added to its experts'; bfloat16 has 0.01


class Drift(NamedTuple):
    """The error that earlier compressed layers leave in a layer's T real tokens, and the tokens' weights."""

    error: Tensor  # (T, d) H - H', in the model's dtype
    token_weight: Tensor  # (T, 1) 1 / |H|, normalised to a mean of 1

    def goal(self, share: float) -> Goal:
        """Make the target of the refits: a layer's output plus a share of the drift, weighted by token."""
        return Goal(self.error, share, self.token_weight)


@torch.no_grad()
def measure_drift(
    position: int,
    decoder_layer: nn.Module,
    layer: MoELayer,
    stream: HiddenStream,
    original: HiddenStream,
    run: ExpertRun,
    masks: Sequence[Tensor],
    processes: Processes = ALONE,
) -> Drift | None:
    """Measure the drift at a layer: the original model's output of it minus that behind the compressed layers.

    Args:
        position: index of the decoder layer.
        decoder_layer: with its original experts.
        layer: its MoE layer.
        stream: hidden states that enter it behind compressed layers.
        original: hidden states of the original model that leave this layer.
        run: of the layer's experts, which measures them meanwhile.
        masks: per micro-batch, (batch, sequence) bool, True for a real token.
        processes: that share the micro-batches.

    Returns:
        The drift, or None where the experts' output is not added to the residual stream unchanged.
    """
    outputs = stream.outputs(position, decoder_layer)
    first = next(outputs)
    noise, arrived = _noise_through(position, decoder_layer, layer, stream, first, run.first_output)
    real = real_tokens(masks[0], first.device)
    deviation = (arrived - noise).flatten(0, 1)[real].float().norm() / noise.flatten(0, 1)[real].float().norm()
    if any_process((deviation > TOLERANCE).to(processes.device), processes.reduce):
        deque(outputs, maxlen=0)  # the experts are measured on all micro-batches, nevertheless
        return None
    largest = torch.finfo(first.dtype).max
    error, start, sizes = first.new_empty(sum(int(mask.sum()) for mask in masks), first.shape[-1]), 0, []
    for output, wanted, mask in zip(chain([first], outputs), original, masks, strict=True):
        real = real_tokens(mask, output.device)
        wanted = wanted.to(output.device).flatten(0, 1)[real].float()  # (n, d)
        difference = wanted - output.flatten(0, 1)[real].float()
        error[start : start + len(wanted)] = difference.clamp(-largest, largest)  # float16 may not hold it
        start += len(wanted)
        sizes.append(wanted.square().mean(1, keepdim=True).sqrt())
    weight = 1 / torch.cat(sizes).clamp(min=1e-6)  # (T, 1)
    mean = processes.reduce(weight.sum()) / processes.reduce(weight.new_full((), len(weight)))
    return Drift(error, weight / mean)


def _noise_through(
    position: int, decoder_layer: nn.Module, layer: MoELayer, stream: HiddenStream, before: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor]:
    """Add noise to the experts' output for the first micro-batch; return it and the change of the layer's output."""
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(position)).to(before)  # (B, S, d)
    noise *= before.float().square().mean().sqrt().to(before)

    added = noise.flatten(0, -2) if noise.numel() == experts.numel() else torch.zeros_like(experts)  # (B S, d)

    def forward(hidden: Tensor, *args, **kwargs) -> Tensor:
        return (experts + added).to(hidden).view(*hidden.shape[:-1], -1)

    with replaced_forward(layer.experts, forward):
        return noise, next(stream.outputs(position, decoder_layer)) - before
