"""The examples run as they stand, on the trained models of the repository; one is measured on less text."""

import functools
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from optimum_dern.evaluation.loss import perplexity
from optimum_dern.evaluation.loss.perplexity import evaluate_loss, load_texts


ROOT = Path(__file__).parent.parent
EVALUATION = ROOT / "examples" / "tiny_moe" / "text" / "evaluation"
SEQUENCES = 24  # of every text of evaluation, for the example that needs no more


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """What a script prints, run in a folder of its own; in this process, which has imported the large packages."""

    def run(name, *arguments, sequences=None):
        monkeypatch.setattr(perplexity, "load_texts", functools.partial(load_texts, limit=sequences))
        script = str(ROOT / "examples" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def table_of(text):
    """Rows of numbers by their first words."""
    rows = [line.rsplit(maxsplit=2) for line in text.splitlines() if line[-1:].isdigit()]
    return {name.strip(): [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}


@pytest.mark.slow
def test_quickstart_then_generate(run_example):
    """Compress and save with one script, write words with the other, in plain transformers."""
    assert "of the bytes" in run_example("quickstart.py")
    text = run_example("generate.py", "build/quickstart", "The city of")
    assert text.startswith("4 experts: 'The city of")


@pytest.mark.slow
def test_compress_at_load(run_example, tmp_path):
    """What transformers loads is compressed, writes words, and saves itself."""
    text = run_example("compress_at_load.py")
    assert "MixtralForCausalLM with 4 experts" in text and "'The city of" in text
    saved = {file.name for file in (tmp_path / "build" / "compress_at_load").iterdir()}
    assert saved >= {"config.json", "model.safetensors", "README.md", "dern_report.json", "tokenizer.json"}


@pytest.mark.slow
def test_evaluate_with_trainer(run_example):
    """The table holds both models' metrics on the same tokens, and they hang together."""
    table = table_of(run_example("evaluate_with_trainer.py"))
    assert table["experts a layer"] == [8, 4]
    assert table["parameters"][1] < 0.6 * table["parameters"][0]
    assert table["tokens"] == [128 * 255] * 2
    before, after = table["token_loss"]
    assert 3.2 < before < after < before + 0.1
    assert table["perplexity"] == pytest.approx([math.exp(before), math.exp(after)], rel=1e-3)
    for first, top in zip(table["token_accuracy"], table["top5_accuracy"], strict=True):
        assert 0.3 < first < 0.36 < 0.5 < top < 0.6


@pytest.mark.slow
def test_heal_with_lora(run_example, tmp_path):
    """Healing takes back a part of the loss, and the saved checkpoint is the healed model."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = table_of(run_example("heal_with_lora.py"))
    before, compressed, healed = (table[name][0] for name in ("before compression", "compressed", "healed"))
    assert before < compressed < before + 0.1
    assert healed < compressed - 0.001
    folder = tmp_path / "build" / "healed"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(info.values())
    assert model.config.num_local_experts == 4
    texts = load_texts(EVALUATION, AutoTokenizer.from_pretrained(folder), 256)
    loss = evaluate_loss(model, [batch for batches in texts.values() for batch in batches[:2]])
    assert loss.loss == pytest.approx(healed, abs=2e-4)


@pytest.mark.slow
def test_finetune_condensed(run_example, tmp_path):
    """Half of the layers become dense; training them takes a part of the loss back, in a plain checkpoint."""
    from transformers import AutoConfig

    text = run_example("finetune_condensed.py", sequences=SEQUENCES)
    table = table_of(text)
    original, condensed, tuned = (table[name][0] for name in ("original", "condensed", "fine-tuned"))
    assert original < condensed < original + 0.4
    assert tuned < condensed - 0.01
    assert "0.62 of the parameters" in text
    config = AutoConfig.from_pretrained(tmp_path / "build" / "condensed")
    assert len(config.mlp_only_layers) == 2 and config.intermediate_size == 256


@pytest.mark.slow
def test_search_arithmetic(run_example, tmp_path):
    """Trains, saves and searches; four steps of training teach nothing yet."""
    text = run_example("search_arithmetic.py", "--output", "sums", "--steps", "4")
    assert text.count("experts, right: ") == 3 and text.count("Cost(written=") == 3
    assert (tmp_path / "sums" / "model.safetensors").exists()
