"""Load calibration data of any supported form into padded token batches.

    a list of str, a datasets.Dataset, .jsonl .json .parquet   one sample per row, cut at `sequence_length`
    rows with messages, prompts or instructions                the same, written by the tokenizer's chat template
    .txt                                                       one stream of text, cut into whole windows
    a list of token dicts, .pt                                 as they are, cut at `sequence_length`
    token dicts of several rows                                their rows without padding, cut likewise
    owner/name, owner/name:config:split                        rows of a dataset on the Hub, read as a stream
    a datasets.IterableDataset, a generator                    rows, read no further than a shuffled draw needs
    a folder by `save_to_disk`, a clone of a Hub dataset       rows of its training split
    any other folder                                           all its files, in equal shares
    "wikitext2", "c4", "c4-new"                                random windows, by optimum's own loaders (downloads)
    "general"                                                  a mix of web, encyclopaedia, code, mathematics, chat
    {source: weight}                                           a mix: `num_samples` is shared in proportion

If a source of a folder or a mix has too few samples, the others provide the rest.  Null and empty rows do not count.
Samples are drawn with a local generator; no global random state changes.

A batch has as many sequences as are asked for, or sequences of like lengths with some 8,000 tokens together.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from ..checks.arguments import check_number
from ..machine.torch_state import plain_torch
from ..results.description import describe_dataset
from .labels import POSITION, SOURCE, model_inputs
from .mix import read_mapping
from .named import preserved_random_state
from .samples import Sample, load_samples
from .sources import NAMED_DATASETS, check_source, holds_text, is_endless


__all__ = [
    "NAMED_DATASETS",
    "Sample",
    "by_length",
    "check_source",
    "holds_text",
    "is_endless",
    "largest_batch",
    "load_batches",
    "load_samples",
    "pad_batches",
    "preserved_random_state",
    "read_mapping",
]

TOKENS = 8192  # of a batch: enough to keep a processor busy, few beside the tokens of the whole calibration
LONG = 1024  # tokens of a sequence that keeps a processor busy by itself, and whose mask among padding is large
NUMBERS = 1 << 27  # of the largest tensor of a forward pass, half a GiB in float32


@plain_torch()
def load_batches(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int | None = None,
    batch_tokens: int = TOKENS,
    seed: int = 0,
    text_column: str = "text",
) -> list[dict[str, Any]]:
    """Load calibration data into padded token batches.

    Args:
        dataset: in any form of the table in this module's docstring.
        tokenizer: needed for text; its EOS token separates documents, its padding token (or EOS) pads batches.
        num_samples: at most this many sequences, drawn with `seed`; fewer where the data has fewer.
        sequence_length: tokens a sequence, at most.
        batch_size: sequences a batch, in the order drawn; by default as many of like lengths as have `batch_tokens`.
        batch_tokens: tokens a batch, at most, padding included; a longer sequence is a batch of its own.
        seed: of the random draw of samples.
        text_column: column that holds the text, for rows with columns.

    Returns:
        Dicts of `input_ids` and `attention_mask`, each (batch, sequence) int64; shorter sequences are padded on the
        left and masked.

    Raises:
        ValueError: data of an unsupported form, or without any token.
        FileNotFoundError: a path that does not exist.
        ImportError: a package that reads this form is missing.
        ConnectionError: a dataset on the Hub, which cannot be reached.
    """
    check_number("batch_tokens", batch_tokens, 1)
    if batch_size is not None:
        check_number("batch_size", batch_size, 1)
    samples = load_samples(dataset, tokenizer, num_samples, sequence_length, seed, text_column)
    if not samples:
        raise ValueError(
            f"the calibration data ({describe_dataset(dataset)}) holds no token; give text that is not empty"
        )
    return [model_inputs(batch) for batch in pad_batches(samples, tokenizer, batch_size, batch_tokens)]


def pad_batches(
    samples: Sequence[Sample],
    tokenizer: Any,
    batch_size: int | None = None,
    batch_tokens: int = TOKENS,
    processes: int = 1,
    mixed: bool = True,
) -> list[dict[str, Any]]:
    """Pad samples on the left into batches.

    Args:
        samples: in the order drawn.
        tokenizer: its padding token (or EOS) pads; None pads with 0.
        batch_size: sequences a batch, in the order drawn; None for those of like lengths together, as in `by_length`.
        batch_tokens: tokens a batch, at most, where there is no `batch_size`.
        processes: number of processes that share the batches.
        mixed: sequences of several lengths may be in one batch, with padding, where there is no `batch_size`.

    Returns:
        Dicts of `input_ids` and `attention_mask`, each (batch, sequence) int64, and for every sequence its `source`, a
        name, and its `position` among the samples.
    """
    from optimum.gptq.data import prepare_dataset

    pad = 0 if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # masked, so any id does
    if batch_size is None:
        groups = by_length([len(sample.ids) for sample in samples], batch_tokens, processes, mixed)
    else:
        drawn = range(len(samples))
        groups = [list(drawn[start : start + batch_size]) for start in drawn[::batch_size]]
    examples = [{"input_ids": each.ids.unsqueeze(0), "attention_mask": each.mask.unsqueeze(0)} for each in samples]
    batches = []
    for group in groups:
        (batch,) = prepare_dataset([examples[i] for i in group], batch_size=len(group), pad_token_id=pad)
        batches.append(batch | {SOURCE: [samples[i].source for i in group], POSITION: group})
    return batches


def by_length(
    lengths: Sequence[int], batch_tokens: int = TOKENS, processes: int = 1, mixed: bool = True
) -> list[list[int]]:
    """Group sequences of like lengths into batches that need little padding, the longest first.

    The sequences are dealt to the processes in turn, from long to short, and each hand is cut into batches, so that
    all processes have about as much to do, and one that has a sequence has a batch.

    Args:
        lengths: tokens of every sequence.
        batch_tokens: tokens a batch, at most, padding included; a longer sequence is a batch of its own.
        processes: number of processes that share the batches, by `Processes.share`.
        mixed: sequences of several lengths may be in one batch, if the longest has no more than 1,024 tokens.

    Returns:
        The indices of every batch's sequences; those of one length are in their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    hands = [_cut(order[first::processes], lengths, batch_tokens, mixed) for first in range(processes)]
    return [batch for turn in zip_longest(*hands) for batch in turn if batch]


def _cut(order: Sequence[int], lengths: Sequence[int], batch_tokens: int, mixed: bool) -> Iterator[list[int]]:
    """Yield batches of sequences, which are ordered from long to short, each with as many as fit."""
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        fitting = order[start : start + max(1, batch_tokens // max(1, longest))]
        batch = [index for index in fitting if lengths[index] == longest or (mixed and longest <= LONG)]
        yield batch
        start += len(batch)


def largest_batch(numbers: int) -> int:
    """Return the most tokens a batch may have if a forward pass holds this many numbers for each of them at once."""
    return max(1, min(TOKENS, NUMBERS // max(1, numbers)))
