"""Cache on disk of a model's next-token predictions, the k most probable tokens per position, to compare others with.

A cache is a folder: `cache.json`, and one safetensors file per batch with the tokens and, per predicted position
(sequence by sequence, without padding),

    best              (positions,)    the most probable token; the lowest id among equals
    ids               (positions, k)  the k most probable tokens
    log_probs         (positions, k)  their log-probabilities
    tail              (positions,)    log of the total probability of all other tokens
    sample_ids        (positions, 16) samples of the other tokens, drawn by their probability
    sample_log_probs  (positions, 16) log-probabilities of the samples
    losses            (positions,)    -log p of the token that follows
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...checkpoint.output.new_folder import check_no_part, new_folder
from ...checks.batches import check_batches
from ...data.files import listed
from ...errors import explained, naming
from ...text_files import read_object
from ..loss.logits import batch_logits, rows_of


__all__ = ["CACHE_NAME", "INPUTS", "LogitsCache", "cache_logits", "check_folder", "predicted_positions"]

CACHE_NAME = "cache.json"
BATCH_NAMES = "text-*-batch-*.safetensors"
FORMAT = 1
INPUTS = ("input_ids", "attention_mask")
SAMPLES = 16


@dataclass(frozen=True)
class LogitsCache:
    """A cache of a model's predictions on disk; its tensors are read batch by batch."""

    folder: Path
    top_k: int
    vocabulary: int
    texts: dict[str, int]  # number of batches by name of the text
    model: str  # name of the model that made the predictions

    @classmethod
    def load(cls, folder: str | Path) -> "LogitsCache":
        """Open a cache.

        Raises:
            FileNotFoundError: the folder holds no cache.
            ValueError: the cache has another format version.
        """
        file = Path(folder) / CACHE_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no cache of predictions; write one with cache_logits")
        facts = read_object(file)
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has format {facts.get('format')!r}, this version reads {FORMAT}; write it again"
            )
        kinds = {"top_k": int, "vocabulary": int, "texts": dict, "model": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
        if wrong or not all(isinstance(count, int) and count >= 0 for count in facts["texts"].values()):
            raise ValueError(f"{file} has no proper {(wrong or ['texts'])[0]}; write the cache again")
        return cls(Path(folder), *(facts[name] for name in kinds))

    def batches(self, text: str) -> Iterator[dict[str, Tensor]]:
        """Yield the cached tensors of one text, batch by batch."""
        position = list(self.texts).index(text)
        for batch in range(self.texts[text]):
            with explained(f"{self.folder} is a broken cache", "write it again"):
                tensors = load_file(_batch_file(self.folder, position, batch))
            yield tensors

    def inputs(self, text: str) -> Iterator[dict[str, Tensor]]:
        """Yield the `input_ids` and `attention_mask` of one text, batch by batch."""
        position = list(self.texts).index(text)
        for batch in range(self.texts[text]):
            with explained(f"{self.folder} is a broken cache", "write it again"):
                with safe_open(_batch_file(self.folder, position, batch), "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in INPUTS}
            yield tensors

    def holds(self, texts: Mapping[str, Sequence[dict]]) -> bool:
        """Whether the cache was made from exactly these token batches."""
        if {name: len(batches) for name, batches in texts.items()} != self.texts:
            return False
        pairs = ((own, batch) for name in texts for own, batch in zip(self.inputs(name), texts[name], strict=True))
        return all(torch.equal(own[key], batch[key]) for own, batch in pairs for key in INPUTS)


def cache_logits(
    model: Any,
    texts: Mapping[str, Sequence[dict]],
    folder: str | Path,
    top_k: int = 64,
    overwrite: bool = False,
    name: str | None = None,
) -> LogitsCache:
    """Write a model's predictions to disk, one batch at a time.

    Args:
        model: a causal language model, or a `StreamedCheckpoint`.
        texts: token batches by name, as `load_texts` gives them.
        folder: to write to; 8 bytes for each of the `top_k` tokens of a position.
        top_k: number of most probable tokens to keep; with the vocabulary's size the comparison is exact.
        overwrite: replace an existing cache.
        name: of the model, stored with the cache; by default the name or path it was loaded from.

    Raises:
        FileExistsError: another run is writing the cache, or was killed while it did.
        ValueError: `top_k` is below 1, there is no text, or the folder is not empty.
    """
    folder = Path(folder)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1")
    if not texts:
        raise ValueError("there is no text to predict; give at least one")
    check_folder(folder, overwrite)
    for batches in texts.values():
        check_batches(batches, rows_of(model), masked=True)
    with new_folder(folder, replace=True) as work:
        vocabulary = _write_batches(model, texts, work, top_k)
        name = name or str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        facts = {"format": FORMAT, "model": name, "vocabulary": vocabulary}
        facts |= {"top_k": min(top_k, vocabulary), "texts": {text: len(batches) for text, batches in texts.items()}}
        (work / CACHE_NAME).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return LogitsCache.load(folder)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that a cache cannot be written to.

    Args:
        folder: empty, or not there.
        overwrite: it may also be a cache, with no other files beside it.

    Raises:
        FileExistsError: a cache is being written there.
        ValueError: the folder has files.
    """
    check_no_part(folder)
    if not folder.exists():
        return
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else [folder.name]
    if names and not (overwrite and (folder / CACHE_NAME).is_file()):
        raise ValueError(f"{folder} is not an empty folder; choose another one or, if it is a cache, overwrite it")
    if others := [name for name in names if name != CACHE_NAME and not fnmatchcase(name, BATCH_NAMES)]:
        raise ValueError(
            f"{folder} holds {listed(sorted(others))}, which are no part of a cache and would be lost; move them "
            "away, or choose another folder"
        )


def predicted_positions(mask: Tensor) -> Tensor:
    """Mark the positions that predict a token: neither they nor the next position are padding.

    Args:
        mask: (batch, sequence).

    Returns:
        (batch, sequence - 1), boolean.
    """
    return (mask[:, :-1] * mask[:, 1:]).bool()


@torch.no_grad()
def _write_batches(model: Any, texts: Mapping[str, Sequence[dict]], folder: Path, top_k: int) -> int:
    places = [(text, i, batch) for text, batches in enumerate(texts.values()) for i, batch in enumerate(batches)]
    vocabulary = 0
    for (text, i, batch), logits in zip(places, batch_logits(model, [place[2] for place in places]), strict=True):
        vocabulary = logits.shape[-1]
        generator = torch.Generator(logits.device).manual_seed(i)
        sequences = zip(logits, batch["input_ids"], batch["attention_mask"], strict=True)
        rows = [_summary(*sequence, top_k, generator) for sequence in sequences]
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        with naming(file := _batch_file(folder, text, i)):
            save_file({key: batch[key].contiguous() for key in INPUTS} | tensors, file)
    return vocabulary


def _summary(logits: Tensor, ids: Tensor, mask: Tensor, top_k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Compute the cached tensors of one sequence from its logits (S, V), tokens (S,) and mask (S,)."""
    predicts = predicted_positions(mask.unsqueeze(0))[0].to(logits.device)
    logs = logits[:-1][predicts].float().log_softmax(-1)  # (T, V)
    targets = ids[1:].to(logits.device)[predicts]
    top, chosen = logs.topk(min(top_k, logs.shape[1]), dim=1)
    rest = logs.scatter(1, chosen, -torch.inf)
    tail = rest.logsumexp(1)
    weights = torch.where(tail.isinf().unsqueeze(1), 1.0, (rest - tail.unsqueeze(1)).exp())  # unused if tail is 0
    drawn = weights.multinomial(SAMPLES, replacement=True, generator=generator) if len(logs) else chosen[:, :0]
    kept = {
        "best": logs.argmax(1).int(),
        "ids": chosen.int(),
        "log_probs": top,
        "tail": tail,
        "sample_ids": drawn.int(),
        "sample_log_probs": logs.gather(1, drawn),
        "losses": -logs.gather(1, targets.unsqueeze(1)).squeeze(1),
    }
    return {name: value.cpu().contiguous() for name, value in kept.items()}


def _batch_file(folder: Path, text: int, batch: int) -> Path:
    return folder / f"text-{text:03d}-batch-{batch:05d}.safetensors"
