"""Scorers of partial answers: the model's own likelihood, a reward model, a function of the text."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..evaluation.tasks.items import Request
from ..evaluation.tasks.scoring import score_requests


__all__ = ["Scorer", "likelihood", "reward_model", "verifier"]

Scorer = Callable[[str, Sequence[str]], Sequence[float]]  # a prompt and answers, complete or not, to their scores


def likelihood(model: Any, tokenizer: Any) -> Scorer:
    """Score answers by the geometric mean of their tokens' probabilities, with the trained number of experts.

    Args:
        model: a causal language model: the one that writes, or another.
        tokenizer: of the model.

    Returns:
        Scorer with scores from 0 to 1; an answer without text has 0.
    """

    def score(prompt: str, texts: Sequence[str]) -> list[float]:
        written = [text for text in dict.fromkeys(texts) if text.strip()]
        scores = score_requests(model, tokenizer, [Request(prompt, text) for text in written])
        means = {text: math.exp(each.log_likelihood / each.tokens) for text, each in zip(written, scores, strict=True)}
        return [means.get(text, 0.0) for text in texts]

    return score


def reward_model(model: Any, tokenizer: Any, batch_size: int = 8) -> Scorer:
    """Score answers with a classifier of transformers (`AutoModelForSequenceClassification`).

    Args:
        model: in evaluation mode; with one label its sigmoid is the score, with several the last one's probability.
        tokenizer: of the model, with a padding token.
        batch_size: answers at once.

    Returns:
        Scorer with scores from 0 to 1.
    """

    @torch.no_grad()
    def score(prompt: str, texts: Sequence[str]) -> list[float]:
        scores = []
        for start in range(0, len(texts), batch_size):
            batch = [prompt + text for text in texts[start : start + batch_size]]
            inputs = tokenizer(batch, padding=True, return_tensors="pt").to(model.device)
            logits = model(**inputs).logits.float()  # (batch, labels)
            rewards = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]
            scores += rewards.tolist()
        return scores

    return score


def verifier(check: Callable[[str, str], float]) -> Scorer:
    """Score answers with a function of the prompt and of one answer, such as a test of what is written so far."""
    return lambda prompt, texts: [float(check(prompt, text)) for text in texts]
