"""Calibration text that a language model writes itself, token by token (self-calibration, arXiv 2410.17170)."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...machine.progress import progress_bar
from ...models.cache import cache_of
from .conversations import Turns


__all__ = ["Conversation", "Document", "Writer", "write_sequences"]

BATCH = 32  # sequences written at once


class Writer(Protocol):
    """Supplies the tokens of one sequence: forced ones, such as a chat template's, and those that the model draws."""

    def first(self) -> int:
        """Return the token that the sequence begins with."""

    def next(self, drawn: int) -> int:
        """Return the following token, which is the one drawn from the model where none is forced."""


class Document:
    """Writer of plain text that begins with given tokens; documents after it begin with the BOS token, if any.

    Text from a random first token covers more of what a model knows than text from the separator of documents, which
    is of the kinds whose documents are most, not of those that have most text.
    """

    def __init__(self, opening: Sequence[int], bos: int | None = None, ends: Sequence[int] = ()) -> None:
        self.forced, self.bos, self.ends = list(opening), bos, ends

    def first(self) -> int:
        return self.forced.pop(0)

    def next(self, drawn: int) -> int:
        if self.forced:
            return self.forced.pop(0)
        if self.bos is not None and drawn in self.ends:
            self.forced.append(self.bos)
        return drawn


class Conversation:
    """Writer of a conversation, of which the model writes the user's turns, too (Magpie, arXiv 2406.08464)."""

    def __init__(self, turns: Turns, longest: int) -> None:
        self.turns, self.longest = turns, longest
        self.forced, self.asking, self.words = list(turns.opening), True, 0

    def first(self) -> int:
        return self.forced.pop(0)

    def next(self, drawn: int) -> int:
        if not self.forced and (drawn in self.turns.ends or self.words == self.longest):
            self.forced = list(self.turns.answer if self.asking else self.turns.question)
            self.asking, self.words = not self.asking, 0
        if self.forced:
            return self.forced.pop(0)
        self.words += 1
        return drawn


@torch.no_grad()
def write_sequences(
    model: Any,
    writers: Sequence[Writer],
    length: int,
    seed: int,
    vocabulary: int,
    batch_size: int = BATCH,
) -> list[Tensor]:
    """Sample sequences from a model with a key-value cache.

    Args:
        model: a causal language model in evaluation mode.
        writers: one for each sequence.
        length: tokens of each sequence.
        seed: of the draw; the global random state stays as it is.
        vocabulary: tokens with a higher id are never drawn; they have rows in the model, but no text.
        batch_size: sequences written at once.

    Returns:
        One tensor (length,) int64 for each writer.
    """
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    batches = [writers[start : start + batch_size] for start in range(0, len(writers), batch_size)]
    written = []
    steps = iter(progress_bar(range(len(batches) * (length - 1)), "Writing calibration text"))
    for batch in batches:
        tokens = torch.tensor([[writer.first()] for writer in batch], device=device)  # (batch, 1)
        cache = {}
        for _ in range(1, length):
            next(steps)
            output = model(input_ids=tokens[:, -1:] if cache else tokens, use_cache=True, **cache)
            cache = cache_of(output)  # of a model without one, the whole sequence is run again
            logits = output.logits[:, -1, :vocabulary].float()
            if not logits.isfinite().all():
                raise ValueError(
                    "the model predicts NaN or infinity, so it cannot write calibration text; check its weights, "
                    "or try another dtype, such as bfloat16"
                )
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten().tolist()
            following = [writer.next(token) for writer, token in zip(batch, drawn, strict=True)]
            tokens = torch.cat([tokens, torch.tensor(following, device=device).unsqueeze(1)], 1)
        written += tokens.cpu()
    next(steps, None)  # closes the progress bar
    return written
