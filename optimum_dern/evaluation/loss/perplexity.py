"""Loss on held-out text in nats per token, weighted by tokens, with its standard error.

The mean over all predicted tokens, not the mean of batch means: sequences of different lengths count by their tokens.
The standard error treats sequences as independent draws and tokens within one as dependent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.batches import load_batches
from ...data.files import data_files
from ...models.context_length import bounded_length, context_length
from ...results.estimate import json_error
from .logits import batch_logits
from .metrics import mean_and_error, perplexity_of


__all__ = [
    "TextLoss",
    "evaluate_loss",
    "evaluate_texts",
    "evaluation_length",
    "load_texts",
    "sequence_losses",
    "summarise",
]

logger = getLogger(__name__)
LONGEST = 2048  # tokens of a sequence, unless another length is asked for
ALL = 1 << 62  # samples: every one


@dataclass(frozen=True)
class TextLoss:
    """Loss on one text."""

    loss: float  # nats per predicted token
    standard_error: float  # nan for a single sequence
    tokens: int  # predicted
    sequence_length: int | None = None  # tokens of the longest sequence: with fewer before them, tokens cost more

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        facts = asdict(self) | {"standard_error": json_error(self.standard_error)}
        return facts | {"perplexity": self.perplexity}


@torch.no_grad()
def evaluate_loss(model: Any, batches: Sequence[dict]) -> TextLoss:
    """Next-token loss of a causal language model.

    Args:
        model: in any mode; it is evaluated without dropout and put back.  Or a `StreamedCheckpoint`.
        batches: `input_ids` and `attention_mask`, each (batch, sequence); padding is neither predicted nor read.

    Returns:
        The loss over all predicted tokens.

    Raises:
        ValueError: nothing to predict.
    """
    return evaluate_texts(model, {"text": batches})["text"]


def sequence_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[list[float], list[float]]:
    """Sum of the next-token losses, and number of predicted tokens, of every sequence of a batch.

    Args:
        logits: (batch, sequence, vocabulary).
        ids: (batch, sequence).
        mask: (batch, sequence), zero for padding, which is neither predicted nor read.
    """
    rows = zip(logits[:, :-1], ids[:, 1:], strict=True)  # one at a time: float32 copies are large
    losses = torch.stack([cross_entropy(row.float(), targets, reduction="none") for row, targets in rows])
    predicted = (mask[:, 1:] * mask[:, :-1]).double()  # (B, S - 1)
    return (losses.double() * predicted).sum(1).tolist(), predicted.sum(1).tolist()


def summarise(batches: Iterable[tuple[list[float], list[float]]]) -> TextLoss:
    """The loss over all tokens from the `sequence_losses` of all batches.

    Raises:
        ValueError: nothing to predict.
    """
    sums, counts = [], []
    for batch_sums, batch_counts in batches:
        sums += batch_sums
        counts += batch_counts
    tokens = sum(counts)
    if not tokens:
        raise ValueError("there is no token to predict; give sequences of at least two tokens")
    return TextLoss(*mean_and_error(sums, counts), int(tokens), int(max(counts)) + 1)


def evaluation_length(config: Any, asked: int | None = None) -> int:
    """Tokens of the sequences that a text is cut into: one number for a model, so that all its losses compare.

    Args:
        config: of the model; of several that are compared, the original's.
        asked: another length than the default, which is what the model is made for, at most 2,048.

    Returns:
        The length; what the model is made for where more is asked.

    Raises:
        ValueError: a length below 2.
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
    source: Any, tokenizer: Any, sequence_length: int, batch_size: int = 8, limit: int | None = None
) -> dict[str, list[dict]]:
    """Evaluation batches by name: a folder gives one entry a file, anything else one entry.

    Args:
        source: any form of data that calibration takes.
        tokenizer: of the model.
        sequence_length: tokens a sequence.
        batch_size: sequences a forward pass.
        limit: at most this many sequences an entry, drawn at random, always the same ones; all by default.
    """
    sources = {Path(source).stem if isinstance(source, str | Path) else "text": source}
    if isinstance(source, str | Path) and Path(source).is_dir():
        sources = {file.stem: file for file in data_files(Path(source))}
    options = {"num_samples": limit or ALL, "sequence_length": sequence_length, "batch_size": batch_size}
    return {name: load_batches(data, tokenizer, **options) for name, data in sources.items()}


@torch.no_grad()
def evaluate_texts(model: Any, texts: Mapping[str, Sequence[dict]]) -> dict[str, TextLoss]:
    """`evaluate_loss` of every entry of `load_texts`; a `StreamedCheckpoint` is read once for all of them."""
    batches = [batch for text in texts.values() for batch in text]
    losses = []
    for batch, logits in zip(batches, batch_logits(model, batches), strict=True):
        ids, mask = (batch[name].to(logits.device) for name in ("input_ids", "attention_mask"))
        losses.append(sequence_losses(logits, ids, mask))
    remaining = iter(losses)
    return {name: summarise([next(remaining) for _ in text]) for name, text in texts.items()}
