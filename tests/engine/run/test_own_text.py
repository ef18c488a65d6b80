"""Calibration on text that the model writes: in memory, from disk, when it is loaded, and after an interruption."""

import json

import pytest
import torch
from families import make_model as make_family
from tiny import make_checkpoint, make_model, random_tokens, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_dern import DernCompressor, DernConfig, DernModelForCausalLM
from optimum_dern.data.sources import SELF
from optimum_dern.engine.run import checkpoint, own_text, whole_model
from optimum_dern.engine.run.own_text import OwnText


FIELDS = {"num_experts": 4, "num_samples": 12, "sequence_length": 24, "batch_size": 4, "neuron_refit": False}


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a byte-level tokenizer."""
    return make_checkpoint(tmp_path / "source")


def rows_of(folder):
    """The rows of a result's calibration text."""
    return [json.loads(line) for line in (folder / "calibration.jsonl").read_text("utf-8").splitlines()]


def test_without_a_dataset(source, tmp_path):
    """Memory, disk and loading write the same text, keep it beside the result, and compress to the same weights."""
    compressor = DernCompressor(**FIELDS)
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(source))
    compressor.save(model, tmp_path / "memory")
    report = DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "disk")
    loaded = DernModelForCausalLM.from_pretrained(source, dern_config=DernConfig(**FIELDS))
    loaded.save_pretrained(tmp_path / "loaded")
    rows = rows_of(tmp_path / "disk")
    assert len(rows) == 12 and all(len(row["input_ids"]) == 24 and row["text"] for row in rows)
    for name in ("memory", "loaded"):
        assert [row["input_ids"] for row in rows_of(tmp_path / name)] == [row["input_ids"] for row in rows]
        other = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "disk").state_dict().items():
            assert torch.equal(tensor, other[key]), key
    assert report.calibration == compressor.report.calibration
    assert report.calibration["dataset"] == report.config["dataset"] == SELF
    assert report.calibration["sources"] == {SELF: 12}
    assert DernCompressor(**FIELDS).config.dataset is None  # what the caller gave stays


