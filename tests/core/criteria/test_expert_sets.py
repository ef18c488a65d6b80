"""The sets of experts that may stay."""

import pytest
from reference import reference_allowed_sets

from optimum_dern.core.criteria.expert_sets import all_sets, count_sets
from optimum_dern.core.criteria.selection import Places


@pytest.mark.parametrize(
    "places", [Places(3), Places(6), Places(4, 2), Places(2, 2, (0, 5)), Places(3, 1, (1, 2, 3)), Places(3, 3, (0,))]
)
def test_sets_are_counted(places):
    """As many as there are, groups and protected experts respected, each of them once."""
    expected = list(reference_allowed_sets(6, *places))
    assert count_sets(6, places) == len(expected)
    assert all_sets(6, places) == expected
