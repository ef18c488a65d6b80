"""The losses whose gradients measure neurons, of one sequence at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


__all__ = ["LOSSES", "Loss", "next_token_loss", "teacher_loss"]

TOP_LOGITS = 8  # of the teacher, in the distillation loss of SlimMoE


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the next-token loss of one sequence, summed over its predicted tokens.

    Args:
        logits: (1, S, vocabulary).
        ids: (1, S).
        mask: (1, S), of real tokens.
    """
    losses = cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")  # (S - 1,)
    return losses[(mask[0, 1:] & mask[0, :-1]).bool()].sum()


def teacher_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the distillation loss of a model from itself on its eight largest logits, summed over real tokens.

    The teacher's probabilities are those of its largest logits alone, the student's those of the whole vocabulary, so
    that the gradient is not zero (SlimMoE, arXiv 2506.18349, where only the loss is named).

    Args:
        logits: (1, S, vocabulary).
        ids: (1, S), not used.
        mask: (1, S), of real tokens.
    """
    logits = logits[0][mask[0].bool()].float()  # (n, vocabulary)
    values, index = logits.detach().topk(min(TOP_LOGITS, logits.shape[1]), dim=1)  # (n, 8)
    return -(values.softmax(1) * log_softmax(logits, 1).gather(1, index)).sum()


LOSSES = {"next token": next_token_loss, "teacher": teacher_loss}


@dataclass(frozen=True)
class Loss:
    """The sequences whose loss is differentiated, and the loss."""

    inputs: Sequence[dict]  # `input_ids` and `attention_mask`, each (batch, sequence), of each micro-batch
    masks: Sequence[Tensor]  # per micro-batch, (batch, sequence) bool, True for a real token
    of: str  # one of `LOSSES`
