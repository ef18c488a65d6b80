"""Load calibration data of any supported form into padded token batches.

    a list of str, a datasets.Dataset, .jsonl .json .parquet   one sample per row, cut at `sequence_length`
    .txt                                                       one stream of text, cut into whole windows
    a list of token dicts, .pt                                 as they are, cut at `sequence_length`
    token dicts of several rows                                their rows without padding, cut likewise
    "wikitext2", "c4", "c4-new"                                random windows, by optimum's own loaders (downloads)
    a folder                                                   all its files, in equal shares
    {source: weight}                                           a mix: `num_samples` is shared in proportion

If a source of a folder or a mix has too few samples, the others provide the rest.
Samples are drawn with a local generator; no global random state changes.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..machine.torch_state import plain_torch
from ..paths import check_utf8
from ..results.description import describe_dataset
from .files import FILE_TYPES, data_files, listed, read_rows, read_text


__all__ = [
    "NAMED_DATASETS",
    "check_masks",
    "check_source",
    "holds_text",
    "load_batches",
    "load_samples",
    "read_mapping",
]

logger = getLogger(__name__)
NAMED_DATASETS = ("wikitext2", "c4", "c4-new")
SEPARATOR = "<|endoftext|>"  # a line of its own between the documents of a .txt file


@plain_torch()
def load_batches(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    text_column: str = "text",
) -> list[dict[str, Tensor]]:
    """Load calibration data into padded token batches.

    Args:
        dataset: in any form of the table in this module's docstring.
        tokenizer: needed for text; its EOS token separates documents, its padding token (or EOS) pads batches.
        num_samples: at most this many sequences, drawn with `seed`; fewer where the data has fewer.
        sequence_length: tokens a sequence, at most.
        batch_size: sequences a batch; shorter ones are padded on the left and masked.
        seed: of the random draw of samples.
        text_column: column that holds the text, for rows with columns.

    Returns:
        Dicts of `input_ids` and `attention_mask`, each (batch, sequence) int64.

    Raises:
        ValueError: data of an unsupported form, or without any token.
        FileNotFoundError: a path that does not exist.
        ImportError: a package that reads this form is missing.
    """
    from optimum.gptq.data import prepare_dataset

    samples = load_samples(dataset, tokenizer, num_samples, sequence_length, seed, text_column)
    if not samples:
        raise ValueError(
            f"the calibration data ({describe_dataset(dataset)}) holds no token; give text that is not empty"
        )
    pad = 0 if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # masked, so any id does
    examples = [{"input_ids": ids.unsqueeze(0), "attention_mask": mask.unsqueeze(0)} for ids, mask in samples]
    return prepare_dataset(examples, batch_size=batch_size, pad_token_id=pad)


def load_samples(
    dataset: Any, tokenizer: Any, num_samples: int, sequence_length: int, seed: int, text_column: str = "text"
) -> list[tuple[Tensor, Tensor]]:
    """Load calibration data as unpadded token ids and masks, each (S,) int64 with S <= `sequence_length`."""
    if isinstance(dataset, Mapping):
        dataset = read_mapping(dataset)
    if isinstance(dataset, Mapping):
        return _mix(dataset, tokenizer, num_samples, sequence_length, seed, text_column)
    if isinstance(dataset, str | Path):
        if str(dataset) in NAMED_DATASETS:
            return _named(str(dataset), _required(tokenizer, dataset), num_samples, sequence_length, seed)
        path = check_source(dataset)
        if path.is_dir():
            files = map(str, data_files(path))
            return _mix(dict.fromkeys(files, 1), tokenizer, num_samples, sequence_length, seed, text_column)
        if path.suffix == ".txt":
            return _windows(path, _required(tokenizer, path), num_samples, sequence_length, seed)
        dataset = read_rows(path)
    rows = _draw(list(_usable_rows(dataset, text_column)), num_samples, seed)
    samples = (_tokens(row, tokenizer, sequence_length) for row in rows)
    return [(ids, mask) for ids, mask in samples if len(ids)]


def check_source(name: str | Path) -> Path:
    """Return the path of a data source, after checking that it exists or is a named dataset.

    Raises:
        FileNotFoundError: it is neither a path nor a named dataset.
        ValueError: its name is not UTF-8.
    """
    check_utf8(name)
    path = Path(name).expanduser()
    if str(name) not in NAMED_DATASETS and not path.exists():
        raise FileNotFoundError(
            f"calibration data {str(name)!r} is neither a file, a folder nor one of {NAMED_DATASETS}"
        )
    return path


def holds_text(dataset: Any) -> bool:
    """Return whether a dataset needs a tokenizer, by its form and first row; files except .pt count as text."""
    if isinstance(dataset, Mapping):
        return any(map(holds_text, dataset))
    if isinstance(dataset, str | Path):
        return Path(dataset).suffix != ".pt"
    row = next(iter(dataset), None) if hasattr(dataset, "__iter__") else None
    return isinstance(row, str) or (isinstance(row, Mapping) and "input_ids" not in row)


def read_mapping(data: Mapping) -> list[Mapping] | dict[str, float]:
    """Interpret a mapping: a tokenizer's output becomes a list of one row, sources with weights become a mix.

    Raises:
        ValueError: anything else, such as the splits of a `datasets.DatasetDict`, or columns.
    """
    if hasattr(data.get("input_ids"), "__len__"):
        return [data]
    try:
        return {name: float(weight) for name, weight in data.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # the last one of tensors
        raise ValueError(
            f"a {type(data).__name__} of {', '.join(map(repr, data))} has no weights, so it is no mix of sources; "
            f"give one of its parts, for example dataset[{next(iter(data))!r}]"
        ) from error


def _mix(weights: dict[str, float], tokenizer: Any, num_samples: int, length: int, seed: int, column: str) -> list:
    found = weights.values()
    if not weights or not all(map(math.isfinite, found)) or min(found) < 0 or not sum(found) > 0:
        raise ValueError(f"a calibration mix needs sources with finite weights >= 0, not all zero; got {weights}")
    shares, short = _shares(weights, num_samples), {}
    parts: dict[str, list] = dict.fromkeys(weights, [])
    while changed := {name: share for name, share in shares.items() if share > len(parts[name]) and name not in short}:
        parts |= {name: load_samples(name, tokenizer, n, length, seed, column) for name, n in changed.items()}
        short |= {name: len(parts[name]) for name, share in changed.items() if len(parts[name]) < share}
        others = {name: weight for name, weight in weights.items() if weight and name not in short}
        shares = short | _shares(others, num_samples - sum(short.values()))
    if short and others:
        found = listed([f"{name} has {count}" for name, count in short.items()])
        logger.warning("too few sequences for a source's share: %s; the other sources give the rest", found)
    return [sample for part in parts.values() for sample in part]


def _shares(weights: dict[str, float], count: int) -> dict[str, int]:
    """Divide a count into whole numbers in proportion to weights, by the largest remainder method."""
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _named(name: str, tokenizer: Any, num_samples: int, length: int, seed: int) -> list:
    from optimum.gptq.data import get_dataset

    with preserved_random_state():  # optimum seeds the global generators
        rows = get_dataset(name, tokenizer, nsamples=num_samples, seqlen=length, seed=seed)
    return [_tokens(row, tokenizer, length) for row in rows]


def _windows(path: Path, tokenizer: Any, num_samples: int, length: int, seed: int) -> list:
    documents = [text for text in read_text(path).split(f"\n{SEPARATOR}\n") if text.strip()]
    stream: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []:
        stream += ids + end
    tokens = torch.tensor(stream, dtype=torch.int64)
    windows = list(tokens.split(length))
    if len(windows) > 1 and len(windows[-1]) < length:
        windows.pop()  # whole windows only, so that nothing needs padding
    return [(window, torch.ones_like(window)) for window in _draw(windows, num_samples, seed) if len(window)]


def _usable_rows(dataset: Any, column: str) -> Iterator[Any]:
    """Yield the rows of a dataset as text or token sequences, without empty ones."""
    if isinstance(dataset, bytes) or not hasattr(dataset, "__iter__"):
        raise ValueError(
            f"calibration data of type {type(dataset).__name__} is not supported; give a list of str, a list of token "
            f"dicts, a datasets.Dataset, a path ({', '.join(FILE_TYPES)}) or one of {NAMED_DATASETS}"
        )
    for row in dataset:
        if isinstance(row, Mapping) and "input_ids" not in row:
            if column not in row:
                raise ValueError(f"a row has no column {column!r}, only {sorted(row)}; name it with text_column")
            row = row[column]
        if not (isinstance(row, str | Mapping | Tensor) or (isinstance(row, Sequence) and row)):
            raise ValueError(f"a calibration row is a {type(row).__name__}; give text, token ids or a dict of them")
        if not isinstance(row, str):
            yield from _sequences(row)
        elif row.strip():
            yield row


def _sequences(row: Any) -> Iterator[Any]:
    """Yield the sequences of a token batch without their padding; a single sequence is yielded unchanged."""
    tokens = row if isinstance(row, Mapping) else {"input_ids": row}
    if not _is_batch(tokens["input_ids"]):
        yield row
        return
    ids = [torch.as_tensor(sequence).flatten() for sequence in tokens["input_ids"]]
    for sequence, mask in zip(ids, tokens.get("attention_mask", map(torch.ones_like, ids)), strict=True):
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


def _tokens(row: Any, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    if isinstance(row, str):
        row = _required(tokenizer, "text")(row, truncation=True, max_length=length)
    row = row if isinstance(row, Mapping) or hasattr(row, "data") and hasattr(row, "keys") else {"input_ids": row}
    ids = torch.as_tensor(row["input_ids"]).flatten().long()
    mask = row["attention_mask"] if "attention_mask" in row else torch.ones_like(ids)
    return ids[:length], checked_mask(mask, ids)[:length].long()


def check_masks(batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Check the attention masks of batches made by the caller, as in `checked_mask`."""
    for batch in batches:
        if "attention_mask" in batch:
            checked_mask(batch["attention_mask"], batch["input_ids"])


