"""Stored inputs of the fuzzer (`benchmarks/fuzz_corpus.py`), each given to its reader again."""

import re

import fuzz_readers
import pytest
from fuzz_attempt import attempt, read_valid_files
from fuzz_corpus import CORPUS, stored_inputs
from fuzz_readers import READERS


INPUTS = list(stored_inputs())
LONGEST = 600  # characters of a refusal


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What readers import for valid files is imported."""
    read_valid_files(list(READERS))


@pytest.mark.parametrize(("reader", "file"), INPUTS, ids=[f"{reader}/{file.name}" for reader, file in INPUTS])
def test_stored_inputs(reader, file):
    """Each is read, or refused with a message on what to do; nothing is imported or written elsewhere."""
    outcome = attempt(reader, file.read_bytes())
    assert outcome.kind in ("read", "refused"), outcome.says
    if outcome.kind == "refused":
        assert len(outcome.says) < LONGEST and re.search("; |must be|must map", outcome.says), outcome.says


def test_all_readers_have_some():
    """Few and small ones."""
    assert {reader for reader, _ in INPUTS} == set(READERS)
    assert {folder.name for folder in CORPUS.iterdir()} == set(READERS)
    assert sum(file.stat().st_size for _, file in INPUTS) < 200_000


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: {}["missing"], "KeyError"),
        (lambda folder: (folder.parent / "other").write_text("x"), "wrote outside"),
        (lambda folder: __import__("this"), "imported"),
    ],
)
def test_harm_is_found(monkeypatch, capsys, read, kind):
    """An accidental error, a file elsewhere and a module that is imported are failures."""
    monkeypatch.setitem(fuzz_readers.READERS, "made", ("file", lambda: b"", read))
    outcome = attempt("made", b"1")
    assert outcome.kind == "failed" and kind in outcome.says
