"""The search with scorers that say what is to happen: who goes on, with which number of experts, at what cost."""

from collections import Counter

import pytest
import torch
from tiny import EOS, PAD, make_model, tiny_tokenizer

from optimum_dern.search import driver, expert_search, likelihood_scorer
from optimum_dern.search.driver import Solution


@pytest.fixture(scope="module")
def written():
    model = make_model("mixtral").eval()
    model.generation_config.suppress_tokens = [EOS, PAD]  # nothing ends by itself
    return model, tiny_tokenizer()


def by_length(prompt, texts):
    return [len(text) for text in texts]


def search(written, scorer=by_length, **options):
    options = {"rollouts": 4, "rounds": 3, "step_tokens": 5, "step_ends": None, **options}
    return expert_search(*written, "abc", scorer, **options)


def test_who_goes_on():
    """The best in so many copies, which inherit the number of experts and the tree; finished ones keep one place."""
    pool = [Solution("a", 1, 0, 0.1), Solution("b", 2, 0, 0.4), Solution("c", 3, 1, 0.2), Solution("d", 4, 1, 0.3)]
    go_on = driver.STRATEGIES
    assert [(s.text, s.count) for s in go_on["des"](pool, 4, 1)] == [("b", 2)] * 4
    assert [s.text for s in go_on["beam"](pool, 4, 2)] == ["b", "b", "d", "d"]
    assert [s.text for s in go_on["dvts"](pool, 4, 2)] == ["b", "b", "d", "d"]
    pool[1], pool[2] = Solution("b", 2, 0, 0.4, True), Solution("c", 3, 1, 0.9)
    assert [s.text for s in go_on["des"](pool, 4, 2)] == ["c", "c", "b"]
    assert [s.text for s in go_on["dvts"](pool, 4, 2)] == ["b", "c", "c"]
    assert go_on["best_of_n"](pool, 4, 2) == pool


def test_counts_are_shared_and_inherited(written):
    """Rollouts are split evenly over the numbers; a scorer that prefers one is left with that one."""
    seen = []

    def scorer(prompt, texts):
        seen.append(len(texts))
        return [1.0 if i == 0 else 0.0 for i in range(len(texts))]  # the first has the smallest number

    result = search(written, scorer, counts=[1, 2, 3, 4], keep=1)
    assert seen == [4, 4, 4]
    assert {solution.count for solution in result.solutions} == {1}
    assert result.tokens == 3 * 4 * 5
    assert result.cost == 5 * (1 + 2 + 3 + 4) + 2 * 4 * 5 * 1
    prompt = len(written[1]("abc")["input_ids"])
    assert result.prompt_tokens >= 4 * prompt + 4 * (prompt + 1)


@pytest.mark.parametrize("strategy", ["beam", "dvts", "best_of_n"])
def test_baselines_keep_the_trained_number(written, strategy):
    result = search(written, strategy=strategy, keep=2)
    assert {solution.count for solution in result.solutions} == {2}
    assert result.cost == 2 * result.tokens
    assert len(result.solutions) == 4 and result.score == max(s.score for s in result.solutions)


def test_defaults_of_des(written):
    assert driver._counts("des", None, 2, 8) == [1, 2, 3]
    assert driver._counts("des", None, 8, 10) == [4, 5, 6, 7, 8, 9, 10]
    assert driver._counts("des", [4, 1], 2, 8) == [1, 4]


def test_the_seed(written):
    """It decides everything, and the caller's random numbers go on as they would."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = search(written, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert search(written, seed=1) == first
    assert search(written, seed=2) != first


def test_steps_end_at_a_text(written):
    """A step that ends is not a solution that has ended, though the batch is padded behind it."""
    model, tokenizer = written
    letter = Counter(search(written).text).most_common(1)[0][0]
    result = search(written, step_ends=letter, rounds=1, step_tokens=30, rollouts=8, keep=8)
    stopped = [s for s in result.solutions if letter in s.text]
    assert stopped and all(s.text.endswith(letter) and not s.finished for s in stopped if letter == s.text[-1])


def test_votes():
    """The answer of largest total wins over the best single solution."""
    pool = [Solution("x", 2, 0, 1.0), Solution("y", 2, 0, 0.9), Solution("y!", 2, 0, 0.8)]
    assert driver._voted(pool, lambda text: text[0]).text == "y"


def test_likelihood(written):
    """The mean log-probability of the tokens after the prompt, one by one."""
    model, tokenizer = written
    (score,) = likelihood_scorer(model, tokenizer)("abc", ["de"])
    ids = tokenizer("abcde", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(1)
    before = len(tokenizer("abc")["input_ids"])
    expected = [logs[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1])]
    assert score == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "a_star"}, "must be one of des, beam, dvts, best_of_n"),
        ({"rollouts": 4, "keep": 3}, "rollouts that keep divides"),
        ({"rounds": 0}, "at least 1"),
        ({"strategy": "beam", "counts": [1]}, "has no effect"),
        ({"counts": [99]}, "can choose 1 to 8"),
    ],
)
def test_refused(written, options, message):
    with pytest.raises(ValueError, match=message):
        search(written, **options)
