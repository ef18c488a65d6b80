"""Log-likelihoods of continuations after their contexts, in batches sorted by length to avoid padding.

Tokens are split as in lm-eval: context and continuation are encoded together, and the tokens after as many as the
context alone has are the continuation's; spaces at the end of a context belong to the continuation.  Requests that
differ only in their last token (letters, yes and no) share one row of a forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data.batches import by_length
from ...models.context_length import context_length
from ..loss.logits import batch_logits
from .items import Request


__all__ = ["BATCH_TOKENS", "Score", "encode_requests", "score_requests"]

BATCH_TOKENS = 4096  # tokens of a batch, including padding


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, and whether greedy decoding gives it."""

    log_likelihood: float  # nats, summed over its tokens
    greedy: bool  # whether each of its tokens is the most probable one
    tokens: int


def score_requests(
    model: Any, tokenizer: Any, requests: Sequence[Request], batch_tokens: int = BATCH_TOKENS
) -> list[Score]:
    """Compute the log-likelihoods of continuations.

    Args:
        model: a causal language model, or a `StreamedCheckpoint`.
        tokenizer: of the model.
        requests: contexts and continuations; contexts that are too long are cut at their beginning.
        batch_tokens: tokens of a batch, including padding; a longer sequence is a batch of its own.

    Returns:
        One score per request, in their order.

    Raises:
        ValueError: a continuation has no token, or more than the model's context length.
    """
    encoded = encode_requests(requests, tokenizer, context_length(model.config))
    sharing: dict[tuple[int, ...], list[int]] = {}
    for position, (ids, _) in enumerate(encoded):
        sharing.setdefault(tuple(ids[:-1]), []).append(position)
    rows = list(sharing)
    batches = [[rows[i] for i in batch] for batch in by_length([len(row) for row in rows], batch_tokens)]
    inputs = [_padded(batch) for batch in batches]
    keep = [max(_wanted(encoded, sharing, row, len(batch[0])) for row in batch) for batch in batches]
    scores: dict[int, Score] = {}
    for batch, logits in zip(batches, batch_logits(model, inputs, keep), strict=True):
        left_out = len(batch[0]) - logits.shape[1]
        for row, row_logits in zip(batch, logits, strict=True):
            for position in sharing[row]:
                ids, count = encoded[position]
                end = len(row) - left_out
                scores[position] = _score(row_logits[end - count : end], ids[-count:])
    return [scores[position] for position in range(len(requests))]


def encode_requests(
    requests: Sequence[Request], tokenizer: Any, max_length: int | None = None
) -> list[tuple[list[int], int]]:
    """Encode requests as the tokens of context and continuation, and the number of tokens of the continuation.

    Args:
        requests: contexts and continuations.
        tokenizer: special tokens that it adds at the beginning are kept.
        max_length: longest input; the last token is only predicted, so there may be one more.

    Raises:
        ValueError: a continuation has no token, or more than `max_length`.
    """
    contexts = [request.context.rstrip() for request in requests]
    texts = [request.context + request.continuation for request in requests]
    distinct = list(dict.fromkeys(context for context in contexts if context))
    lengths = {context: len(ids) for context, ids in zip(distinct, _encode(distinct, tokenizer), strict=True)}
    encoded = []
    for request, context, text, ids in zip(requests, contexts, texts, _encode(texts, tokenizer), strict=True):
        ids = ids if context else _after_prefix(text, tokenizer)
        count = len(ids) - (lengths[context] if context else 1)
        if count < 1:
            raise ValueError(f"the continuation {request.continuation!r:.60} has no token of its own")
        if max_length is not None and count > max_length:
            raise ValueError(
                f"the continuation {request.continuation!r:.60} has {count} tokens, but the model reads {max_length}"
            )
        encoded.append((ids if max_length is None else ids[-(max_length + 1) :], count))
    return encoded


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def _after_prefix(text: str, tokenizer: Any) -> list[int]:
    """Encode a text without context after a BOS token, or EOS where there is none."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin a text without context with")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if ids[:1] == [prefix] else [prefix, *ids]


def _padded(rows: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Pad a batch on the right, which does not affect the results of causal models."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    parts = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
    return {name: pad_sequence(part, batch_first=True) for name, part in parts.items()}


def _wanted(encoded: list, sharing: dict, row: tuple[int, ...], width: int) -> int:
    """Return how many last positions of a padded row are needed for its continuations."""
    return width - len(row) + max(encoded[position][1] for position in sharing[row])


def _score(logits: Tensor, targets: list[int]) -> Score:
    logs = logits.float().log_softmax(-1)  # (continuation, V); one continuation at a time
    index = torch.tensor(targets, device=logs.device)
    own = logs.gather(1, index.unsqueeze(1)).double().sum().item()
    if math.isnan(own):
        raise ValueError("the model gives NaN; load it in float32 or bfloat16, and check its weights")
    return Score(own, bool((logits.argmax(-1) == index).all()), len(targets))
