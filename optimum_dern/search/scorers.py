"""Scorers of partial solutions: functions of a prompt and texts that give each a score, larger is better."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..machine.torch_state import evaluation_mode


__all__ = ["Scorer", "likelihood_scorer", "reward_scorer"]

Scorer = Callable[[str, Sequence[str]], Sequence[float]]


def likelihood_scorer(model: nn.Module, tokenizer: Any) -> Scorer:
    """Score texts by the mean log-probability of their tokens after the prompt.

    Args:
        model: a causal language model, such as the one that writes them, with its trained number of experts.
        tokenizer: its own.
    """

    @torch.no_grad()
    def score(prompt: str, texts: Sequence[str]) -> list[float]:
        before, scores = len(tokenizer(prompt)["input_ids"]), []
        with evaluation_mode(model):
            for text in texts:
                ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"].to(model.device)  # (1, S)
                own = ids[0, before:]
                logits = model(input_ids=ids, use_cache=False).logits[0, before - 1 : -1].float()
                found = logits.log_softmax(1).gather(1, own.unsqueeze(1))
                scores.append(found.mean().item() if len(own) else -torch.inf)
        return scores

    return score


def reward_scorer(model: str | nn.Module, tokenizer: Any = None, device: str | None = None) -> Scorer:
    """Score texts by a reward model of transformers, a sequence classifier with one output.

    Args:
        model: its folder or Hub id, or the model.
        tokenizer: its own; by default from the same place.
        device: to compute on, for a folder or Hub id.

    Raises:
        ValueError: a classifier with several outputs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    if not isinstance(model, nn.Module):
        model = AutoModelForSequenceClassification.from_pretrained(model).to(device or "cpu")
    if model.config.num_labels != 1:
        raise ValueError(f"the reward model has {model.config.num_labels} outputs; give one with a single score")

    @torch.no_grad()
    def score(prompt: str, texts: Sequence[str]) -> list[float]:
        with evaluation_mode(model):
            inputs = [tokenizer(prompt + text, return_tensors="pt").to(model.device) for text in texts]
            return [model(**one).logits[0, 0].item() for one in inputs]

    return score
