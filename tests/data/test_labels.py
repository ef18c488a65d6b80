"""Which calibration tokens are held out, the source that each comes from, and its number."""

from dataclasses import replace

import pytest
import torch

from optimum_dern.data.labels import POSITION, SOURCE, TokenLabels, first_drawn, label_tokens, model_inputs
from optimum_dern.machine.processes import ALONE


def batch_of(*lengths, size=10, **labels):
    """One micro-batch of right-padded sequences of these lengths."""
    mask = torch.arange(size) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": torch.zeros_like(mask, dtype=torch.int64), "attention_mask": mask.long(), **labels}


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([batch_of(3, 5, 2)], [0] * 8 + [1] * 2),  # fewer than ten sequences: the last
        ([batch_of(3, 5), batch_of(2)], [0] * 8 + [1] * 2),  # in whichever batch
        ([batch_of(*[1] * 10)], [0] * 9 + [1]),  # every tenth from ten on
        ([batch_of(*[1] * 21)], ([0] * 9 + [1]) * 2 + [0]),
        ([batch_of(*[2] * 9), batch_of(*[3] * 11)], [0] * 18 + [1] * 3 + [0] * 27 + [1] * 3),
        ([batch_of(10)], [0] * 9 + [1]),  # of a single one, its last tenth
        ([batch_of(29, size=30)], [0] * 27 + [1] * 2),
    ],
)
def test_held_out_tokens(batches, expected):
    """A tenth of the sequences, whole ones where there are several; padding has no entry."""
    labels = label_tokens(batches)
    assert labels.held_out.tolist() == [bool(value) for value in expected]
    assert labels.order.tolist() == list(range(len(expected)))


def test_a_tenth_of_every_source_is_held_out():
    """Ten sequences of a, one of b and three of c, in batches of five: the tenth, a tenth of the one, and the last."""
    names = [*"aaaaabacaaacac"]
    assert names.count("a") == 10
    sources = [names[:5], names[5:10], names[10:]]
    labels = label_tokens([batch_of(*[10] * len(batch), source=batch) for batch in sources])
    assert labels.names == ("a", "b", "c")
    held_out, source = labels.held_out.view(14, 10), labels.source.view(14, 10)
    assert [labels.names[row[0]] for row in source.tolist()] == names
    assert (source == source[:, :1]).all()
    assert held_out.sum(1).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 10]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_label_what_one_does(count):
    """Every process gets the labels of its own micro-batches, with the same numbers of the sources."""
    sources = [["a", "b"], ["b", "b"], ["c", "a"], ["a", "a"], ["b", "c"], ["a", "a"]]
    parts = zip((4, 2, 7, 1, 10, 5), sources, strict=True)
    batches = [batch_of(3, length, source=names) for length, names in parts]
    whole = label_tokens(batches)
    sizes = [int(batch["attention_mask"].sum()) for batch in batches]
    for rank in range(count):
        own = label_tokens(batches, replace(ALONE, rank=rank, count=count))
        assert own.names == whole.names
        for field in ("held_out", "source", "order"):
            expected = torch.cat(getattr(whole, field).split(sizes)[rank::count])
            assert torch.equal(getattr(own, field), expected)


def test_batches_without_sources():
    """All tokens are then of one source without a name."""
    assert label_tokens([batch_of(2), batch_of(3, source=["a"])]).names == ("",)
    assert label_tokens([batch_of(2, source=["b"]), batch_of(3, source=["a"])]).names == ("b", "a")
    assert len(TokenLabels.empty().held_out) == 0


def test_labels_do_not_depend_on_the_batches():
    """Every token of twenty sequences has the same number, source and fate, in whatever batch it is."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 10, (20,), generator=generator).tolist()
    names = [*"abbabaaabbaabababbab"]

    def labelled(*groups):
        batches = [
            batch_of(*(lengths[i] for i in group), source=[names[i] for i in group], position=list(group))
            for group in groups
        ]
        labels = label_tokens(batches)
        tokens = zip(labels.order.tolist(), labels.held_out.tolist(), labels.source.tolist(), strict=True)
        return labels.names, {number: facts for number, *facts in tokens}

    expected = labelled(range(20))
    assert list(expected[1]) == list(range(sum(lengths)))
    shuffled = torch.randperm(20, generator=generator).tolist()
    assert labelled(shuffled[:3], shuffled[3:10], shuffled[10:]) == expected
    assert labelled(*([i] for i in reversed(range(20)))) == expected


def test_the_model_gets_no_labels():
    """They are not among its arguments."""
    assert model_inputs(batch_of(2, source=["a"], position=[0])).keys() == {"input_ids", "attention_mask"}
    assert {SOURCE, POSITION} == {"source", "position"}


def test_the_sequences_drawn_first():
    """As many as have enough tokens, whichever batches they are in; without numbers, in the order of the batches."""
    plain = [batch_of(3, 5, 2), batch_of(4)]
    drawn = [batch_of(3, 5, 2, position=[2, 0, 3], source=[*"aba"]), batch_of(4, position=[1], source=["a"])]

    def lengths(batches, tokens):
        return [batch["attention_mask"].sum(1).tolist() for batch in first_drawn(batches, tokens)]

    assert lengths(plain, 3) == [[3]] and lengths(plain, 4) == [[3, 5]] and lengths(plain, 11) == [[3, 5, 2], [4]]
    assert lengths(drawn, 5) == [[5]] and lengths(drawn, 9) == [[5], [4]] and lengths(drawn, 10) == [[3, 5], [4]]
    assert lengths(drawn, 99) == [[3, 5, 2], [4]]
    chosen, _ = first_drawn(drawn, 10)
    assert chosen["source"] == ["a", "b"] and chosen["position"] == [2, 0] and chosen["input_ids"].shape == (2, 10)
