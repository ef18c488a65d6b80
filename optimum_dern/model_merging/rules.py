"""Rules that merge one tensor of several fine-tuned models, from the base's and their differences from it.

task arithmetic   base + strength sum_k tau_k                                                (arXiv 2212.04089)
TIES              of every tau_k only the largest entries; per entry the sign of the larger total; the mean of
                  those that have this sign, times the strength                               (arXiv 2306.01708)
DARE              entries of tau_k dropped at random, the others divided by the share kept; then task arithmetic
                                                                                              (arXiv 2311.03099)
"""

from collections.abc import Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor


__all__ = ["dare", "merge_by_rule", "task_arithmetic", "ties"]


def merge_by_rule(
    own: Mapping[str, Tensor],
    differences: Mapping[str, Tensor],
    method: str,
    strength: float,
    density: float | None,
    seed: int,
) -> dict[str, Tensor]:
    """Merge parameters by a rule.

    Args:
        own: of the base, by name.
        differences: (K, ...) what each fine-tuned model adds to them.
        method: "task_arithmetic", "ties" or "dare".
        strength: of the rule.
        density: of "ties" and "dare".
        seed: of "dare", which draws by name, so that the order of the parameters does not matter.
    """
    merged = {}
    for name, tensor in own.items():
        base, taus = tensor.float(), list(differences[name].float())
        if method == "ties":
            result = ties(base, taus, strength, density)
        elif method == "dare":
            result = dare(base, taus, strength, density, torch.Generator().manual_seed(seed + crc32(name.encode())))
        else:
            result = task_arithmetic(base, taus, strength)
        merged[name] = result.to(tensor)
    return merged


def task_arithmetic(base: Tensor, differences: Sequence[Tensor], strength: float) -> Tensor:
    """Add all differences, times a strength."""
    return base + strength * torch.stack(list(differences)).sum(0)


def ties(base: Tensor, differences: Sequence[Tensor], strength: float, density: float) -> Tensor:
    """Trim the differences, elect a sign for every entry, and add the mean of those that agree with it.

    Args:
        base: any shape.
        differences: of each model, of this shape.
        strength: factor of the result.
        density: share of the entries of a difference that stay, those of largest magnitude.
    """
    trimmed = [_largest(difference, density) for difference in differences]
    sign = sum(trimmed).sign()
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for own in trimmed:  # one after the other, for the memory
        agree = (own.sign() == sign) & (own != 0)
        total += own * agree
        count += agree
    return base + strength * total / count.clamp(min=1)


def dare(
    base: Tensor, differences: Sequence[Tensor], strength: float, density: float, generator: torch.Generator
) -> Tensor:
    """Keep a random share of the entries of every difference, scaled so that the expected value stays, and add them.

    Args:
        base: any shape.
        differences: of each model, of this shape.
        strength: factor of the result.
        density: share of the entries that stay.
        generator: draws them, on the CPU.
    """
    kept = []
    for difference in differences:
        mask = torch.rand(difference.shape, generator=generator) < density
        kept.append(difference * mask.to(difference.device) / density)
    return task_arithmetic(base, kept, strength)


def _largest(difference: Tensor, density: float) -> Tensor:
    """Set all but the entries of largest magnitude to zero."""
    count = max(1, round(density * difference.numel()))
    flat = difference.flatten()
    kept = flat.abs().topk(count).indices
    result = torch.zeros_like(flat)
    result[kept] = flat[kept]
    return result.view_as(difference)
