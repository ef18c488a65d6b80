"""What compression does to the trained models of the repository: a small, fixed version of benchmarks/quality.py."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, evaluation_length, load_texts


TINY = Path(__file__).parent.parent / "examples" / "tiny_moe"
SEQUENCES = {"scratch": 32, "upcycled": 64}  # for calibration, of 256 tokens; fewer do not tell as much apart


@pytest.mark.parametrize("name", ["scratch", "upcycled"])
def test_size_and_files(name):
    """At most 10 MB of weights, in bfloat16, with a tokenizer."""
    folder = TINY / name
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == 2048


@pytest.mark.parametrize("name", ["scratch", "upcycled"])
def test_the_config_promises_what_training_gave(name):
    """Windows of 256 tokens, so that losses are measured on such; longer text still runs, and costs more."""
    model = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    assert evaluation_length(model.config) == tokenizer.model_max_length == 256
    text = TINY / "text" / "evaluation" / "news_wikinews_en.txt"
    losses = [
        evaluate_texts(model, load_texts(text, tokenizer, length, limit=8192 // length)) for length in (256, 1024)
    ]
    short, long = (loss["news_wikinews_en"].loss for loss in losses)
    assert short + 0.1 < long


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scratch", "upcycled"])
def test_recommended_beats_pruning_beats_chance(name):
    """Loss increase over all domains: recommended < half-way to pruning by router load < a random keep-set."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    full = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
    texts = load_texts(TINY / "text" / "evaluation", tokenizer, 256)
    texts = {domain: batches[:1] for domain, batches in texts.items()}
    before = evaluate_texts(full, texts)

    def increase(**fields):
        model = copy.deepcopy(full)
        data = {"dataset": str(TINY / "text" / "calibration"), "num_samples": SEQUENCES[name]}
        DernCompressor(**data, sequence_length=256, batch_size=8, **fields).compress_model(model, tokenizer)
        after = evaluate_texts(model, texts)
        return sum(after[domain].loss - before[domain].loss for domain in texts) / len(texts)

    chance = increase(method="prune", preset="paper", selection="random")
    pruned = increase(method="prune", preset="paper")
    recommended = increase()
    assert recommended < 0.7 * pruned
    assert pruned < 0.5 * chance
