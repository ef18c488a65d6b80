"""Conversion of task-file rows to items: pairs of context and continuation whose log-likelihoods are compared.

The texts are exactly those of lm-eval's own prompts, so that both give the same numbers:

    multiple_choice    context, choices, label            log p(" " + choice | context)
    (with letters)     ... and letters                    log p(" " + letter | context), the choices are in the context
    multiple_context   contexts, continuation, label      log p(continuation | contexts[i])
    minimal_pair       choices, label                     log p(" " + choice), whole sentences after BOS (or EOS)
    last_word          context, target                    log p(" " + target | context), and whether greedily chosen
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


__all__ = ["Item", "Request", "kind_of_row", "make_item"]


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context, which may be empty."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """One question with its possible answers as requests; the one at index `label` is right."""

    id: str
    requests: tuple[Request, ...]
    label: int
    lengths: tuple[str, ...] = ()  # texts whose lengths normalise the log-likelihoods, or none


KEYS = {  # kind -> the keys of its rows; the first kind whose keys a row has is its kind
    "multiple_context": ("contexts", "continuation", "label"),
    "multiple_choice": ("context", "choices", "label"),
    "last_word": ("context", "target"),
    "minimal_pair": ("choices", "label"),
}


def kind_of_row(row: Mapping[str, Any]) -> str:
    """Return the kind of task that a row belongs to, by its keys.

    Raises:
        ValueError: it belongs to none; tasks with generated answers (GSM8K) are not supported.
    """
    for kind, keys in KEYS.items():
        if all(key in row for key in keys):
            return kind
    shapes = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in KEYS.items())
    raise ValueError(f"a row with the keys {sorted(row)} is of no kind that is scored by likelihood ({shapes})")


def make_item(row: Mapping[str, Any], kind: str, name: str, cloze: bool = False) -> Item:
    """Convert one row of a task file to an item.

    Args:
        row: of a task file.
        kind: as `kind_of_row` gives it.
        name: of the item, where the row has no `id`.
        cloze: for rows with letters, score the choices' texts after the question alone.

    Raises:
        ValueError: a key is missing or its value is invalid.
    """
    missing = [key for key in KEYS[kind] if key not in row]
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}, which {kind} rows have; it has {sorted(row)}")
    for key in ("context", "continuation", "question"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{name} has the {key} {row[key]!r:.80}; give a text")
    requests, label, lengths = _parts(row, kind, name, cloze)
    if type(label) is not int or not 0 <= label < len(requests):
        raise ValueError(f"{name} has the label {label!r}; give the right choice's index, 0 to {len(requests) - 1}")
    if any(not request.continuation.strip() for request in requests):
        raise ValueError(f"{name} has an empty choice or target; there is nothing to score")
    return Item(str(row.get("id", name)), requests, label, lengths)


def _parts(row: Mapping[str, Any], kind: str, name: str, cloze: bool) -> tuple:
    """Return an item's requests, its label, and the texts whose lengths normalise, from a row with the kind's keys."""
    if kind == "last_word":
        return (Request(row["context"], f" {row['target']}"),), 0, ()
    if kind == "minimal_pair":
        return tuple(Request("", f" {choice}") for choice in _texts(row, "choices", name)), row["label"], ()
    if kind == "multiple_context":
        contexts, continuation = _texts(row, "contexts", name), row["continuation"]
        if continuation[:1].isspace():
            continuation = f" {continuation.strip()}"  # as lm-eval does, whatever white space the sentence has
        return tuple(Request(context, continuation) for context in contexts), row["label"], ()
    context, choices = row["context"], _texts(row, "choices", name)
    if cloze:
        if "question" not in row:
            raise ValueError(f"{name} has no 'question', which cloze scoring puts before the choices")
        context = f"Question: {row['question'].strip()}\nAnswer:"
    elif "letters" in row:
        letters = _texts(row, "letters", name)
        return tuple(Request(context, f" {letter}") for letter in letters), row["label"], ()
    return tuple(Request(context, f" {choice}") for choice in choices), row["label"], choices


def _texts(row: Mapping[str, Any], key: str, name: str) -> tuple[str, ...]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} has {key} {texts!r:.80}; give a list of at least two strings")
    return tuple(texts)
