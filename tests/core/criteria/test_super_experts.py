"""Super experts: outliers of their own layer, measured by the largest outputs so far."""

import pytest
import torch

from optimum_dern.core.criteria.super_experts import find_super_experts


PLAIN = [1.0, 2.0, 1.5, 1.0, 3.0, 1.0, 2.0, 1.0]  # median 1.5 once another is larger


def outputs(**outliers):
    """Largest outputs of eight experts, some of them replaced: `at3=50`."""
    values = list(PLAIN)
    for name, value in outliers.items():
        values[int(name.removeprefix("at"))] = value
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("output_max", "earlier", "depth", "expected"),
    [
        (outputs(), [], 0.0, []),
        (outputs(at3=50), [], 0.0, [3]),
        (outputs(at3=50, at6=900), [], 0.1, [6]),  # a tenth of the largest is 90
        (outputs(at3=95, at6=900), [], 0.1, [3, 6]),
        (outputs(at3=50), [400.0, 2.0], 0.1, [3]),
        (outputs(at3=50), [600.0, 2.0], 0.1, []),  # dwarfed by an earlier layer
        (outputs(at3=50), [], 0.74, [3]),
        (outputs(at3=50), [], 0.75, []),  # the last quarter
        (outputs(at3=4.9), [], 0.0, []),
        (outputs(at3=0.0, at5=9.0), [], 0.0, []),  # the median of those reached is 2
        (outputs(at3=0.0, at5=10.1), [], 0.0, [5]),
        (outputs(at5=7.6), [], 0.0, [5]),
        (torch.zeros(8), [5.0], 0.0, []),
    ],
)
def test_outliers_by_hand(output_max, earlier, depth, expected):
    """Five times the layer's median, a tenth of the largest so far, the first three quarters of the layers."""
    assert find_super_experts(output_max, earlier, depth, count=4) == expected


def test_no_more_than_fit():
    """Of a group's outliers as many are protected as it keeps, the largest ones."""
    values = torch.tensor([1.0, 60, 50, 70, 1, 1, 1, 1, 1, 1, 1, 80])
    assert find_super_experts(values, [], 0.0, count=4, num_groups=2) == [1, 3, 11]
    assert find_super_experts(values, [], 0.0, count=2) == [3, 11]
