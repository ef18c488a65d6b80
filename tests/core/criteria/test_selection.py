"""Which experts stay: counts, groups, protection and ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_allowed_sets, reference_retained_count, reference_selection
from samples import PROPERTY

from optimum_dern.core.criteria.selection import Places, all_sets, count_sets, retained_count, select_experts


@st.composite
def selections(draw):
    """Scores with many ties, a count that the groups share, and protected experts that fit."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    places = draw(st.integers(1, size))
    scores = draw(st.lists(st.integers(-2, 2), min_size=groups * size, max_size=groups * size))
    protected = []
    for group in range(groups):
        members = st.integers(group * size, (group + 1) * size - 1)
        protected += draw(st.lists(members, unique=True, max_size=places))
    return torch.tensor(scores, dtype=torch.float64), groups * places, groups, protected


@PROPERTY
@given(selections())
def test_selection_matches_the_reference(case):
    """Best first within each group, protected ones before all, ties by index."""
    scores, count, groups, protected = case
    chosen = select_experts(scores, count, groups, protected)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == reference_selection(scores.tolist(), count, groups, protected)


@PROPERTY
@given(selections())
def test_selection_keeps_its_promises(case):
    """Every group keeps its share, the result ascends, protected experts stay, no better expert is left out."""
    scores, count, groups, protected = case
    chosen = select_experts(scores, count, groups, protected).tolist()
    size = len(scores) // groups
    assert chosen == sorted(set(chosen)) and set(protected) <= set(chosen)
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        assert sum(i in chosen for i in members) == count // groups
        for kept in set(members) & set(chosen) - set(protected):
            for lost in set(members) - set(chosen):
                assert (scores[kept], -kept) > (scores[lost], -lost)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_selection_by_hand(dtype):
    """The three largest, ascending; of equal scores the lower index; scores are not written to."""
    scores = torch.tensor([1, 5, 3, 5, 3, 0]).to(dtype)
    saved = scores.clone()
    assert select_experts(scores, 3).tolist() == [1, 2, 3]
    assert select_experts(scores, 3, protected=[5]).tolist() == [1, 3, 5]
    assert select_experts(scores, 2, num_groups=2).tolist() == [1, 3]
    assert select_experts(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(scores, saved)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_many_equal_scores_go_by_index(num_groups):
    """Ties are broken by index in layers as wide as real ones, where an unstable sort would not."""
    scores = torch.arange(256) % 3
    actual = select_experts(scores, 64, num_groups).tolist()
    assert actual == reference_selection(scores.tolist(), 64, num_groups)


@pytest.mark.parametrize("protected", [[4, 5], (4, 5), {4, 5}, [4, 5, 5, 4]])
def test_protected_experts_in_any_collection(protected):
    """Lists, tuples, sets and repetitions all protect the same experts."""
    assert select_experts(torch.arange(6).flip(0), 3, protected=protected).tolist() == [0, 4, 5]


@PROPERTY
@given(st.integers(1, 130), st.integers(0, 99), st.integers(1, 8), st.integers(1, 8))
def test_retained_count_matches_the_reference(experts, percent, groups, multiple_of):
    """The smallest allowed count, with the sparsity taken as the decimal that was written."""
    sparsity = percent / 100
    actual = retained_count(experts, sparsity, groups, multiple_of)
    assert actual == reference_retained_count(experts, sparsity, groups, multiple_of)


@PROPERTY
@given(st.integers(1, 24), st.integers(1, 8), st.integers(0, 99), st.integers(1, 8))
def test_retained_count_keeps_its_promises(size, groups, percent, multiple_of):
    """At most the fraction is dropped, groups can share, and more sparsity never keeps more."""
    experts, sparsity = size * groups, percent / 100
    count = retained_count(experts, sparsity, groups, multiple_of)
    assert 1 <= count <= experts and count % groups == 0
    assert count % multiple_of == 0 or count == experts
    assert experts - count <= experts * sparsity + 1e-9
    assert count >= retained_count(experts, min(0.99, sparsity + 0.01), groups, multiple_of)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 0.0), 8),
        ((8, 0.5), 4),
        ((10, 0.7), 3),  # in floating point 10 * (1 - 0.7) is a little more than 3
        ((128, 0.3), 90),
        ((60, 0.25, 1, 8), 48),
        ((60, 0.01, 1, 8), 60),  # 64 would be more than there are
        ((64, 0.25, 8), 48),
        ((64, 0.3, 8), 48),
        ((24, 0.5, 4, 6), 12),
        ((24, 0.4, 4, 6), 24),
    ],
)
def test_retained_count_by_hand(arguments, expected):
    """Counts worked out on paper."""
    assert retained_count(*arguments) == expected


@pytest.mark.parametrize(
    ("scores", "count", "options", "message"),
    [
        ([1, 2, 3, 4], 0, {}, "cannot retain 0 of 4 experts"),
        ([1, 2, 3, 4], 5, {}, "cannot retain 5 of 4 experts"),
        ([1, 2, 3, 4], 3, {"num_groups": 2}, "3 of 4 experts cannot be shared equally by 2 router groups"),
        ([1, 2, 3], 2, {"num_groups": 2}, "2 of 3 experts cannot be shared equally by 2 router groups"),
        ([1, 2, 3, 4], 2, {"protected": [4]}, r"protected experts \[4\] do not exist; .* 0 to 3"),
        ([1, 2, 3, 4], 2, {"protected": [-1, 2]}, r"protected experts \[-1\] do not exist"),
        ([1, 2, 3, 4], 1, {"protected": [0, 1]}, "2 protected experts share 1 places"),
        ([1, 2, 3, 4], 2, {"protected": [2, 3], "num_groups": 2}, "2 protected experts share 1 places"),
        ([1, float("nan"), 3, 4], 2, {}, "NaN or infinity"),
        ([1, float("inf"), 3, 4], 2, {}, "NaN or infinity"),
        ([1, -float("inf"), 3, 4], 2, {}, "NaN or infinity"),
    ],
)
def test_impossible_selections(scores, count, options, message):
    """Each impossible request is refused with its own reason."""
    with pytest.raises(ValueError, match=message):
        select_experts(torch.tensor(scores, dtype=torch.float64), count, **options)


@pytest.mark.parametrize(
    "places", [Places(3), Places(6), Places(4, 2), Places(2, 2, (0, 5)), Places(3, 1, (1, 2, 3)), Places(3, 3, (0,))]
)
def test_sets_are_counted(places):
    """As many as there are, groups and protected experts respected, each of them once."""
    expected = list(reference_allowed_sets(6, *places))
    assert count_sets(6, places) == len(expected)
    assert all_sets(6, places) == expected