def checked_mask(mask: Any, ids: Tensor) -> Tensor:
    """Convert an attention mask to a vector of zeros and ones, one entry per token.

    Args:
        mask: as a list, array or tensor.
        ids: the S token ids that it belongs to.

    Returns:
        (S,) of zeros and ones, 1 for real tokens.

    Raises:
        ValueError: another shape, or other numbers, such as indices of samples packed into one row.
    """
    mask = torch.as_tensor(mask)
    if mask.numel() != ids.numel():
        raise ValueError(
            f"an attention_mask of shape {tuple(mask.shape)} stands beside {ids.numel()} tokens; give one number a "
            "token, 1 for a real one and 0 for padding"
        )
    mask = mask.flatten()
    others = mask[(mask != 0) & (mask != 1)]
    if len(others):
        raise ValueError(
            f"an attention_mask holds {others[0].item()}, but it must hold 1 for real tokens and 0 for padding; where "
            "its numbers tell packed samples apart, give each sample as a row of its own"
        )
    return mask


def _draw(rows: list, count: int, seed: int) -> list:
    """Draw `count` rows at random, in their original order; all if there are not more."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in chosen.sort().values.tolist()]


def _required(tokenizer: Any, source: Any) -> Any:
    if tokenizer is None:
        raise ValueError(f"calibration data {str(source)!r} is text: give a tokenizer, or token ids instead")
    return tokenizer


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global random state on exit."""
    import numpy

    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
