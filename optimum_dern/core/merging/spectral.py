"""Spectral embedding of experts: the eigenvectors by which a similarity graph falls into clusters."""

import torch
from torch import Tensor


__all__ = ["spectral_embedding"]


def spectral_embedding(similarity: Tensor, count: int, num_groups: int = 1) -> Tensor:
    """Embed experts by the leading eigenvectors of their normalised similarity, D^-1/2 S D^-1/2 with D the row sums.

    Clustering the rows by their cosines is normalised spectral clustering (Ng, Jordan, Weiss, 2001).

    Args:
        similarity: (E, E) symmetric, not negative.
        count: N, clusters in all.
        num_groups: router groups, which are embedded apart.

    Returns:
        (E, N / groups) float64, on the CPU; each eigenvector's sign is such that its largest component is positive.
    """
    size, per_group = len(similarity) // num_groups, count // num_groups
    similarity, parts = similarity.double().cpu(), []
    for start in range(0, len(similarity), size):
        part = similarity[start : start + size, start : start + size]
        scale = part.sum(1).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        _, vectors = torch.linalg.eigh(scale.unsqueeze(1) * part * scale)  # ascending
        leading = vectors[:, -per_group:]
        largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
        parts.append(leading * largest.sign())
    return torch.cat(parts)
