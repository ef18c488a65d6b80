"""Which candidates of a round live on: a function for each kind of search, and the vote among final answers."""

from collections.abc import Callable, Hashable, Sequence

from .candidates import Candidate


__all__ = ["STRATEGIES", "best_answer", "keep_all", "keep_best", "keep_best_of_trees", "voted_answer"]


def keep_best(candidates: Sequence[Candidate], keep: int) -> list[Candidate]:
    """Keep those with the highest scores; among equal ones the first."""
    return sorted(candidates, key=lambda candidate: -candidate.score)[:keep]


def keep_best_of_trees(candidates: Sequence[Candidate], keep: int) -> list[Candidate]:
    """Keep the best of each tree, so that a tree never takes another's place."""
    trees = sorted({candidate.tree for candidate in candidates})
    return [keep_best([each for each in candidates if each.tree == tree], 1)[0] for tree in trees]


def keep_all(candidates: Sequence[Candidate], keep: int) -> list[Candidate]:
    """Keep every one."""
    return list(candidates)


STRATEGIES: dict[str, Callable[[Sequence[Candidate], int], list[Candidate]]] = {
    "des": keep_best,  # Dynamic Experts Search: several numbers of experts compete for the places
    "beam": keep_best,  # the same with one number
    "dvts": keep_best_of_trees,  # diverse verifier tree search: as many trees as are kept
    "best_of": keep_all,  # whole answers, of which the best is taken at the end
}


def best_answer(answers: Sequence[Candidate]) -> Candidate:
    """Return the answer with the highest score; among equal ones the first."""
    return keep_best(answers, 1)[0]


def voted_answer(answers: Sequence[Candidate], extract: Callable[[str], Hashable]) -> Candidate:
    """Return the best of the answers that agree, where their scores together are the highest.

    Args:
        answers: with scores that are not negative.
        extract: what two texts have in common that give the same answer.

    Raises:
        ValueError: a score is negative, and thus no weight.
    """
    weights: dict[Hashable, float] = {}
    for candidate in answers:
        if candidate.score < 0:
            raise ValueError(f"a score is {candidate.score}, which is no weight of a vote; let scores be 0 or greater")
        key = extract(candidate.text)
        weights[key] = weights.get(key, 0.0) + candidate.score
    chosen = max(weights, key=weights.__getitem__)
    return best_answer([candidate for candidate in answers if extract(candidate.text) == chosen])
