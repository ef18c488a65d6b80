"""Loss on held-out text in nats per token, a mean over all tokens, with its standard error.

It is not a mean of batch means: sequences of different lengths are weighted by their tokens.  The standard error
treats sequences as independent, and the tokens of one sequence as dependent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.batches import is_endless, largest_batch, load_batches
from ...data.files import data_files, data_name
from ...data.sources import find_repository
from ...models.context_length import bounded_length, context_length
from ...results.estimate import json_error
from .logits import batch_logits
from .metrics import mean_and_error, perplexity_of


__all__ = ["TextLoss", "evaluate_loss", "evaluate_texts", "evaluation_length", "load_texts"]

logger = getLogger(__name__)
LONGEST = 2048  # largest default of the sequence length
ALL = 1 << 62  # as the number of samples: all of them
OF_A_STREAM = 512  # sequences of data that has no end, or that would have to be downloaded whole


@dataclass(frozen=True)
class TextLoss:
    """Loss of a model on one text, with its standard error."""

    loss: float  # nats per predicted token
    standard_error: float  # nan for a single sequence
    tokens: int  # number of predicted tokens
    sequence_length: int | None = None  # tokens of the longest sequence; losses compare at the same length only

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def to_dict(self) -> dict[str, float | None]:
        """Convert to a dict for JSON."""
        facts = asdict(self) | {"standard_error": json_error(self.standard_error)}
        return facts | {"perplexity": self.perplexity}


@torch.no_grad()
def evaluate_loss(model: Any, batches: Sequence[dict]) -> TextLoss:
    """Measure the next-token loss of a causal language model.

    Args:
        model: runs in evaluation mode and is then set back; or a `StreamedCheckpoint`.
        batches: `input_ids` and `attention_mask`, each (batch, sequence); padding is neither predicted nor read.

    Returns:
        The loss over all predicted tokens.

    Raises:
        ValueError: there is no token to predict.
    """
    return evaluate_texts(model, {"text": batches})["text"]


def _sequence_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[list[float], list[float]]:
    """Compute the sum of the next-token losses and the number of predicted tokens of every sequence of a batch."""
    rows = zip(logits[:, :-1], ids[:, 1:], strict=True)  # one at a time: float32 copies are large
    losses = torch.stack([cross_entropy(row.float(), targets, reduction="none") for row, targets in rows])
    predicted = (mask[:, 1:] * mask[:, :-1]).double()  # (B, S - 1)
    return (losses.double() * predicted).sum(1).tolist(), predicted.sum(1).tolist()


def _summarised(batches: Iterable[tuple[list[float], list[float]]]) -> TextLoss:
    """Compute the loss over all tokens from the `_sequence_losses` of all batches."""
    sums, counts = [], []
    for batch_sums, batch_counts in batches:
        sums += batch_sums
        counts += batch_counts
    tokens = sum(counts)
    if not tokens:
        raise ValueError("there is no token to predict; give sequences of at least two tokens")
    return TextLoss(*mean_and_error(sums, counts), int(tokens), int(max(counts)) + 1)


def evaluation_length(config: Any, asked: int | None = None) -> int:
    """Choose the length of evaluation sequences, the same for all commands, so that a model's losses are comparable.

    Args:
        config: of the model; the original's where several models are compared.
        asked: length given by the user; the default is the model's context length, at most 2,048.

    Returns:
        The length in tokens, at most the model's context length.

    Raises:
        ValueError: the length is below 2.
    """
    if asked is not None and asked < 2:
        raise ValueError(f"the sequence length for evaluation is {asked}; give at least 2 tokens, one to predict")
    length = bounded_length(config, LONGEST if asked is None else asked)
    if asked is not None and length < asked:
        logger.warning(
            "sequences of %d tokens are asked for, but the model is made for %d, as its config says: these are taken",
            asked,
            context_length(config),
        )
    return length


def load_texts(
    source: Any, tokenizer: Any, sequence_length: int, batch_size: int | None = None, limit: int | None = None
) -> dict[str, list[dict]]:
    """Load evaluation batches by name of the text: one entry per file of a folder, else a single entry.

    Args:
        source: data in any form that calibration takes.
        tokenizer: of the model.
        sequence_length: tokens per sequence.
        batch_size: sequences per forward pass; by default as many of like lengths as have some 8,000 tokens, fewer
            where the logits of a large vocabulary would take much memory.
        limit: at most this many sequences per entry, drawn at random with a fixed seed; by default all, of datasets
            on the Hub and other streams 512.
    """
    if limit is None and is_endless(source):
        logger.warning("%d sequences of the stream are taken; set a limit for another number", OF_A_STREAM)
        limit = OF_A_STREAM
    options = {
        "num_samples": ALL if limit is None else limit,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
    }
    options["batch_tokens"] = largest_batch(1 if tokenizer is None else len(tokenizer))
    return {name: load_batches(data, tokenizer, **options) for name, data in _by_name(source).items()}


def _by_name(source: Any) -> dict[str, Any]:
    """The texts of a source: the files of a folder, or itself."""
    if not isinstance(source, str | Path):
        return {"text": source}
    path = Path(source).expanduser()
    if find_repository(source):
        return {path.name if path.is_dir() else str(source): source}
    files = data_files(path) if path.is_dir() else [path]
    names = [data_name(file) for file in files]
    # Files whose names differ in their type alone keep it.
    names = [file.name if names.count(name) > 1 else name for name, file in zip(names, files, strict=True)]
    return dict(zip(names, files if path.is_dir() else [source], strict=True))


@torch.no_grad()
def evaluate_texts(model: Any, texts: Mapping[str, Sequence[dict]]) -> dict[str, TextLoss]:
    """Measure the loss on every text of `load_texts`; a `StreamedCheckpoint` is read once for all of them."""
    batches = [batch for text in texts.values() for batch in text]
    losses = []
    for batch, logits in zip(batches, batch_logits(model, batches), strict=True):
        ids, mask = (batch[name].to(logits.device) for name in ("input_ids", "attention_mask"))
        losses.append(_sequence_losses(logits, ids, mask))
    remaining = iter(losses)
    return {name: _summarised([next(remaining) for _ in text]) for name, text in texts.items()}
