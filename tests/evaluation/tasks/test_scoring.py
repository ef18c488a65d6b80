"""Log-likelihoods of continuations, against single unpadded forward passes."""

import pytest
import torch
from task_rows import ROWS
from tiny import EOS, FAMILIES, make_model, tiny_tokenizer

from optimum_dern.evaluation.tasks.items import Request
from optimum_dern.evaluation.tasks.load import make_task
from optimum_dern.evaluation.tasks.scoring import encode_requests, score_requests


@torch.no_grad()
def by_hand(model, context, continuation):
    """Log-likelihood and greediness of token lists, one forward pass for each, in float64."""
    logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    logs = logits[len(context) - 1 : -1].log_softmax(-1)
    own = sum(row[token].item() for row, token in zip(logs, continuation, strict=True))
    return own, logs.argmax(-1).tolist() == continuation


def ids_of(text):
    """Tokens of a text."""
    return tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores(family):
    """Batched, padded and shared, every request has the score of a pass of its own, in the order of the requests."""
    model = make_model(family, max_position_embeddings=256)
    tasks = [make_task(name, ROWS[name]) for name in ("riddles", "arc_easy", "winogrande", "lambada_openai", "boolq")]
    requests = [request for task in tasks for item in task.items for request in item.requests]
    scores = score_requests(model, tiny_tokenizer(), requests, batch_tokens=300)
    for request, score in zip(requests, scores, strict=True):
        likelihood, greedy = by_hand(model, ids_of(request.context), ids_of(request.continuation))
        assert score.log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert (score.greedy, score.tokens) == (greedy, len(ids_of(request.continuation)))


def test_greedy():
    """Of all next characters exactly the most probable one is greedy, and of longer ones those that begin with it."""
    model, tokenizer = make_model("mixtral"), tiny_tokenizer()
    for context in ("ab", "stone", "what", "xyz", "river", "12", "moon", "q"):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids_of(context)])).logits[0, -1].argmax().item()
        if best < EOS and tokenizer.decode([best]).isascii():
            break
    else:
        pytest.fail("no context with a printable next character; take another seed")
    requests = [Request(context, tokenizer.decode([i])) for i in range(EOS) if tokenizer.decode([i]).isascii()]
    greedy = [
        r.continuation for r, s in zip(requests, score_requests(model, tokenizer, requests), strict=True) if s.greedy
    ]
    assert greedy == [tokenizer.decode([best])]
    likely, unlikely = score_requests(
        model, tokenizer, [Request(context, greedy[0]), Request(context, greedy[0] + "zqzqzq")]
    )
    assert likely.greedy and not unlikely.greedy


def test_batch_size_does_not_matter():
    """A batch for each, or one for all."""
    model, tokenizer = make_model("mixtral"), tiny_tokenizer()
    requests = [Request("x" * n, " " + "y" * (1 + n % 5)) for n in range(1, 40, 3)]
    one, many = (score_requests(model, tokenizer, requests, batch_tokens=size) for size in (1, 10_000))
    assert [s.log_likelihood for s in one] == pytest.approx([s.log_likelihood for s in many], abs=1e-4)


def test_passes_are_shared():
    """Requests that differ in their last token only are one row, and a batch holds no more tokens than asked for."""
    model, shapes = make_model("mixtral"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    requests = [Request(context, last) for context in ("one two", "three", "four") for last in "ABCD"]
    score_requests(model, tiny_tokenizer(), requests, batch_tokens=10)
    assert sorted(shapes) == [(1, 7), (2, 5)]


def test_spaces_belong_to_the_continuation():
    """As in lm-eval, spaces at a context's end are predicted."""
    ((ids, count),) = encode_requests([Request("ab  ", "c")], tiny_tokenizer())
    assert (ids, count) == (ids_of("ab  c"), 3)


def test_without_a_context():
    """A document begins with BOS, or EOS where there is none, and all of the text is predicted."""
    model, tokenizer = make_model("mixtral"), tiny_tokenizer()
    (score,) = score_requests(model, tokenizer, [Request("", " Who?")])
    assert score.log_likelihood == pytest.approx(by_hand(model, [EOS], ids_of(" Who?"))[0], abs=1e-4)
    assert score.tokens == 5
    tokenizer.bos_token = "<pad>"
    ((ids, _),) = encode_requests([Request("", "a")], tokenizer)
    assert ids == [tokenizer.pad_token_id, *ids_of("a")]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        encode_requests([Request("", "a")], tokenizer)


def test_long_contexts_lose_their_beginning():
    """The model reads as much as it can; its last prediction needs no room."""
    model, tokenizer = make_model("mixtral", max_position_embeddings=16), tiny_tokenizer()
    long, kept = score_requests(
        model, tokenizer, [Request("z" * 50 + "0123456789abcd", "xyz"), Request("0123456789abcd", "xyz")]
    )
    assert long == kept
    ((ids, count),) = encode_requests([Request("z" * 50, "xyz")], tokenizer, 16)
    assert (len(ids), count) == (17, 3)
    with pytest.raises(ValueError, match="17 tokens, but the model reads 16"):
        score_requests(model, tokenizer, [Request("a", "z" * 17)])


def test_nan():
    """A model that computes nothing gives no score."""
    model = make_model("mixtral")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        score_requests(model, tiny_tokenizer(), [Request("a", "b")])


def test_a_continuation_without_a_token():
    """Nothing to predict is an error, not a likelihood of one."""
    with pytest.raises(ValueError, match="no token of its own"):
        encode_requests([Request("abc", "")], tiny_tokenizer())
