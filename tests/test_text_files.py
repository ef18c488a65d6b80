"""Files are replaced as a whole, whatever happens on the way."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from optimum_dern import DernConfig
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.reporting.presentation import write_presentation
from optimum_dern.results.report import CompressionReport, ModelSize
from optimum_dern.text_files import replace_by_copy, replace_json, replace_text


@pytest.fixture
def report():
    """The report of a run without layers."""
    size = ModelSize(1, 1, 4, 2)
    return CompressionReport("me/model", None, "mixtral", "dern", DernConfig().to_dict(), {}, size, size)


def manifest(folder):
    """The manifest of an unfinished run."""
    return Manifest(folder, {"seed": 0})


def test_what_is_written(tmp_path):
    """Text as it is, JSON as everybody reads it; an existing file is replaced, and nothing stays beside it."""
    replace_text(tmp_path / "text", "old")
    replace_text(tmp_path / "text", "größer\n", durable=True)
    replace_json(tmp_path / "json", {"a": ["ö"]})
    assert (tmp_path / "text").read_text("utf-8") == "größer\n"
    assert (tmp_path / "json").read_text("utf-8") == '{\n  "a": [\n    "ö"\n  ]\n}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["json", "text"]


def interrupt(source, target):
    """Instead of `os.replace`: everything is written, and the process ends."""
    raise KeyboardInterrupt


WRITERS = {
    "copy": (lambda folder, report: partial(replace_by_copy, folder / "file", Path(__file__)), "file"),
    "text": (lambda folder, report: partial(replace_text, folder / "file", "new"), "file"),
    "report": (lambda folder, report: partial(report.save, folder / "file"), "file"),
    "page": (lambda folder, report: partial(write_presentation, report, folder, draw=False), "dern_report.html"),
    "manifest": (lambda folder, report: manifest(folder).save, "manifest.json"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_interruption_leaves_the_old_file(writer, tmp_path, monkeypatch, report):
    """Neither half a file nor a temporary one."""
    make, name = WRITERS[writer]
    old = json.dumps({"fingerprint": {"seed": 0}, "layers": {}, "tensors": {}})
    (tmp_path / name).write_text(old, "utf-8")
    write = make(tmp_path, report)
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {file.name: file.read_text("utf-8") for file in tmp_path.iterdir()} == {name: old}


def test_what_is_no_file_is_written_to(tmp_path):
    """A pipe, as /dev/stdout may be one, stays what it is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        replace_text(pipe, "text")
        assert os.read(reader, 100) == b"text" and pipe.is_fifo()
    finally:
        os.close(reader)
