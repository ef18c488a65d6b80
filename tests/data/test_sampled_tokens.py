"""Which of the calibration tokens are used, by their numbers, whoever holds them."""

import pytest
import torch

from optimum_dern.data.labels import enough_tokens, evenly_spaced
from optimum_dern.machine.processes import Processes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evenly_spaced_tokens_are_the_same_whoever_holds_them(count):
    """About as many as wanted, in every stretch of the text, and all of them where that is no more."""
    whole = evenly_spaced(torch.arange(1000), 300)
    assert whole.sum() == 300 and all(29 <= part.sum() <= 31 for part in whole.split(100))
    assert evenly_spaced(torch.arange(10), 300).all() and evenly_spaced(torch.arange(0), 300).tolist() == []

    class Sharing(Processes):
        def reduce(self, local, operation="sum"):
            return torch.tensor(1000)

    for rank in range(count):
        own = torch.arange(1000)[rank::count]
        assert torch.equal(evenly_spaced(own, 300, Sharing(rank, count)), whole[own])


def test_closed_forms_get_more_tokens_than_unknowns():
    """65,536 tokens, and more where that would be few for each neuron of an expert."""
    assert enough_tokens(neurons=1024, top_k=2) == 65_536
    assert enough_tokens(neurons=4 * 14_336, top_k=2) == 32 * 4 * 14_336 // 2
