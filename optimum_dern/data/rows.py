"""Samples from rows: those that hold something are drawn at random, and only those drawn are tokenized."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from .chat import Chat, as_chat, holds_messages, is_blank, render, row_content
from .files import FILE_TYPES
from .sources import is_stream
from .tokens import Reading, Sample, sequences, to_tokens


__all__ = ["SHUFFLE_BUFFER", "draw", "row_samples"]

logger = getLogger(__name__)
SHUFFLE_BUFFER = 1000  # rows of a stream, besides those wanted, that a draw looks at; the default of `datasets`


def row_samples(dataset: Any, count: int, reading: Reading, name: str) -> list[Sample]:
    """Draw samples from rows, with one warning that counts those that are null or empty.

    Args:
        dataset: an iterable of rows: texts, token rows, or mappings of columns.
        count: at most this many.
        reading: how a row becomes a sample.
        name: of the data, in the samples and in the warning.

    Raises:
        ValueError: data or a row of an unsupported form.
    """
    rows, seen = _drawn(dataset, count, reading)
    if seen["empty"]:
        logger.warning("%s: %d of %d rows read are null or empty and left out", name, seen["empty"], seen["rows"])
    samples = []
    for row in rows:
        if isinstance(row, Chat):
            row = render(row, reading.text_tokenizer(name))
        samples.append(Sample(*to_tokens(row, reading), name))
    return [sample for sample in samples if len(sample.ids)]


def _drawn(dataset: Any, count: int, reading: Reading) -> tuple[list, Counter]:
    seen: Counter[str] = Counter()
    if is_stream(dataset):
        dataset = dataset.shuffle(seed=reading.seed, buffer_size=SHUFFLE_BUFFER)
        return list(islice(_usable_rows(dataset, reading.column, seen), count)), seen
    rows = _usable_rows(dataset, reading.column, seen)
    if not hasattr(dataset, "__len__"):  # may be endless
        rows = islice(rows, count + SHUFFLE_BUFFER)
    return draw(list(rows), count, reading.seed), seen


def _usable_rows(dataset: Any, column: str, seen: Counter) -> Iterator[Any]:
    """Yield the rows of a dataset as texts, chats or token sequences, and count them and the empty ones."""
    several = hasattr(dataset, "__iter__") and getattr(dataset, "ndim", 1) > 0
    if isinstance(dataset, bytes | type) or not several:
        raise ValueError(
            f"calibration data of type {type(dataset).__name__} is not supported; give a list of str, a list of token "
            f"dicts, a datasets.Dataset, a path ({', '.join(FILE_TYPES)}), a Hub dataset (owner/name) or the name of "
            "a known one, such as 'general' or 'c4'"
        )
    for row in dataset:
        seen["rows"] += 1
        if isinstance(row, Mapping) and "input_ids" not in row:
            row = row_content(row, column)
        elif holds_messages(row):
            row = as_chat(row, "messages")
        if _is_empty(row):
            seen["empty"] += 1
        elif isinstance(row, str | Chat):
            yield row
        else:
            _check_token_row(row)
            yield from sequences(row)


def _check_token_row(row: Any) -> None:
    found = type(row).__name__
    if isinstance(row, Mapping) and "input_ids" not in row:
        found = f"{found} of {', '.join(map(repr, row))}"
    elif isinstance(row, Sequence) and isinstance(row[0], str | Mapping):
        found = f"{found} of {type(row[0]).__name__}"
    elif isinstance(row, Mapping | Tensor | Sequence) and not isinstance(row, bytes):
        return
    raise ValueError(f"a calibration row is a {found}; give text, token ids or a dict of them")


def _is_empty(row: Any) -> bool:
    tokens = row.get("input_ids", row) if isinstance(row, Mapping) else row
    if isinstance(tokens, Tensor):
        return not tokens.numel()
    return is_blank(tokens) or (isinstance(tokens, Sequence | Mapping) and not tokens)


def draw(rows: list, count: int, seed: int) -> list:
    """Draw `count` rows at random, in their original order; all if there are not more."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in chosen.sort().values.tolist()]
