"""The numbers of the calibration tokens, whoever holds them."""

import pytest
import torch

from optimum_dern.engine.distributed import Processes
from optimum_dern.engine.positions import token_positions


class Pretended(Processes):
    """One of several processes, which is told what the others would send."""

    lengths = ()

    def reduce(self, local, operation="sum"):
        """As if the others had answered."""
        return torch.tensor(len(self.lengths)) if local.dim() == 0 else torch.tensor(self.lengths)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_positions_are_those_of_one_process(count):
    """Each process's tokens have the numbers that they have where one process holds all micro-batches."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, 5, generator=generator) < 0.7 for _ in range(7)]
    numbers = torch.arange(sum(int(mask.sum()) for mask in masks)).split([int(mask.sum()) for mask in masks])
    for rank in range(count):
        processes = Pretended(rank, count) if count > 1 else Processes()
        Pretended.lengths = [int(mask.sum()) for mask in masks]
        assert torch.equal(token_positions(processes.share(masks), processes), torch.cat(numbers[rank::count]))


def test_no_tokens():
    """Where nothing is observed there is nothing to number."""
    assert token_positions(()).tolist() == []
