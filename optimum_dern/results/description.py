"""Description of calibration data for reports and provenance: name, SHA-256 and counts."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .public_names import public_paths


__all__ = ["describe_calibration", "describe_dataset", "fingerprint", "recordable_dataset"]


def describe_calibration(dataset: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Describe calibration data as JSON-able values for publication: name, sources, SHA-256, sequences and tokens."""
    sources = Counter(name for batch in batches for name in batch.get("source", ()))
    return {
        "dataset": describe_dataset(_without_folders(dataset)),
        **({"sources": dict(sources)} if sources else {}),
        "sha256": fingerprint(batches),
        "sequences": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
    }


def recordable_dataset(dataset: Any) -> Any:
    """Return a dataset in a form that a config can store: names, paths or a mix of them, else a description.

    The result is published: of a path outside the working folder, only the name is kept.
    """
    if dataset is None:
        return None
    dataset = _without_folders(dataset)
    return dataset if isinstance(dataset, Mapping) else describe_dataset(dataset)


def describe_dataset(dataset: Any) -> str:
    """Describe a dataset in one line: its name or path, or the type and size of an object."""
    if dataset is None:
        return "none"
    if isinstance(dataset, str | Path):
        return str(dataset)
    if isinstance(dataset, Mapping):
        return " + ".join(f"{weight:g} x {describe_dataset(part)}" for part, weight in dataset.items())
    kind = type(dataset[0]).__name__ if isinstance(dataset, Sequence) and len(dataset) else "row"
    sized = hasattr(dataset, "__len__") and not isinstance(dataset, type) and getattr(dataset, "ndim", 1) > 0
    size = len(dataset) if sized else "unknown number"
    return f"{size} {kind}s in memory ({type(dataset).__name__})"


def _without_folders(dataset: Any) -> Any:
    if isinstance(dataset, str | Path):
        return public_paths([str(dataset)])[str(dataset)]
    if isinstance(dataset, Mapping):
        described = {describe_dataset(part): weight for part, weight in dataset.items()}
        names = public_paths(described)
        return {names[name]: weight for name, weight in described.items()}
    return dataset


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Compute the SHA-256 of the sequences' token ids and attention masks, in the order drawn and without padding."""
    digest = hashlib.sha256()
    for ids, mask in _drawn(batches):
        digest.update(f"{len(ids)} ".encode())
        digest.update(torch.stack([ids, mask]).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _drawn(batches: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Return the token ids and masks of the sequences, each (S,), by their `position` where the batches tell it."""
    rows = [row for batch in batches for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    if all("position" in batch for batch in batches):
        positions = [position for batch in batches for position in batch["position"]]
        rows = [rows[index] for index in sorted(range(len(rows)), key=positions.__getitem__)]
    real = [mask.nonzero().flatten().tolist() or [0, -1] for _, mask in rows]
    parts = [slice(places[0], places[-1] + 1) for places in real]
    return [(ids[part], mask[part]) for (ids, mask), part in zip(rows, parts, strict=True)]
