"""Several tensors read at once."""

import torch

from optimum_dern.machine.transfers import read_together


def test_numbers_of_tensors_of_any_shape_and_kind():
    """Each tensor's own, in float64: whole numbers, truths and what is not finite included."""
    floats = torch.tensor([[0.1, torch.inf], [2.0, -3.0]])
    read = read_together(torch.tensor(7), floats, torch.tensor([True, False]), torch.zeros(0), torch.tensor([1 << 40]))
    assert read == [[7], floats.flatten().tolist(), [1, 0], [], [1 << 40]]
