"""Stored inputs of the fuzzer: those that reach distinct error messages of the readers, and those that once failed.

They are files `READER/NUMBER-WORDS-OF-THE-MESSAGE` in tests/robustness/corpus, a few for each reader, the small ones.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fuzz_attempt import Outcome, attempt


__all__ = ["CORPUS", "Corpus", "stored_inputs"]

CORPUS = Path(__file__).resolve().parent.parent / "tests" / "robustness" / "corpus"
MOST, LARGEST = 8, 2500  # inputs of a reader, and bytes of one


def stored_inputs() -> Iterator[tuple[str, Path]]:
    """Yield the reader and the file of every stored input."""
    for file in sorted(CORPUS.glob("*/*")):
        yield file.parent.name, file


class Corpus:
    """The stored inputs, to which others are added."""

    def __init__(self) -> None:
        self.known: dict[str, set[str]] = {}
        for reader, file in stored_inputs():
            self.known.setdefault(reader, set()).add(attempt(reader, file.read_bytes()).place)

    def add(self, reader: str, content: bytes, outcome: Outcome) -> bool:
        """Store an input if it reaches a refusal that none does yet; returns whether it was stored."""
        known = self.known.setdefault(reader, set())
        if outcome.kind != "refused" or outcome.place in known or len(known) >= MOST or len(content) > LARGEST:
            return False
        known.add(outcome.place)
        words = re.findall("[a-z]+", re.sub(r"\([^()]*\)|'[^']*'|\"[^\"]*\"", "", outcome.says.lower()))
        file = CORPUS / reader / f"{len(known):02d}-{'-'.join(words)[:50].rstrip('-')}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return True
