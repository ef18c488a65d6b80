"""Coefficients of a merge: a factor between 0 and 1 for every tensor, or part of one, of every fine-tuned model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


__all__ = ["Coefficients", "chunks_by_importance", "importance"]


class Coefficients:
    """Factors sigmoid(c) of the differences of K models, for the parts of each parameter.

    A parameter is divided, flattened, into as many parts as `torch.chunk` makes of it.

    Args:
        differences: by parameter, (K, ...) what each fine-tuned model adds to the base.
        initial: factor at the start, above 0 and below 1.
        chunks: parts by parameter; one where it names none.
        learned: (K, 1) by parameter, `raw` of whole tensors to begin with instead of the initial factor.
    """

    def __init__(
        self,
        differences: Mapping[str, Tensor],
        initial: float = 0.1,
        chunks: Mapping[str, int] | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        start, chunks = math.log(initial / (1 - initial)), chunks or {}
        self.differences = differences
        self.raw = {
            name: torch.full((len(tau), chunks.get(name, 1)), start, requires_grad=True)
            for name, tau in differences.items()
        }
        if learned is not None:
            with torch.no_grad():
                for name, raw in self.raw.items():
                    raw.copy_(learned[name].expand_as(raw))

    def parameters(self) -> list[Tensor]:
        """Return the tensors to be learned, before the sigmoid."""
        return list(self.raw.values())

    def factors(self) -> Tensor:
        """Return all factors in one row."""
        return torch.cat([raw.sigmoid().flatten() for raw in self.raw.values()])

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return base + sum_k sigmoid(c_k) tau_k by parameter; gradients flow to the coefficients."""
        return {
            name: _Sum.apply(tensor, self.differences[name], self.raw[name].sigmoid()) for name, tensor in base.items()
        }


class _Sum(torch.autograd.Function):
    """base (...) + sum_k of the parts of tau_k times their factors (K, parts), with no other tensor of that size."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, differences: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(differences)
        ctx.parts = factors.shape[1]
        merged = base.clone(memory_format=torch.contiguous_format)
        for own, tau in zip(factors.tolist(), differences, strict=True):
            for factor, into, part in zip(own, *(t.flatten().chunk(ctx.parts) for t in (merged, tau)), strict=True):
                into.add_(part, alpha=factor)
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (differences,) = ctx.saved_tensors
        pieces = gradient.flatten().chunk(ctx.parts)
        dots = [
            torch.stack([torch.dot(g, part) for g, part in zip(pieces, tau.flatten().chunk(ctx.parts), strict=True)])
            for tau in differences
        ]
        return None, None, torch.stack(dots).to("cpu", torch.float32)  # (K, parts)


def importance(coefficients: Coefficients, names: Sequence[str]) -> float:
    """Compute the importance of a layer: the sum of sigmoid(c) |tau| over its entries and the models.

    Args:
        coefficients: learned for whole tensors.
        names: of the layer's parameters.
    """
    terms = []
    for name in names:
        sizes = coefficients.differences[name].flatten(1).abs().sum(1).float()  # (K,)
        terms.append(coefficients.raw[name].detach().sigmoid()[:, 0] @ sizes.to("cpu"))
    return torch.stack(terms).sum().item()


def chunks_by_importance(
    importances: Sequence[float], layers: Sequence[Mapping[str, int]], chunks: int
) -> dict[str, int]:
    """Give the parameters of layers of more than average importance several coefficients.

    Args:
        importances: of the layers (Expert Merging++; its formula is not published).
        layers: number of entries by parameter, of each layer.
        chunks: parts of a parameter.
    """
    average = sum(importances) / len(importances)
    return {  # `torch.chunk` may make fewer parts than asked for
        name: len(torch.empty(entries, device="meta").chunk(chunks))
        for own, value in zip(layers, importances, strict=True)
        if value > average
        for name, entries in own.items()
    }
