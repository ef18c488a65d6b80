"""Router weights of a compressed layer: rows and biases of the retained experts."""

import torch
from torch import Tensor


__all__ = ["add_moved_rows", "dropped_experts", "retain"]


def dropped_experts(num_experts: int, retained: Tensor) -> Tensor:
    """Return the indices (E - N,) of the experts that are not retained, ascending."""
    stays = torch.zeros(num_experts, dtype=torch.int64, device=retained.device).index_fill_(0, retained, 1)
    return stays.argsort(stable=True)[: num_experts - len(retained)]  # a GPU need not be asked how many they are


def retain(tensor: Tensor, retained: Tensor, dim: int = 0) -> Tensor:
    """Select the entries of the retained experts from a router tensor.

    Args:
        tensor: weight (E, d), bias (E,), or any tensor with one entry an expert along `dim`.
        retained: (N,) experts that stay, ascending.
        dim: the expert dimension.

    Returns:
        A new tensor with N entries along `dim`.
    """
    return tensor.index_select(dim, retained.to(tensor.device))


def add_moved_rows(rows: Tensor, retained: Tensor, destination: Tensor) -> Tensor:
    """Add dropped experts' router rows to the experts that received their segments (DERN, arXiv 2509.10377, step 2).

        G_r <- G_r + sum over dropped o of (n_{o->r} / f) G_o

    Args:
        rows: (E, d) router weight.
        retained: (N,) experts that stay, ascending.
        destination: (E - N, f) position among the retained experts of each dropped segment, -1 for none.

    Returns:
        (N, d) in the dtype of `rows`.
    """
    share = rows.new_zeros(len(rows), len(retained)).double()  # (E, N)
    share[retained, range(len(retained))] = 1.0
    for expert, targets in zip(dropped_experts(len(rows), retained), destination, strict=True):
        moved = targets[targets >= 0].bincount(minlength=len(retained))
        share[expert] = moved.double() / len(targets)
    return (share.T @ rows.double()).to(rows.dtype)
