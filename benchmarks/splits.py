"""Text that is split into `train.txt`, `valid.txt` and `test.txt`, with one folder per domain."""

import sys
from pathlib import Path
from typing import Any

from optimum_dern.evaluation.loss.perplexity import load_texts


LAYOUTS = ("text/*/{}.txt", "*/{}.txt", "{}.txt")  # the first layout with files is used


def split_files(source: Path, split: str) -> dict[str, Path]:
    """Find the files of one split by domain; empty where the source is not split."""
    for layout in LAYOUTS:
        if files := sorted(source.glob(layout.format(split))):
            return {file.parent.name: file for file in files}
    return {}


def load_held_out(
    source: Path, tokenizer: Any, sequence_length: int, limit: int, split: str = "test"
) -> dict[str, list[dict]]:
    """Load the evaluation batches of one split by domain, or of the whole source where it is not split."""
    texts = {}
    for name, file in (split_files(source, split) or {"": source}).items():
        found = load_texts(file, tokenizer, sequence_length, limit=limit)
        texts |= {name or stem: batches for stem, batches in found.items()}
    if not texts:
        sys.exit(f"{source} holds no text; give a file, a folder of files, or one with text/DOMAIN/{split}.txt")
    return texts
