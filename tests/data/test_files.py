"""Data files as people have them: compressed, with a byte order mark, in capitals, and lines named .json."""

import bz2
import gzip
import json

import pyarrow
import pytest
import torch
from tiny import EOS, sample_texts, tiny_tokenizer

from optimum_dern.data.batches import load_samples
from optimum_dern.evaluation.loss.perplexity import load_texts


TOKENIZER, TEXTS = tiny_tokenizer(), sample_texts()
EXPECTED = [TOKENIZER(text)["input_ids"] for text in TEXTS]
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()


def ids_of(source):
    """The ids of all samples."""
    return [sample.ids.tolist() for sample in load_samples(source, TOKENIZER, 128, 4096, 0)]


def zstd(content):
    """Content as one frame of zstd."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "ROWS.JSONL"])
def test_compressed_rows(tmp_path, name, pack):
    """Unpacked on reading, whatever the case of the name."""
    path = tmp_path / f"{name}.{pack.upper() if name.isupper() else pack}"
    path.write_bytes(PACK[pack](LINES))
    assert ids_of(path) == EXPECTED


@pytest.mark.parametrize("pack", PACK)
def test_compressed_text(tmp_path, pack):
    """One stream, as without compression; two frames in a file are both read."""
    first, second = b"one\n<|endoftext|>\n", b"two"
    (tmp_path / f"notes.txt.{pack}").write_bytes(PACK[pack](first) + PACK[pack](second))
    one, two = (TOKENIZER(text)["input_ids"] for text in ("one", "two"))
    assert ids_of(tmp_path / f"notes.txt.{pack}") == [[*one, EOS, *two, EOS]]


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(LINES)[:-30]])
def test_broken_compression(tmp_path, content):
    """The file is named."""
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match="rows.jsonl.gz cannot be decompressed as gzip"):
        ids_of(tmp_path / "rows.jsonl.gz")


def test_a_pyarrow_without_zstd(tmp_path, monkeypatch):
    """The package is named."""
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setattr(pyarrow, "Codec", type("Codec", (), {"is_available": staticmethod(lambda name: False)}))
    with pytest.raises(ImportError, match="rows.jsonl.zst needs a pyarrow that reads zstd"):
        ids_of(tmp_path / "rows.jsonl.zst")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "NOTES.TXT"])
def test_byte_order_mark(tmp_path, name):
    """It is no text."""
    content = b"one" if name.endswith("TXT") else LINES if name.endswith("l") else json.dumps(TEXTS).encode()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    expected = [[*TOKENIZER("one")["input_ids"], EOS]] if name.endswith("TXT") else EXPECTED
    assert ids_of(tmp_path / name) == expected


def test_json_lines_named_json(tmp_path):
    """Values of any kind; a line that is broken is named."""
    (tmp_path / "rows.json").write_bytes(LINES)
    (tmp_path / "texts.json").write_text("\n".join(map(json.dumps, TEXTS)), "utf-8")
    assert ids_of(tmp_path / "rows.json") == ids_of(tmp_path / "texts.json") == EXPECTED
    (tmp_path / "rows.json").write_bytes(LINES + b"\n{")
    with pytest.raises(ValueError, match=f"rows.json, line {len(TEXTS) + 1} is not JSON"):
        ids_of(tmp_path / "rows.json")


def test_capitals_and_compression_in_a_folder(tmp_path):
    """All its data files, and none besides."""
    (tmp_path / "A.JSONL").write_bytes(LINES)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.pt.gz").write_bytes(b"")  # tensors are not unpacked
    torch.save([torch.tensor([1, 2])], tmp_path / "D.PT")
    assert ids_of(tmp_path) == [*EXPECTED, [1, 2], *EXPECTED]


def test_evaluation_reads_the_same(tmp_path):
    """Under the files' names without type and compression, as far as these differ."""
    (tmp_path / "NEWS.TXT").write_text(" ".join(TEXTS), "utf-8")
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert list(load_texts(tmp_path, TOKENIZER, 64)) == ["NEWS", "code"]
    assert list(load_texts(tmp_path / "code.jsonl.gz", TOKENIZER, 64)) == ["code"]
    (tmp_path / "code.json").write_bytes(LINES)
    texts = load_texts(tmp_path, TOKENIZER, 64)
    assert list(texts) == ["NEWS", "code.json", "code.jsonl.gz"]
    assert all(sum(len(batch["input_ids"]) for batch in texts[name]) == 12 for name in list(texts)[1:])
