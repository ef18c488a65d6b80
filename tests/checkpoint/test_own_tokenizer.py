"""Tokenizers with code of their own: run with consent alone, everywhere, and saved with their code."""

import logging

import pytest
from own_code import save_own_tokenizer
from tiny import make_model, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor, DernConfig, DernModelForCausalLM, patch_transformers, unpatch_transformers
from optimum_dern.commands.main import main


FIELDS = {"num_experts": 4, "dataset": sample_texts(), "method": "prune", "preset": "paper", "batch_size": 4}
FAMILY = "deepseek_v3"  # transformers has no tokenizer of its own for it, to take instead
REFUSED = "has code of its own; read it, and allow it with trust_remote_code=True"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkpoint whose tokenizer has code of its own; `ran` beside it tells if that has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "source"
    make_model(FAMILY).save_pretrained(folder)
    return save_own_tokenizer(folder, tmp_path / "ran")


def in_memory(source, **trust):
    """`compress_model` with text and without a tokenizer."""
    compressor = DernCompressor(**FIELDS)
    compressor.compress_model(AutoModelForCausalLM.from_pretrained(source), **trust)
    return compressor.report


def on_disk(source, **trust):
    """`compress_checkpoint`."""
    return DernCompressor(**FIELDS).compress_checkpoint(source, source.parent / "out", **trust)


def by_path(source, **trust):
    """`compress_model` with the tokenizer's folder."""
    compressor = DernCompressor(**FIELDS)
    compressor.compress_model(make_model(FAMILY), str(source), **trust)
    return compressor.report


def by_facade(source, **trust):
    """`DernModelForCausalLM`."""
    return DernModelForCausalLM.from_pretrained(source, dern_config=DernConfig(**FIELDS), **trust).dern_report


def by_patch(source, **trust):
    """`AutoModelForCausalLM`, patched."""
    patch_transformers()
    try:
        return AutoModelForCausalLM.from_pretrained(source, dern_config=DernConfig(**FIELDS), **trust).dern_report
    finally:
        unpatch_transformers()


@pytest.mark.parametrize("way", [in_memory, on_disk, by_path, by_facade, by_patch])
def test_consent(way, source):
    """Refused without it before anything is run or asked; with it the tokenizer's own tokens calibrate."""
    with pytest.raises(ValueError, match=REFUSED):
        way(source)
    assert not (source.parent / "ran").exists()
    report = way(source, trust_remote_code=True)
    assert (source.parent / "ran").exists()
    plain, backwards = DernCompressor(**FIELDS), [text[::-1] for text in sample_texts()]
    plain.config.dataset = backwards
    plain.compress_model(make_model(FAMILY), tiny_tokenizer())
    assert report.calibration["sha256"] == plain.report.calibration["sha256"]


def test_a_quantization_config(source):
    """transformers does not tell a quantizer of the consent: the message says what to do, and tokens need none."""
    with pytest.raises(ValueError, match=REFUSED + ".*or token ids instead of text"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=DernConfig(**FIELDS), trust_remote_code=True)


@pytest.mark.parametrize("trust", [(), ("--trust-remote-code",)])
def test_commands(trust, source, capsys):
    """`compress`, with --evaluate and without, and `evaluate` ask for the option, and pass it on."""
    text = source.parent / "text.jsonl"
    text.write_text("\n".join(f'"{text}"' for text in sample_texts()), "utf-8")
    options = ["--num-experts", "4", "--method", "prune", "--preset", "paper", "--batch-size", "4"]
    compress = ["--dataset", str(text), *options]
    jobs = [
        ["compress", str(source), str(source.parent / "plain"), *compress],
        ["compress", str(source), str(source.parent / "out"), *compress, "--evaluate", str(text)],
        ["evaluate", str(source), "--data", str(text)],
    ]
    for job in jobs:
        if trust:
            main([*job, *trust])
            continue
        with pytest.raises(SystemExit):
            main(job)
        assert "trust_remote_code=True" in capsys.readouterr().err
    assert (source.parent / "ran").exists() == bool(trust)


@pytest.mark.parametrize("tokenizer", ["none", "path", "object"])
def test_saving(tokenizer, source, tmp_path):
    """The tokenizer is saved with its code after `compress_model`, as it is by `compress_checkpoint`."""
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    compressor = DernCompressor(**FIELDS)
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(source), loaded)
    compressor.save(model, tmp_path / "memory", {"none": None, "path": str(source), "object": loaded}[tokenizer])
    DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "disk", loaded)
    for folder in (tmp_path / "memory", tmp_path / "disk"):
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert type(again).__name__ == "OwnTokenizer" and (folder / "tokenization_own.py").is_file()
        assert again("some text")["input_ids"] == tiny_tokenizer()("txet emos")["input_ids"]


def test_saving_runs_nothing(source, tmp_path):
    """Files are copied."""
    compressor = DernCompressor(**FIELDS)
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(source), tiny_tokenizer())
    compressor.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenization_own.py").is_file() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tokenizer", [None, "me/nowhere"])
def test_a_tokenizer_that_is_not_to_be_had(tokenizer, tmp_path, caplog):
    """The checkpoint is saved, and a warning says that it has no tokenizer; a model made in memory needs none."""
    model = make_model("mixtral")
    model.config.name_or_path = "me/model"
    compressor = DernCompressor(**FIELDS)
    compressor.compress_model(model, tiny_tokenizer())
    with caplog.at_level(logging.WARNING):
        compressor.save(model, tmp_path / "out", tokenizer)
    assert f"no tokenizer is saved, for {tokenizer or 'me/model'} gives none" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()
