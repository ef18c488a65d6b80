"""How sequences are put into micro-batches decides about the number of forward passes, and about nothing else."""

import pytest
import torch
from tiny import make_checkpoint, make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.run.model_batches import load_model_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_loss
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers


LENGTHS = (4, 15, 9, 21, 30, 11, 9, 15, 26, 9, 18, 12)
ROWS = [random_tokens(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
FIELDS = {"num_experts": 4, "self_share": 0.0, "random_share": 0.25, "sequence_length": 24}


def compress(family, **fields):
    """The report of a compression, and the compressed model's loss on other text."""
    model, compressor = make_model(family), DernCompressor(**FIELDS | fields)
    compressor.compress_model(model)
    return compressor.report, evaluate_loss(model, load_batches(random_tokens(6, 24, seed=50), None)).loss


def assert_equal(found, expected):
    """Two reports, up to rounding."""
    assert found.calibration == expected.calibration
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for name in ("retained", "tokens", "held_out_tokens", "winner"):
            assert getattr(layer, name) == getattr(other, name)
        assert layer.saliency == pytest.approx(other.saliency, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3_moe", {}),
        ("mixtral", {"calibration_order": "oneshot"}),
        ("mixtral", {"neuron_refit": False, "selection": "greedy"}),
        ("deepseek_v3", {"preset": "paper"}),
    ],
)
def test_results_do_not_depend_on_the_batches(family, fields):
    """Sequences of several lengths and two sources: the same digest, tokens held out, experts, winners and loss."""
    report, loss = compress(family, dataset=ROWS, batch_size=1, **fields)
    assert len(report.calibration["sources"]) == 2
    assert (report.layers[0].held_out_tokens > 0) == report.config["guard"]
    for size in (4, None):
        other, its_loss = compress(family, dataset=ROWS, batch_size=size, **fields)
        assert_equal(other, report)
        assert its_loss == pytest.approx(loss, abs=1e-3)


def calls_of_attention(batch_size, rows):
    """How often the first layer's attention runs in a compression, and in an evaluation."""
    model, calls = make_model("mixtral"), []
    layer = find_decoder_layers(model, find_moe_layers(model)[0])[1][0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    fields = {"num_experts": 4, "self_share": 0.0, "preset": "paper", "batch_size": batch_size}
    DernCompressor(dataset=rows, **fields).compress_model(model)
    compressing = len(calls)
    evaluate_loss(model, load_batches(rows, None, batch_size=batch_size))
    return compressing, len(calls) - compressing


def test_short_sequences_take_few_passes():
    """Sixty-four sequences, one after the other or all at once."""
    rows = random_tokens(64, 24)
    alone, together = calls_of_attention(1, rows), calls_of_attention(None, rows)
    assert alone == tuple(64 * calls for calls in together) and together[1] == 1


@pytest.mark.parametrize(("family", "mixed"), [("mixtral", True), ("glm_moe_dsa", False)])
def test_models_that_heed_padding_get_none(family, mixed):
    """Their sequences run beside those of the same length only; all others need not be of one length."""
    from families import make_model as make_family

    config = DernCompressor(**FIELDS | {"dataset": ROWS}).config
    batches = load_model_batches(config, make_family(family))
    assert (len(batches) == 1) == mixed
    assert all(batch["attention_mask"].all() for batch in batches) != mixed
    assert len({len(batch["input_ids"]) for batch in batches}) > 1 or mixed


def test_eager_attention_bounds_a_pass(monkeypatch):
    """No more scores at once than the bound, however short the sequences."""
    monkeypatch.setattr("optimum_dern.data.batches.NUMBERS", 4 * 24 * 24 * 10)  # of ten sequences with four heads
    config = DernCompressor(**FIELDS | {"dataset": random_tokens(30, 24), "random_share": 0.0}).config
    model = make_model("mixtral")
    assert [len(batch["input_ids"]) for batch in load_model_batches(config, model)] == [30]
    model.set_attn_implementation("eager")
    assert [len(batch["input_ids"]) for batch in load_model_batches(config, model)] == [10, 10, 10]


def test_from_disk_and_in_memory(tmp_path):
    """A checkpoint gives by tokens what the model in memory gives in threes, and its report has no batch size."""
    source = make_checkpoint(tmp_path / "source")
    torch.save([row["input_ids"] for row in ROWS], tmp_path / "rows.pt")
    fields = {"dataset": tmp_path / "rows.pt", "preset": "paper", "random_share": 0.0}  # which a tokenizer changes
    compressor = DernCompressor(**FIELDS | fields)
    report = compressor.compress_checkpoint(source, tmp_path / "out", device="cpu")
    assert report.config["batch_size"] is None
    assert_equal(report, compress("mixtral", **fields, batch_size=3)[0])
