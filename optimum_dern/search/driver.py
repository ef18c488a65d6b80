"""Search over partial solutions, and over the number of active experts that writes them (arXiv 2509.22572).

    des         N solutions begin with different numbers of active experts; after every step the M best go on, in N / M
                copies each, which inherit the number
    beam        the same with the trained number alone
    dvts        M trees, in each of which only the best solution goes on
    best_of_n   N solutions, none of which is given up

A step ends at a text such as a line's end, or after some tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data.named import preserved_random_state
from ..machine.progress import progress_bar
from ..machine.torch_state import evaluation_mode
from ..models.moe.structure import find_moe_layers
from .active import active_experts
from .scorers import Scorer


__all__ = ["STRATEGIES", "Solution", "SearchResult", "expert_search"]


@dataclass(frozen=True)
class Solution:
    """A partial or finished solution."""

    text: str  # after the prompt
    count: int  # active experts that write it
    tree: int  # which of the first solutions it comes from
    score: float = float("-inf")
    finished: bool = False


@dataclass(frozen=True)
class SearchResult:
    """The best solution, all others, and what the search has cost."""

    text: str
    score: float
    solutions: list[Solution]  # of the last round, the best first
    tokens: int  # generated
    prompt_tokens: int  # read before generating, in all rounds
    cost: int  # generated tokens times active experts


def expert_search(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    scorer: Scorer,
    *,
    strategy: str = "des",
    counts: Sequence[int] | None = None,
    rollouts: int = 8,
    keep: int | None = None,
    rounds: int = 4,
    step_tokens: int = 32,
    step_ends: str | None = "\n",
    temperature: float = 0.8,
    seed: int = 0,
    answer: Callable[[str], str] | None = None,
    correct_scale: bool = True,
) -> SearchResult:
    """Search a solution of a prompt step by step.

    Args:
        model: a Mixture-of-Experts causal language model.
        tokenizer: its own.
        prompt: that solutions continue.
        scorer: scores partial solutions; see `scorers`.
        strategy: one of `STRATEGIES`.
        counts: numbers of active experts that "des" shares the rollouts among; by default from half of the trained
            number to one and a half times that.
        rollouts: N, solutions in work at once.
        keep: M, of which so many go on after a step; by default a quarter.
        rounds: most steps.
        step_tokens: most tokens of a step.
        step_ends: text at which a step ends, or None.
        temperature: of sampling.
        seed: of sampling; the caller's random state stays as it is.
        answer: makes the answer of a solution; where it is given, the answer of largest total score wins.
        correct_scale: as in `active_experts`.

    Raises:
        ValueError: an unknown strategy, or numbers out of range.
    """
    layers = find_moe_layers(model)
    trained, keep = layers[0].top_k, max(1, rollouts // 4) if keep is None else keep
    _check(strategy, rollouts, keep, rounds, step_tokens)
    counts = _counts(strategy, counts, trained, min(layer.num_experts for layer in layers))
    pool = [Solution("", counts[i * len(counts) // rollouts], i * keep // rollouts) for i in range(rollouts)]
    writer = _Writer(model, tokenizer, prompt, step_tokens, step_ends, temperature, correct_scale)
    with preserved_random_state(), evaluation_mode(model):
        torch.manual_seed(seed)
        for number in progress_bar(range(rounds), "Searching"):
            if number:
                pool = STRATEGIES[strategy](pool, rollouts, keep)
            pool = writer.continued(pool)
            scores = scorer(prompt, [solution.text for solution in pool])
            pool = [replace(solution, score=float(s)) for solution, s in zip(pool, scores, strict=True)]
            if all(solution.finished for solution in pool):
                break
    pool.sort(key=lambda solution: -solution.score)
    best = pool[0] if answer is None else _voted(pool, answer)
    return SearchResult(best.text, best.score, pool, writer.tokens, writer.prompt_tokens, writer.cost)


def _check(strategy: str, rollouts: int, keep: int, rounds: int, step_tokens: int) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}, but it must be one of {', '.join(STRATEGIES)}")
    if min(rollouts, keep, rounds, step_tokens) < 1 or rollouts % keep:
        raise ValueError(
            f"rollouts={rollouts}, keep={keep}, rounds={rounds}, step_tokens={step_tokens}: give numbers of at least "
            "1, and rollouts that keep divides"
        )


def _counts(strategy: str, counts: Sequence[int] | None, trained: int, most: int) -> list[int]:
    if strategy != "des":
        if counts is not None:
            raise ValueError(
                f"counts={counts!r} has no effect with strategy={strategy!r}; leave it out, or give 'des'"
            )
        return [trained]
    return sorted(counts or range(max(1, trained // 2), min(most, trained + -(-trained // 2)) + 1))


def _best_go_on(pool: list[Solution], rollouts: int, keep: int) -> list[Solution]:
    """Let the best solutions go on, in as many copies each as there are places; finished ones keep one place."""
    best = sorted(pool, key=lambda solution: -solution.score)[:keep]
    return [copy for solution in best for copy in [solution] * (1 if solution.finished else rollouts // keep)]


def _best_of_trees_go_on(pool: list[Solution], rollouts: int, keep: int) -> list[Solution]:
    trees = [[solution for solution in pool if solution.tree == tree] for tree in range(keep)]
    return [copy for tree in trees for copy in _best_go_on(tree, rollouts // keep, 1)]


STRATEGIES = {
    "des": _best_go_on,
    "beam": _best_go_on,
    "dvts": _best_of_trees_go_on,
    "best_of_n": lambda pool, rollouts, keep: pool,
}


def _voted(pool: list[Solution], answer: Callable[[str], str]) -> Solution:
    """Return the best solution of the answer with the largest total of exp(score)."""
    totals: dict[str, float] = {}
    scores = torch.tensor([solution.score for solution in pool], dtype=torch.float64).softmax(0).tolist()
    for solution, share in zip(pool, scores, strict=True):
        given = answer(solution.text)
        totals[given] = totals.get(given, 0.0) + share
    winner = max(totals, key=totals.get)
    return next(solution for solution in pool if answer(solution.text) == winner)


class _Writer:
    """Continues solutions by a step, in batches of equal numbers of active experts, and counts what that costs."""

    def __init__(self, model, tokenizer, prompt, step_tokens, step_ends, temperature, correct_scale) -> None:
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        self.step_ends, self.correct_scale = step_ends, correct_scale
        self.options = {"do_sample": True, "temperature": temperature, "max_new_tokens": step_tokens, "top_k": 0}
        if step_ends is not None:
            self.options |= {"stop_strings": [step_ends], "tokenizer": tokenizer}
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.tokens = self.prompt_tokens = self.cost = 0

    def continued(self, pool: list[Solution]) -> list[Solution]:
        """Continue all solutions that are not finished."""
        done = {i: solution for i, solution in enumerate(pool) if solution.finished}
        for count in sorted({solution.count for solution in pool if not solution.finished}):
            places = [i for i, s in enumerate(pool) if s.count == count and not s.finished]
            with active_experts(self.model, count, self.correct_scale):
                done |= dict(zip(places, self._step([pool[i] for i in places], count), strict=True))
        return [done[i] for i in range(len(pool))]

    def _step(self, solutions: list[Solution], count: int) -> list[Solution]:
        rows = [self.tokenizer(self.prompt + solution.text)["input_ids"] for solution in solutions]
        length, continued = max(map(len, rows)), []
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        made = self.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=self.pad, **self.options)
        self.prompt_tokens += sum(map(len, rows))
        for solution, new in zip(solutions, made[:, length:].tolist(), strict=True):
            ended = next((i for i, token in enumerate(new) if token in (self.tokenizer.eos_token_id, self.pad)), None)
            written = self.tokenizer.decode(new[:ended], skip_special_tokens=True)
            stopped = self.step_ends is not None and self.step_ends in written  # and then padded
            finished = ended is not None and not stopped
            used = len(new[:ended]) + finished
            self.tokens += used
            self.cost += used * count
            continued.append(replace(solution, text=solution.text + written, finished=finished))
        return continued
