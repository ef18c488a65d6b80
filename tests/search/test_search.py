"""Searches: which candidates live on with which numbers of experts, what they cost, and the same answer by a seed."""

import math
from dataclasses import replace
from string import ascii_lowercase

import pytest
import torch
from families import make_model
from tiny import EOS, VOCABULARY, tiny_tokenizer

from optimum_dern import expert_search
from optimum_dern.search.active import active_experts
from optimum_dern.search.candidates import Candidate, Cost
from optimum_dern.search.scorers import likelihood, reward_model, verifier
from optimum_dern.search.steps import Sampling, extend, prompt_tokens
from optimum_dern.search.strategies import keep_all, keep_best, keep_best_of_trees, voted_answer


PROMPT = "What is it?"


@pytest.fixture(scope="module")
def tokenizer():
    """Of bytes, so that a letter is a token."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def letters(tokenizer):
    """Tokens of the letters."""
    return tokenizer.convert_tokens_to_ids(list(ascii_lowercase))


@pytest.fixture
def model(letters):
    """A model that writes letters and ends no answer."""
    made = make_model("olmoe")
    made.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in letters]
    return made


@pytest.fixture
def search(model, tokenizer):
    """A small search of two steps of four tokens."""

    def run(**options):
        defaults = {"scorer": by_letters, "rollouts": 6, "keep": 2, "rounds": 2, "step": None, "step_tokens": 4}
        return expert_search(model, tokenizer, PROMPT, **{**defaults, **options})

    return run


def by_letters(prompt, texts):
    """A score that is reproducible and differs between texts."""
    assert prompt == PROMPT
    return [sum(map(ord, text)) % 1009 / 1009 for text in texts]


def candidates(*scores):
    """Candidates of three trees by their scores."""
    return [Candidate(place + 1, place % 3, text=str(place), score=score) for place, score in enumerate(scores)]


def test_who_is_kept():
    """The best of all, the best of each tree, or all; the first among equal ones."""
    drawn = candidates(0.1, 0.9, 0.3, 0.8, 0.9, 0.2)
    assert [each.count for each in keep_best(drawn, 3)] == [2, 5, 4]
    assert [each.count for each in keep_best_of_trees(drawn, 3)] == [4, 2, 3]
    assert keep_all(drawn, 3) == drawn


def test_vote():
    """Scores of texts that agree are added; the best of them stands for all."""
    drawn = [replace(each, text=text) for each, text in zip(candidates(0.6, 0.4, 0.5), ("a", "b", "B"), strict=True)]
    assert voted_answer(drawn, str.lower).text == "B"
    with pytest.raises(ValueError, match="no weight of a vote"):
        voted_answer([*drawn, replace(drawn[0], score=-1.0)], str.lower)


def recorded(search, **options):
    """A search's result, and the texts that its scorer was given in every round."""
    seen = []

    def scorer(prompt, texts):
        seen.append(list(texts))
        return by_letters(prompt, texts)

    return search(scorer=scorer, **options), seen


def test_des_inherits_the_numbers(search):
    """Six rollouts begin two with each number; three copies of the best two go on with theirs."""
    result, seen = recorded(search, counts=(1, 2, 4))
    first = sorted(zip(by_letters(PROMPT, seen[0]), [1, 1, 2, 2, 4, 4], seen[0], strict=True), key=lambda row: -row[0])
    assert [len(texts) for texts in seen] == [6, 6]
    assert result.kept[0] == tuple(count for _, count, _ in first[:2])
    for (_, count, text), begun in zip(first[:2], (slice(0, 3), slice(3, 6)), strict=True):
        assert all(longer.startswith(text) for longer in seen[1][begun])
        assert {each.count for each in result.answers if each.text in seen[1][begun]} == {count}
    assert result.score == max(by_letters(PROMPT, seen[1])) == result.answers[0].score


def test_cost_is_counted(search, tokenizer):
    """Written tokens, those read again in every round, and experts run for both."""
    read = len(prompt_tokens(tokenizer, PROMPT))
    result = search(counts=(1, 2, 4))
    second = [count for count in result.kept[0] for _ in range(3)]
    assert result.cost == Cost(
        written=48,
        written_experts=4 * 2 * (1 + 2 + 4) + 4 * sum(second),
        read=6 * read + 6 * (read + 4),
        read_experts=read * 14 + (read + 4) * sum(second),
        scored=6 * (read + 4) + 6 * (read + 8),
    )
    whole = search(strategy="best_of").cost
    assert (whole.written, whole.written_experts, whole.read) == (48, 96, 6 * read)


def test_dvts_keeps_one_of_each_tree(search):
    """The second half of the rollouts goes on from the best of the second half, however good the first."""
    result, seen = recorded(search, strategy="dvts")
    halves = seen[0][:3], seen[0][3:]
    for half, begun in zip(halves, (seen[1][:3], seen[1][3:]), strict=True):
        best = max(half, key=lambda text: by_letters(PROMPT, [text])[0])
        assert all(text.startswith(best) for text in begun)
    assert result.kept == ((2, 2), (2, 2))


