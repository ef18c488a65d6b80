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
"""

from collections.abc import Sequence
from typing import Any

from ..machine.torch_state import plain_torch
from ..results.description import describe_dataset
from .labels import SOURCE
from .mix import read_mapping
from .named import preserved_random_state
from .samples import Sample, load_samples
from .sources import NAMED_DATASETS, check_source, holds_text, is_endless
from .tokens import check_masks


__all__ = [
    "NAMED_DATASETS",
    "Sample",
    "check_masks",
    "check_source",
    "holds_text",
    "is_endless",
    "load_batches",
    "load_samples",
    "pad_batches",
    "preserved_random_state",
    "read_mapping",
]


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
) -> list[dict[str, Any]]:
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
        ConnectionError: a dataset on the Hub, which cannot be reached.
    """
    samples = load_samples(dataset, tokenizer, num_samples, sequence_length, seed, text_column)
    if not samples:
        raise ValueError(
            f"the calibration data ({describe_dataset(dataset)}) holds no token; give text that is not empty"
        )
    return [
        {name: batch[name] for name in batch if name != SOURCE}
        for batch in pad_batches(samples, tokenizer, batch_size)
    ]


def pad_batches(samples: Sequence[Sample], tokenizer: Any, batch_size: int) -> list[dict[str, Any]]:
    """Pad samples on the left into batches.

    Args:
        samples: in the order of the batches.
        tokenizer: its padding token (or EOS) pads; None pads with 0.
        batch_size: sequences a batch.

    Returns:
        Dicts of `input_ids` and `attention_mask`, each (batch, sequence) int64, and `source`, a name a sequence.
    """
    from optimum.gptq.data import prepare_dataset

    pad = 0 if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # masked, so any id does
    examples = [{"input_ids": each.ids.unsqueeze(0), "attention_mask": each.mask.unsqueeze(0)} for each in samples]
    batches = prepare_dataset(examples, batch_size=batch_size, pad_token_id=pad)  # keeps the order
    names = iter([sample.source for sample in samples])
    return [batch | {SOURCE: [next(names) for _ in batch["input_ids"]]} for batch in batches]
