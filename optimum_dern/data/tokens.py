"""Samples: token ids and masks of one sequence, from text or from token rows.

A sequence begins with one beginning-of-sequence token (BOS) if the tokenizer puts one in front of plain text, since
that is what the model sees in use: also where a chat template has written it already, and in windows of a stream.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks.batches import checked_ids, checked_mask


__all__ = [
    "Reading",
    "Sample",
    "added_bos",
    "sequences",
    "to_tokens",
    "windows",
]

DOCUMENTS = 64  # tokenized at once


class Sample(NamedTuple):
    """One unpadded sequence."""

    ids: Tensor  # (S,) int64
    mask: Tensor  # (S,) int64, 1 for tokens that count
    source: str  # name of the part of the data that it came from


@dataclass(frozen=True)
class Reading:
    """How data becomes samples: what is the same for all parts of it."""

    tokenizer: Any
    length: int  # tokens a sequence, at most
    seed: int = 0
    column: str = "text"
    made: Mapping[str, Callable[[int], list[Sample]]] = field(default_factory=dict)  # by name of the source

    @cached_property
    def bos(self) -> int | None:
        """The token that the tokenizer puts in front of plain text, if any."""
        return added_bos(self.tokenizer)

    def text_tokenizer(self, source: Any) -> Any:
        """Return the tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError(f"calibration data {str(source)!r} is text: give a tokenizer, or token ids instead")
        if not callable(self.tokenizer):
            raise TypeError(f"tokenizer={self.tokenizer!r:.80} is none; give one of transformers")
        return self.tokenizer


def added_bos(tokenizer: Any) -> int | None:
    """Return the id of the token that a tokenizer puts in front of plain text; None where it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = [] if bos is None else tokenizer("x")["input_ids"]
    return bos if len(ids) and ids[0] == bos else None


def to_tokens(row: Any, reading: Reading) -> tuple[Tensor, Tensor]:
    """Convert a text or a token row of one sequence.

    Args:
        row: text, token ids, or a mapping of `input_ids` and perhaps `attention_mask`.
        reading: gives the tokenizer and the length.

    Returns:
        Token ids and mask, each (S,) int64 on the CPU with S <= `reading.length`.

    Raises:
        ValueError: text without a tokenizer, text that is not Unicode, or ids or a mask that are none.
    """
    if isinstance(row, str):
        tokenizer = reading.text_tokenizer("text")
        if reason := _unencodable(row):
            raise ValueError(f"a text is not Unicode, and no tokenizer reads it: {reason}; mend it, or leave it out")
        written = reading.bos is not None and row.startswith(tokenizer.bos_token)
        special = {"add_special_tokens": False} if written else {}  # as after a chat template: they are there
        row = tokenizer(row, truncation=True, max_length=reading.length, **special)
    row = row if isinstance(row, Mapping) or hasattr(row, "data") and hasattr(row, "keys") else {"input_ids": row}
    ids = checked_ids(row["input_ids"])
    mask = row["attention_mask"] if "attention_mask" in row else torch.ones_like(ids)
    return ids[: reading.length], checked_mask(mask, ids)[: reading.length].long()


def sequences(row: Any) -> Iterator[Any]:
    """Yield the sequences of a token batch without their padding; a single sequence is yielded unchanged."""
    tokens = row if isinstance(row, Mapping) else {"input_ids": row}
    if not _is_batch(tokens["input_ids"]):
        yield row
        return
    ids = [checked_ids(sequence) for sequence in tokens["input_ids"]]
    masks = tokens.get("attention_mask", list(map(torch.ones_like, ids)))
    if not hasattr(masks, "__len__") or len(masks) != len(ids):
        raise ValueError(f"a batch of {len(ids)} rows of input_ids has another number of rows of attention_mask")
    for sequence, mask in zip(ids, masks, strict=True):
        mask = checked_mask(mask, sequence)
        real = mask.nonzero().flatten().tolist()
        if real:
            part = slice(real[0], real[-1] + 1)
            yield {"input_ids": sequence[part], "attention_mask": mask[part]}


def _is_batch(ids: Any) -> bool:
    """Return whether token ids are a batch of several sequences: a matrix, or a list of lists or vectors."""
    if isinstance(ids, Sequence):
        return len(ids) > 1 and (isinstance(ids[0], Sequence) or getattr(ids[0], "ndim", 0) > 0)
    return getattr(ids, "ndim", 0) > 1 and len(ids) > 1


def windows(documents: Iterable[str], reading: Reading, most: int | None = None) -> list[Tensor]:
    """Cut a stream of documents, each followed by EOS, into whole windows.

    Args:
        documents: texts; those that are blank do not count.
        reading: gives the tokenizer and the length.
        most: number of windows after which to stop reading; all by default.

    Returns:
        Windows of (`reading.length`,) int64; a single shorter one where there is not more.
    """
    stream: list[int] = []
    for ids in _document_tokens(iter(documents), reading):
        stream += ids
        if most is not None and len(stream) >= most * reading.length:
            break
    if reading.bos is not None and stream and stream[0] != reading.bos:
        stream.insert(0, reading.bos)
    found = list(_cut(stream, reading.length, reading.bos))
    if len(found) > 1 and len(found[-1]) < reading.length:
        found.pop()  # whole windows only, so that nothing needs padding
    return [torch.tensor(window, dtype=torch.int64) for window in found][:most]


def _document_tokens(documents: Iterator[str], reading: Reading) -> Iterator[list[int]]:
    """Yield every document's tokens with EOS behind them, and BOS in front where the tokenizer adds one."""
    tokenizer, bos = reading.text_tokenizer("text"), reading.bos
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = (text for text in documents if text.strip())
    for first in texts:
        batch = list(chain([first], islice(texts, DOCUMENTS - 1)))
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            if bos is None:
                yield ids + end
                continue
            # A token that is both stands between two documents once; `windows` puts it in front of the first.
            start = [] if [bos] == end or ids[:1] == [bos] else [bos]
            ids = ids[1:] if [bos] == end and ids[:1] == [bos] else ids
            yield start + ids + ([] if ids[-1:] == end else end)


def _cut(stream: list[int], length: int, bos: int | None) -> Iterator[list[int]]:
    """Yield the windows of a stream, each beginning with BOS, which is put in front where none is there."""
    position = 0
    while position < len(stream):
        lead = [] if bos is None or stream[position] == bos else [bos]
        step = max(length - len(lead), 1)
        yield (lead + stream[position : position + step])[:length]
        position += step


def _unencodable(text: str) -> str:
    """Return why a text has no UTF-8 form; "" where it has one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""