def test_beam_keeps_the_best(search):
    """With the trained number alone."""
    result, seen = recorded(search, strategy="beam")
    best = sorted(seen[0], key=lambda text: -by_letters(PROMPT, [text])[0])[:2]
    assert [text[: len(best[0])] in best for text in seen[1]] == [True] * 6
    assert result.kept == ((2, 2), (2, 2))


def test_default_counts(search):
    """Around the trained number for DES, that number for the baselines."""
    assert {each.count for each in search(rounds=1, keep=6).answers} == {1, 2, 3}
    assert {each.count for each in search(rounds=1, strategy="beam").answers} == {2}


def test_reproducible_by_seed(search, model):
    """And neither the caller's random state nor the model's mode changes."""
    model.train()
    before = torch.get_rng_state()
    first, again, other = search(seed=1), search(seed=1), search(seed=2)
    assert first == again and first.answers != other.answers
    assert torch.equal(before, torch.get_rng_state()) and model.training
    model.eval()


def test_steps_end_by_text_or_by_the_model(model, tokenizer):
    """Every row at its own place; what ends an answer is told from padding, even by the same token."""
    model.generation_config.suppress_tokens.remove(EOS)
    padding = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    tokens, begun = prompt_tokens(tokenizer, PROMPT), [Candidate(2, place) for place in range(24)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        free = extend(model, tokenizer, tokens, begun, Sampling(None, 40, 1.0), Cost())
        torch.manual_seed(0)
        cut = extend(model, tokenizer, tokens, begun, Sampling("e", 40, 1.0), Cost())
    tokenizer.pad_token = padding
    (letter,) = tokenizer("e", add_special_tokens=False)["input_ids"]
    assert {each.done for each in free} == {each.done for each in cut} == {True, False}
    for short, each in zip(cut, free, strict=True):
        end = next((place for place, token in enumerate(each.tokens) if token in (letter, EOS)), 39)
        assert short.tokens == each.tokens[: end + 1] and short.done == (short.tokens[-1] == EOS)
        assert EOS not in each.tokens[:-1]


def test_a_step_is_that_of_its_number(model, tokenizer):
    """Greedy steps of several numbers in one call are those that generate writes with each number."""
    tokens, numbers = prompt_tokens(tokenizer, PROMPT), [4, 1, 4]
    written = extend(model, tokenizer, tokens, [Candidate(k, 0) for k in numbers], Sampling(None, 6, 0.0), Cost())
    for k, each in zip(numbers, written, strict=True):
        with active_experts(model, k):
            alone = model.generate(torch.tensor([tokens]), max_new_tokens=6, do_sample=False)
        assert tuple(alone[0, len(tokens) :].tolist())[: len(each.tokens)] == each.tokens
        assert each.count == k


def test_finished_answers_are_final(search, model, letters):
    """They are answers while others go on, and their copies are written no more."""
    model.generation_config.eos_token_id = letters[:13]
    result, seen = recorded(search, strategy="beam", rounds=4, step_tokens=1, temperature=2.0)
    ended = [text for texts in seen for text in texts if text[-1] in ascii_lowercase[:13]]
    assert sorted(each.text for each in result.answers) == sorted(ended)
    assert 3 in map(len, seen[1:])  # of two that were kept, one was done
    assert result.text == max(ended, key=lambda text: by_letters(PROMPT, [text])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "mcts"}, "one of des, beam, dvts, best_of"),
        ({"counts": (1, 2, 3, 4)}, "shared evenly by 4 counts"),
        ({"keep": 4}, "shared evenly by 4 candidates"),
        ({"counts": (2, 2)}, "different numbers"),
        ({"counts": (1, 99)}, "from 1 to 8"),
        ({"rounds": 0}, "1 or more"),
        ({"scorer": lambda prompt, texts: [1.0]}, "one finite number for each"),
        ({"scorer": lambda prompt, texts: [float("nan")] * len(texts)}, "one finite number for each"),
    ],
)
def test_what_does_not_fit_is_refused(search, options, message):
    """With what is allowed."""
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_likelihood_is_that_of_the_tokens(model, tokenizer):
    """Against a loop over the logits in float64."""
    texts = ["abc", "", "xy", "abc"]
    scores = likelihood(model, tokenizer)(PROMPT, texts)
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer(PROMPT + text)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
        start = len(tokenizer(PROMPT)["input_ids"])
        logs = [float(logits[place - 1, ids[place]]) for place in range(start, len(ids))]
        assert score == pytest.approx(math.exp(sum(logs) / len(logs)) if logs else 0.0, rel=1e-4)


def test_reward_model(tokenizer):
    """Padding and the place in a batch make no difference."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    scorer = reward_model(LlamaForSequenceClassification(config).eval(), tokenizer, batch_size=2)
    together = scorer(PROMPT, ["a", "bcd", "efghi"])
    assert together == pytest.approx([scorer(PROMPT, [text])[0] for text in ("a", "bcd", "efghi")], rel=1e-4)
    assert len(set(together)) == 3 and all(0 < score < 1 for score in together)


def test_verifier():
    """A function of the prompt and of one text."""
    assert verifier(lambda prompt, text: len(text) > len(prompt))("ab", ["a", "abc"]) == [0.0, 1.0]
