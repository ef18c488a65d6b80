"""Coefficients of a merge: a factor between 0 and 1 for every tensor, or part of one, of every fine-tuned model."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


__all__ = ["Coefficients", "chunks_by_importance"]


class Coefficients:
    """Factors sigmoid(c) of the differences of K models, for the parts of each parameter.

    A parameter is divided, flattened, into as many parts as `torch.chunk` makes of it.

    Args:
        differences: by parameter, (K, ...) what each fine-tuned model adds to the base.
        initial: factor at the start, above 0 and below 1.
        chunks: parts by parameter; one where it names none.
    """

    def __init__(
        self, differences: Mapping[str, Tensor], initial: float = 0.1, chunks: Mapping[str, int] | None = None
    ) -> None:
        start, chunks = math.log(initial / (1 - initial)), chunks or {}
        self.differences = differences
        self.raw = {
            name: torch.full((len(tau), chunks.get(name, 1)), start, requires_grad=True)
            for name, tau in differences.items()
        }

    def parameters(self) -> list[Tensor]:
        """Return the tensors to be learned, before the sigmoid."""
        return list(self.raw.values())

    def factors(self) -> Tensor:
        """Return all factors in one row."""
        return torch.cat([raw.sigmoid().flatten() for raw in self.raw.values()])

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return base + sum_k sigmoid(c_k) tau_k by parameter; gradients flow to the coefficients."""
        return {name: tensor + self._added(name, tensor) for name, tensor in base.items()}

    def _added(self, name: str, base: Tensor) -> Tensor:
        tau, factor = self.differences[name], self.raw[name].sigmoid()  # (K, ...), (K, chunks)
        if factor.shape[1] == 1:
            return torch.einsum("k,k...->...", factor[:, 0].to(tau), tau)
        sums = [
            torch.einsum("k,kn->n", factor[:, i].to(tau), part)
            for i, part in enumerate(tau.flatten(1).chunk(factor.shape[1], dim=1))
        ]
        return torch.cat(sums).view_as(base)


def chunks_by_importance(coefficients: Coefficients, layers: Sequence[Sequence[str]], chunks: int) -> dict[str, int]:
    """Give the parameters of important layers several coefficients.

    A layer's importance is the sum over its parameters of factor times mean |tau| times number of entries, with the
    factors learned for whole tensors (Expert Merging++; its formula is not published).

    Args:
        coefficients: learned for whole tensors.
        layers: names of the parameters of each decoder layer.
        chunks: parts of a parameter in a layer of more than average importance.
    """
    importance = []
    for names in layers:
        terms = [
            (coefficients.raw[name].detach().sigmoid()[:, 0] * coefficients.differences[name].flatten(1).abs().sum(1))
            for name in names
        ]
        importance.append(torch.stack(terms).sum().item())
    average = sum(importance) / len(importance)
    found = {}
    for names, value in zip(layers, importance, strict=True):
        if value > average:
            for name in names:  # `torch.chunk` may make fewer parts than asked for
                found[name] = len(torch.empty(coefficients.differences[name][0].numel(), device="meta").chunk(chunks))
    return found
