"""Load samples from data of any form: from memory, files, folders, the Hub, or a mix of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks.arguments import check_argument, check_number
from ..results.description import describe_dataset
from .files import data_files, file_type, read_rows, read_text
from .mix import Part, mix_samples, read_mapping
from .named import named_samples
from .rows import draw, row_samples
from .sources import MADE, NAMED_DATASETS, check_source, find_repository, open_repository
from .tokens import Reading, Sample, windows


__all__ = ["Sample", "load_samples"]

SEPARATOR = "<|endoftext|>"  # a line of its own between the documents of a .txt file


def load_samples(
    dataset: Any,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    text_column: str = "text",
    made: Mapping[str, Callable[[int], list[Sample]]] | None = None,
) -> list[Sample]:
    """Load calibration data as unpadded samples.

    Args:
        dataset: in any form of the table in `data.batches`.
        tokenizer: needed for text.
        num_samples: at most this many, drawn with `seed`.
        sequence_length: tokens a sequence, at most.
        seed: of the random draw.
        text_column: column that holds the text, for rows with columns.
        made: by name, sources that are not read: each is called with the number of samples wanted.

    Returns:
        Samples of `ids` and `mask`, each (S,) int64 with S <= `sequence_length`, and the name of their source: of a
        mix, the source as it is named there; of a folder, the file; of data in memory, its description.

    Raises:
        ValueError: data of an unsupported form, or a number out of range.
        FileNotFoundError: a path that does not exist.
        ConnectionError: a dataset on the Hub, which cannot be reached.
    """
    check_number("num_samples", num_samples, 1)
    check_number("sequence_length", sequence_length, 1)
    check_number("seed", seed, 0, most=2**32 - 1)
    check_argument("text_column", text_column, str, "the name of a column")
    return _load(dataset, num_samples, Reading(tokenizer, sequence_length, seed, text_column, made or {}))


def _load(dataset: Any, count: int, reading: Reading) -> list[Sample]:
    def load(source: Any, share: int) -> list[Sample]:
        return _load(source, share, reading)

    if isinstance(dataset, Mapping):
        dataset = read_mapping(dataset)
    if isinstance(dataset, Mapping):
        parts = [Part(_name(key), key, weight, _name(key) in reading.made) for key, weight in dataset.items()]
        return mix_samples(parts, count, load)
    name = _name(dataset)
    if not isinstance(dataset, str | Path):
        return row_samples(dataset, count, reading, name)
    if name in reading.made:
        return [sample._replace(source=name) for sample in reading.made[name](count)]
    if name in NAMED_DATASETS:
        return named_samples(name, count, reading, load)
    path = check_source(dataset)
    if repository := find_repository(dataset):
        return row_samples(open_repository(repository), count, reading, name)
    if path.is_dir():
        return mix_samples([Part(file.name, file, 1) for file in data_files(path)], count, load)
    if file_type(path) == ".txt":
        return _stream_samples(path, count, reading, name)
    if name in MADE and not path.exists():
        raise ValueError(f"{name!r} is made for calibration by the model that is compressed; give text to read here")
    return row_samples(read_rows(path), count, reading, name)


def _stream_samples(path: Path, count: int, reading: Reading, name: str) -> list[Sample]:
    reading.text_tokenizer(name)
    found = windows(read_text(path).split(f"\n{SEPARATOR}\n"), reading)
    return [Sample(window, torch.ones_like(window), name) for window in draw(found, count, reading.seed)]


def _name(dataset: Any) -> str:
    return str(dataset) if isinstance(dataset, str | Path) else describe_dataset(dataset)
