"""Calibration text that the model writes, kept in a file so that an interrupted run goes on with the same."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from ...data.made.conversations import find_turns
from ...data.made.own_text import Conversation, Document, write_sequences
from ...data.made.random_tokens import random_sequences
from ...data.tokens import added_bos
from ...machine.torch_state import evaluation_mode
from ...models.refusals import WRITES_NOTHING
from ...text_files import replace_rows


__all__ = ["CannotWrite", "OwnText", "check_writes", "special_ids", "vocabulary_of", "write_own_text"]

LONGEST_TURN = 4  # a turn of a conversation takes at most this part of its sequence: a quarter


class CannotWrite(ValueError):
    """A model cannot write calibration text: of its kind, or because it does not fit in memory."""


class OwnText:
    """Text that a model writes for its own calibration.

    Args:
        model: it has weights while `loaded` is open.
        loaded: context in which the model has its weights; by default it always has.
        kept: file of rows written by an earlier, interrupted run, or to be written; None keeps them in memory only.
        origin: identifies the model in that file.
    """

    def __init__(
        self,
        model: Any,
        loaded: Callable[[], AbstractContextManager] = nullcontext,
        kept: Path | None = None,
        origin: str = "",
    ) -> None:
        self.model, self.loaded, self.kept, self.origin = model, loaded, kept, origin
        self.rows: list[dict[str, Any]] = []  # of token ids and text, as in `calibration.jsonl`

    def write(self, tokenizer: Any, count: int, length: int, seed: int) -> list[Tensor]:
        """Write sequences, or read them where an earlier run has written the same.

        Args:
            tokenizer: of the model, or None.
            count: number of sequences.
            length: tokens of each.
            seed: of the draw.

        Returns:
            `count` tensors (length,) int64.
        """
        made = f"{self.origin} {count} x {length} seed {seed}"
        self.rows = _kept_rows(self.kept, made)
        if not self.rows:
            with self.loaded():
                sequences = write_own_text(self.model, tokenizer, count, length, seed)
            self.rows = [_row(ids, tokenizer, made) for ids in sequences]
            if self.kept is not None:
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                replace_rows(self.kept, self.rows)
        return [tensor(row["input_ids"]) for row in self.rows]


def write_own_text(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[Tensor]:
    """Sample sequences from a model: plain text and, where its tokenizer has a chat template, as many conversations.

    Args:
        model: a causal language model with weights.
        tokenizer: of the model, or None.
        count: number of sequences.
        length: tokens of each.
        seed: of the draw; the global random state stays as it is.

    Returns:
        `count` tensors (length,) int64.  Plain text begins with a random token, after BOS if the tokenizer adds it.

    Raises:
        ValueError: the model does not predict the next token, or predicts NaN.
    """
    check_writes(model)
    turns, vocabulary = find_turns(tokenizer), vocabulary_of(model, tokenizer)
    bos, ends = added_bos(tokenizer), [getattr(tokenizer, "eos_token_id", None)]
    openings = random_sequences(count, 1 if bos is None else 2, vocabulary, special_ids(model, tokenizer), seed, bos)
    writers = [
        Conversation(turns, max(8, length // LONGEST_TURN))
        if turns and sequence % 2
        else Document(opening.tolist(), bos, ends)
        for sequence, opening in enumerate(openings)
    ]
    with evaluation_mode(model):
        return write_sequences(model, writers, length, seed, vocabulary)


def check_writes(model: Any) -> None:
    """Refuse a model that does not predict the next token.

    Raises:
        CannotWrite: with the reason and the mend.
    """
    kind = model.config.model_type
    if kind in WRITES_NOTHING:
        raise CannotWrite(f"a {kind} model does not write calibration text: {WRITES_NOTHING[kind]}; give a dataset")


def vocabulary_of(model: Any, tokenizer: Any) -> int:
    """Return the number of token ids that have both an embedding and, where there is a tokenizer, a text."""
    rows = model.get_input_embeddings().weight.shape[0]
    return rows if tokenizer is None else min(rows, len(tokenizer))


def special_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, as the tokenizer or else the model's config names them."""
    if tokenizer is not None:
        return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    return {token for value in named for token in (value if isinstance(value, list) else [value]) if token is not None}


def _kept_rows(path: Path | None, made: str) -> list[dict[str, Any]]:
    """Read the rows of an earlier run; none where there are none, or those of another model, number or seed."""
    if path is None or not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (RecursionError, ValueError):  # then it is written once more
        return []
    return rows if all(isinstance(row, dict) and row.get("made") == made for row in rows) else []


def _row(ids: Tensor, tokenizer: Any, made: str) -> dict[str, Any]:
    text = {} if tokenizer is None else {"text": tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
    return {**text, "input_ids": ids.tolist(), "made": made}
