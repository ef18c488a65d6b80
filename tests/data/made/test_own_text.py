"""Text that a model writes: drawn from its own predictions, reproducible, in whole sequences."""

import pytest
import torch
from tiny import EOS, VOCABULARY, make_model

from optimum_dern.data.made.conversations import Turns
from optimum_dern.data.made.own_text import Conversation, Document, write_sequences


def write(model, count=4, length=12, seed=0, vocabulary=VOCABULARY, **options):
    """Sequences that begin with the ids 0, 1, 2, ..."""
    writers = [Document([first]) for first in range(count)]
    return torch.stack(write_sequences(model, writers, length, seed, vocabulary, **options))


def test_tokens_are_drawn_from_the_predictions():
    """The second token's frequencies over 4,000 draws are the softmax of the logits after the first one."""
    model = make_model("mixtral", initializer_range=1.0).eval()
    writers = [Document([7]) for _ in range(4000)]
    drawn = torch.stack(write_sequences(model, writers, 2, 0, VOCABULARY, batch_size=4000))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1).double()
    found = torch.bincount(drawn[:, 1], minlength=VOCABULARY).double() / 4000
    assert expected.max() > 0.02  # not uniform
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_cache_changes_nothing(family, monkeypatch):
    """The tokens are those that forward passes over the whole sequences give."""
    model = make_model(family).eval()
    cached = write(model)
    monkeypatch.setattr("optimum_dern.data.made.own_text.cache_of", lambda output: {})
    assert torch.equal(write(model), cached)


def test_the_seed_decides_and_the_global_state_stays():
    """The same seed gives the same, another one something else."""
    model, state = make_model("mixtral").eval(), torch.get_rng_state()
    first, again, other = (write(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (4, 12) and first[:, 0].tolist() == [0, 1, 2, 3]


def test_ids_without_a_text_are_not_drawn():
    """Rows of the embeddings beyond the tokenizer's vocabulary."""
    assert write(make_model("mixtral").eval(), count=20, vocabulary=20).max() < 20


def test_broken_weights_are_told():
    """NaN cannot be drawn from."""
    model = make_model("mixtral").eval()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="predicts NaN or infinity"):
        write(model)


def test_documents():
    """After an end comes the BOS token, where the tokenizer adds one to texts."""
    writer = Document([1, 9], bos=1, ends=[2])
    assert [writer.first(), *map(writer.next, [5, 6, 2, 7, 8])] == [1, 9, 6, 2, 1, 8]
    writer = Document([9])
    assert [writer.first(), *map(writer.next, [5, EOS, 7])] == [9, 5, EOS, 7]


def test_conversations():
    """The template's tokens are forced between turns that the model ends, or that are too long."""
    turns = Turns(opening=[90, 91], answer=[92, 93], question=[94], ends={92, 99})
    writer = Conversation(turns, longest=3)
    drawn = [0, 1, 2, 92, 0, 5, 99, 7, 8, 9, 10, 0, 11]
    written = [writer.first(), *map(writer.next, drawn)]
    assert written == [90, 91, 1, 2, 92, 93, 5, 94, 7, 8, 9, 92, 93, 11]
