"""Search for an answer step by step, with several numbers of active experts (arXiv 2509.22572), and its baselines."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..machine.progress import progress_bar
from ..machine.torch_state import GPUS, devices_of, evaluation_mode
from .active import active_experts, trained_counts
from .candidates import Candidate, Cost, SearchResult
from .scorers import Scorer
from .steps import Sampling, extend, prompt_tokens
from .strategies import STRATEGIES, best_answer, voted_answer


__all__ = ["expert_search"]


def expert_search(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    scorer: Scorer,
    strategy: str = "des",
    counts: Sequence[int] | None = None,
    rollouts: int = 12,
    keep: int | None = None,
    rounds: int = 16,
    step: str | None = "\n\n",
    step_tokens: int = 128,
    temperature: float = 0.8,
    answer: Callable[[str], Hashable] | None = None,
    correct_scale: bool = True,
    seed: int = 0,
) -> SearchResult:
    """Write an answer by searching over partial answers and the numbers of active experts that continue them.

    N rollouts begin, as many with each number of experts.  In every round each writes one step and is scored; the best
    M live on, and N / M copies of each go on with its number of experts.  Answers that the model has ended are final.

    Args:
        model: a causal MoE language model of transformers; it and its config stay as they are.
        tokenizer: of the model.
        prompt: text; for a chat model as `apply_chat_template(..., tokenize=False)` gives it.
        scorer: of partial and of final answers; see `search.scorers`.
        strategy: "des", Dynamic Experts Search; "beam", the same with one number of experts; "dvts", M trees which
            each keep their own best; "best_of", N whole answers.
        counts: numbers of experts a token; by default the trained k for the baselines, and for DES k - k/4 (at least
            1 less), k and as much more, so that N rollouts cost as much as with k.
        rollouts: N, a multiple of the number of counts and of M.
        keep: M; by default N / 4.
        rounds: at most; answers that are not ended then count only if none is.
        step: text that ends a step; None for steps of `step_tokens` tokens.
        step_tokens: tokens a step, at most.
        temperature: of the draw, from the whole distribution; 0 takes the most probable token.
        answer: what two texts have in common that give the same answer: then the answer whose texts' scores sum up
            highest wins, else the text with the highest score.
        correct_scale: as in `active_experts`.
        seed: of the draw; the global random state stays as it is.

    Returns:
        The answer, all other final answers, the numbers of experts kept in every round, and the cost.

    Raises:
        ValueError: a number that does not fit, experts that the model cannot use, or scores that are no numbers.

    Source: Dynamic Experts Search, arXiv 2509.22572; DVTS: Beeching et al., Scaling test-time compute, 2024.
    """
    counts = _counts(model, strategy, counts, correct_scale)
    whole = strategy == "best_of"
    keep = rollouts if whole else keep or max(1, rollouts // 4)
    _check(rollouts, keep, len(counts), rounds, step_tokens)
    sampling = Sampling(None if whole else step, step_tokens * (rounds if whole else 1), temperature, correct_scale)
    cost, read, answers, kept = Cost(), prompt_tokens(tokenizer, prompt), [], []
    active = [Candidate(counts[i * len(counts) // rollouts], i * keep // rollouts) for i in range(rollouts)]
    gpus = [device for device in devices_of(model) if device.type in GPUS]
    with torch.random.fork_rng(gpus, device_type=gpus[0].type if gpus else "cuda"), evaluation_mode(model):
        torch.manual_seed(seed)
        for _ in progress_bar(range(1 if whole else rounds), "Searching"):
            written = _scored(scorer, prompt, extend(model, tokenizer, read, active, sampling, cost))
            cost.scored += sum(len(read) + len(candidate.tokens) for candidate in written)
            answers += [candidate for candidate in written if candidate.done]
            best = STRATEGIES[strategy](written, keep)
            kept.append(tuple(candidate.count for candidate in best))
            active = [each for each in best if not each.done for _ in range(rollouts // keep)]
            if not active:
                break
    answers = sorted(answers or written, key=lambda candidate: -candidate.score)
    found = best_answer(answers) if answer is None else voted_answer(answers, answer)
    return SearchResult(found.text, found.score, found.count, tuple(answers), tuple(kept), strategy, seed, cost)


def _counts(model: Any, strategy: str, counts: Sequence[int] | None, correct_scale: bool) -> list[int]:
    """Check the strategy and the numbers of experts, or choose them."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}, but it must be one of {', '.join(STRATEGIES)}")
    trained = max(trained_counts(model))
    if counts is None:
        aside = max(1, trained // 4)
        several = [count for count in (trained - aside, trained, trained + aside) if count]
        counts = several if strategy == "des" else [trained]
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"counts={list(counts)}, but they must be different numbers of experts, at least one")
    for count in counts:
        with active_experts(model, count, correct_scale=correct_scale):
            continue
    return list(counts)


def _check(rollouts: int, keep: int, counts: int, rounds: int, step_tokens: int) -> None:
    """Refuse sizes of a search that do not fit together."""
    if min(rollouts, keep, rounds, step_tokens) < 1:
        raise ValueError("rollouts, keep, rounds and step_tokens must be 1 or more")
    for number, what in ((counts, "counts"), (keep, "candidates that are kept")):
        if rollouts % number:
            raise ValueError(
                f"rollouts={rollouts} cannot be shared evenly by {number} {what}; give a multiple of {number}"
            )


def _scored(scorer: Scorer, prompt: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give every candidate the score of its text."""
    scores = [float(score) for score in scorer(prompt, [candidate.text for candidate in candidates])]
    if len(scores) != len(candidates) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"the scorer gave {scores} for {len(candidates)} answers; it must give one finite number for each"
        )
    return [replace(candidate, score=score) for candidate, score in zip(candidates, scores, strict=True)]
