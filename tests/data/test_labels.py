"""Which calibration tokens are held out, and the source that each comes from."""

from dataclasses import replace

import pytest
import torch

from optimum_dern.data.labels import SOURCE, TokenLabels, label_tokens, sources_of
from optimum_dern.machine.processes import ALONE


def masks_of(*lengths, size=10):
    """One micro-batch of right-padded sequences of these lengths."""
    return torch.arange(size) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([masks_of(3, 5, 2)], [0] * 8 + [1] * 2),  # fewer than ten sequences: the last
        ([masks_of(3, 5), masks_of(2)], [0] * 8 + [1] * 2),  # in whichever batch
        ([masks_of(*[1] * 10)], [0] * 9 + [1]),  # every tenth from ten on
        ([masks_of(*[1] * 21)], ([0] * 9 + [1]) * 2 + [0]),
        ([masks_of(*[2] * 9), masks_of(*[3] * 11)], [0] * 18 + [1] * 3 + [0] * 27 + [1] * 3),
        ([masks_of(10)], [0] * 9 + [1]),  # of a single one, its last tenth
        ([masks_of(29, size=30)], [0] * 27 + [1] * 2),
    ],
)
def test_held_out_tokens(masks, expected):
    """A tenth of the sequences, whole ones where there are several; padding has no entry."""
    assert label_tokens(masks).held_out.tolist() == [bool(value) for value in expected]


def test_a_tenth_of_every_source_is_held_out():
    """Ten sequences of a, one of b and three of c, in batches of five: the tenth, a tenth of the one, and the last."""
    names = [*"aaaaabacaaacac"]
    assert names.count("a") == 10
    sources = [names[:5], names[5:10], names[10:]]
    masks = [masks_of(*[10] * len(batch)) for batch in sources]
    labels = label_tokens(masks, sources)
    assert labels.names == ("a", "b", "c")
    held_out, source = labels.held_out.view(14, 10), labels.source.view(14, 10)
    assert [labels.names[row[0]] for row in source.tolist()] == names
    assert (source == source[:, :1]).all()
    assert held_out.sum(1).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 10]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_label_what_one_does(count):
    """Every process gets the labels of its own micro-batches, with the same numbers of the sources."""
    sources = [["a", "b"], ["b", "b"], ["c", "a"], ["a", "a"], ["b", "c"], ["a", "a"]]
    masks = [masks_of(3, length) for length in (4, 2, 7, 1, 10, 5)]
    whole = label_tokens(masks, sources)
    sizes = [int(mask.sum()) for mask in masks]
    for rank in range(count):
        own = label_tokens(masks, sources, replace(ALONE, rank=rank, count=count))
        assert own.names == whole.names
        for field in ("held_out", "source"):
            expected = torch.cat(getattr(whole, field).split(sizes)[rank::count])
            assert torch.equal(getattr(own, field), expected)


def test_batches_without_sources():
    """All tokens are then of one source without a name."""
    assert sources_of([{"input_ids": 1}, {SOURCE: ["a"]}]) is None
    assert sources_of([{SOURCE: ["a"]}, {SOURCE: ["b", "a"]}]) == [["a"], ["b", "a"]]
    assert label_tokens([masks_of(2)]).names == ("",)
    assert len(TokenLabels.empty().held_out) == 0