def test_tied_weights_stay_tied(tmp_path):
    """Loading the whole model and freeing it again leaves its sizes as they are: the head is counted once."""
    make_model("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    report = DernCompressor(**FIELDS).compress_checkpoint(tmp_path / "tied", tmp_path / "out")
    compressor = DernCompressor(**FIELDS)
    compressor.compress_model(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"))
    assert (report.before, report.after) == (compressor.report.before, compressor.report.after)


def test_beside_a_dataset(source):
    """A share of all sequences, in proportion to those that the dataset really has; random tokens likewise."""
    for rows, counts in ((20, [12, 24, 12]), (2, [2, 4, 2])):
        compressor = DernCompressor(dataset=random_tokens(rows), self_share=0.5, random_share=0.25, **FIELDS)
        compressor.compress_model(AutoModelForCausalLM.from_pretrained(source))
        assert list(compressor.report.calibration["sources"].values()) == counts
    assert all(len(layer.source_errors) == 3 for layer in compressor.report.layers)


def test_as_a_source_of_a_mix(source, tmp_path):
    """`self` and `random` stand beside files; then no further share is added."""
    (tmp_path / "notes.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in sample_texts()), "utf-8")
    mix = {str(tmp_path / "notes.jsonl"): 1, "self": 2, "random": 1}
    compressor = DernCompressor(dataset=mix, self_share=0.5, **FIELDS)
    compressor.compress_model(AutoModelForCausalLM.from_pretrained(source))
    assert compressor.report.calibration["sources"] == {"notes.jsonl": 3, "self": 6, "random": 3}


def test_both_shares_off(source):
    """The data is then all there is."""
    data = random_tokens(6)
    compressor = DernCompressor(dataset=data, self_share=0.0, random_share=0.0, **FIELDS)
    compressor.compress_model(AutoModelForCausalLM.from_pretrained(source))
    assert list(compressor.report.calibration["sources"].values()) == [6]
    assert compressor.report.own_text == []


def test_an_interrupted_run_goes_on_with_its_text(source, tmp_path, monkeypatch):
    """The text is written once, and the result is that of a run in one piece."""
    DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "whole")
    write, written = own_text.write_own_text, []
    monkeypatch.setattr(own_text, "write_own_text", lambda *args: written.append(1) or write(*args))
    monkeypatch.setattr(checkpoint, "publish_shards", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(own_text, "write_own_text", lambda *args: pytest.fail("written again"))
    DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    assert written == [1]
    for name in ("model.safetensors", "calibration.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_text_of_something_else_is_not_taken(source, tmp_path):
    """Another seed, number or model writes anew."""
    model, kept = AutoModelForCausalLM.from_pretrained(source), tmp_path / "kept.jsonl"
    first = OwnText(model, kept=kept, origin="a").write(None, 2, 10, 0)
    for origin, *asked in (("a", 2, 10, 1), ("a", 3, 10, 0), ("a", 2, 12, 0), ("b", 2, 10, 0)):
        own = OwnText(model, kept=kept, origin=origin)
        found = own.write(None, *asked)
        assert len(found) == asked[0] and len(found[0]) == asked[1]
        assert [json.loads(line) for line in kept.read_text("utf-8").splitlines()] == own.rows
    OwnText(model, kept=kept, origin="a").write(None, 2, 10, 0)
    broken = OwnText(None, kept=kept, origin="a").write(None, 2, 10, 0)  # without a model: read
    assert [ids.tolist() for ids in broken] == [ids.tolist() for ids in first]


def test_a_model_that_does_not_fit(source, tmp_path, monkeypatch, caplog):
    """Refused where its text is the only data; else random tokens take its place, and the run says so."""
    monkeypatch.setattr(whole_model, "MARGIN", 1e9)
    with pytest.raises(ValueError, match=r"GiB in memory to write its own.*optimum-dern sample MODEL text.jsonl"):
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressor = DernCompressor(dataset=random_tokens(9), self_share=0.5, **FIELDS)
    report = compressor.compress_checkpoint(source, tmp_path / "out")
    assert "only random token ids protect text unlike the dataset" in caplog.text
    assert list(report.calibration["sources"].values()) == [9, 3]
    assert (report.config["self_share"], report.config["random_share"]) == (0.0, 0.25)


def test_conversations_where_there_is_a_template(source):
    """Half of the sequences begin as the template does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(source)
    texts = [tokenizer.decode(ids) for ids in own_text.write_own_text(model, tokenizer, 6, 40, 0)]
    assert [text.startswith("[user]") for text in texts] == [False, True] * 3
    assert all("[assistant]" in text for text in texts[1::2])


def test_a_family_that_does_not_write(caplog):
    """A model that predicts no next token is calibrated on the dataset and random tokens."""
    model = make_family("diffusion_gemma")
    compressor = DernCompressor(dataset=random_tokens(9), self_share=0.5, **FIELDS)
    compressor.compress_model(model)
    assert "predicts a block of tokens at a time; give a dataset; only random token ids protect" in caplog.text
    assert list(compressor.report.calibration["sources"].values()) == [9, 3]
    with pytest.raises(ValueError, match="does not write calibration text"):
        DernCompressor(**FIELDS).compress_model(make_family("diffusion_gemma"))


def test_weights_that_changed_write_anew(source, tmp_path, monkeypatch):
    """Text that a run left behind before it had finished a layer is not that of other weights."""
    write, written = own_text.write_own_text, []
    monkeypatch.setattr(own_text, "write_own_text", lambda *args: written.append(1) or write(*args))
    monkeypatch.setattr(checkpoint, "_compress", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for seed in (0, 1):
        make_model("mixtral", seed=seed).save_pretrained(source)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    assert written == [1, 1]


def test_checks_before_the_weights_are_there(source, caplog):
    """`prepare` reads the data to check it, says nothing of text that is still to come, and leaves the loading."""
    model = AutoModelForCausalLM.from_pretrained(source)
    assert DernCompressor(dataset=random_tokens(12), self_share=0.5, **FIELDS).prepare(model) is None
    assert caplog.text == ""
    assert len(DernCompressor(dataset=random_tokens(12), self_share=0.0, **FIELDS).prepare(model)) == 3
    with pytest.raises(ValueError, match="holds no token"):
        DernCompressor(dataset=[], self_share=0.5, **FIELDS).prepare(model)


def test_the_bound_counts(source, tmp_path):
    """`max_memory` bounds the whole model, Python and torch included."""
    with pytest.raises(ValueError, match=r"takes 0\.6 GiB in memory .* and there are 0\.5"):
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out", max_memory="512MiB")
