"""`DernCompressor.compress_model`: what it changes, and what it leaves alone."""

import copy
import json
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    EXPERTS,
    FAMILIES,
    compress,
    make_model,
    random_tokens,
    same_state,
    sample_texts,
    state_of,
    tiny_tokenizer,
)

from optimum_dern import CompressionReport, DernCompressor, DernConfig
from optimum_dern.models.moe.structure import find_moe_layers


def logits(model):
    """Of a fixed batch."""
    with torch.no_grad():
        return model(torch.stack([row["input_ids"] for row in random_tokens(3, seed=99)])).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amount", [{"sparsity": 0.0, "num_experts": None}, {"num_experts": EXPERTS}])
def test_nothing_to_drop_is_the_identity(family, amount):
    """Sparsity 0 leaves every tensor and the config as they are."""
    model = make_model(family)
    before, config = state_of(model), model.config.to_dict()
    report = compress(model, **amount).report
    assert same_state(before, state_of(model))
    assert model.config.to_dict() == config
    assert report.before == report.after
    assert report.ratio == 1.0
    assert report.layers == []


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16(family):
    """Every tensor keeps its dtype, and the model still computes."""
    model = make_model(family).to(torch.bfloat16)
    for module in model.modules():  # stays float32 in DeepSeek-V3 checkpoints
        if "e_score_correction_bias" in module._buffers:
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    before = {name: tensor.dtype for name, tensor in state_of(model).items()}
    compress(model)
    assert {name: tensor.dtype for name, tensor in state_of(model).items()} == before
    assert torch.bfloat16 in before.values()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["sequential", "oneshot"])
def test_what_is_left_behind(training, order):
    """No hook and no replaced forward stays; the mode and all global random states are as before."""
    model = make_model("deepseek_v3").train(training)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    compress(model, calibration_order=order, dataset=sample_texts_tokens())
    assert random.getstate() == states[0]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    for module in model.modules():
        assert module.training == training
        assert not module._forward_pre_hooks and not module._forward_hooks and not module._backward_hooks
        assert "forward" not in module.__dict__


def sample_texts_tokens():
    """Token dicts of different lengths, so that batches are padded."""
    return [dict(tiny_tokenizer()(text)) for text in sample_texts()]


def test_text_needs_a_tokenizer():
    """Text is tokenised with the tokenizer given, to the same result as its tokens."""
    reports = []
    for dataset in (sample_texts(), sample_texts_tokens()):
        compressor = DernCompressor(num_experts=4, dataset=dataset, batch_size=4)
        compressor.compress_model(make_model("mixtral"), tiny_tokenizer())
        reports.append(compressor.report)
    assert reports[0].calibration["sha256"] == reports[1].calibration["sha256"]
    assert reports[0].layers[1].errors == reports[1].layers[1].errors
    assert reports[0].calibration["tokens"] == sum(len(text.encode()) for text in sample_texts())


def test_the_config_is_not_modified():
    """The same config serves several runs; every run's result is the same."""
    config = DernConfig(num_experts=4, dataset=random_tokens(), protect_experts={0: [7, 1]})
    before = copy.deepcopy(vars(config))
    models = [make_model("mixtral"), make_model("mixtral")]
    for model in models:
        DernCompressor(config).compress_model(model)
    dataset, saved = config.dataset, before.pop("dataset")
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(dataset, saved, strict=True))
    assert {name: value for name, value in vars(config).items() if name != "dataset"} == before
    assert same_state(*map(state_of, models))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_in_the_model(family):
    """The config and all modules agree on the new count, and the number chosen per token stays."""
    model = make_model(family)
    compress(model)
    keys = {"num_local_experts", "num_experts", "n_routed_experts"} & model.config.to_dict().keys()
    assert {model.config.to_dict()[key] for key in keys} == {4}
    assert model.config.num_experts_per_tok == 2
    for module in model.modules():
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            assert module.__dict__.get(name, 4) == 4
    for layer in find_moe_layers(model):
        assert layer.num_experts == layer.experts.down_proj.shape[0] == layer.router_weight.tensor.shape[0] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_afterwards(family):
    """A backward pass reaches every parameter of the retained experts and their router."""
    model = make_model(family).train()
    compress(model)
    ids = torch.stack([row["input_ids"] for row in random_tokens(8, seed=3)])
    model(ids, labels=ids).loss.backward()
    for layer in find_moe_layers(model):
        for parameter in [*layer.experts.parameters(), layer.router_weight.tensor]:
            assert parameter.requires_grad and parameter.is_leaf
            assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()


def test_frozen_parameters_stay_frozen():
    """`requires_grad` is carried over tensor by tensor."""
    model = make_model("mixtral").requires_grad_(False)
    compress(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"num_experts": 5, "experts_multiple_of": 4}, 8),
        ({"num_experts": 3, "experts_multiple_of": 2}, 4),
        ({"num_experts": None, "sparsity": 0.6, "experts_multiple_of": 2}, 4),
        ({"num_experts": None, "sparsity": 0.6}, 4),
        ({"num_experts": None, "sparsity": 0.25}, 6),
        ({"num_experts": None, "sparsity": 0.75}, 2),
        ({"num_experts": None}, 4),
    ],
)
def test_how_many_stay(fields, count):
    """Counts are rounded up, first to a whole expert, then to the multiple asked for."""
    model = make_model("mixtral")
    assert compress(model, **fields).report.after.experts == count == model.config.num_local_experts


def test_calibration_is_limited():
    """Sequences are cut at what the model's positions allow, and no more than `num_samples` are used."""
    rows = random_tokens(6, 200)
    calibration = compress(make_model("mixtral"), dataset=rows, num_samples=5).report.calibration
    assert (calibration["sequences"], calibration["tokens"]) == (5, 5 * 128)
    calibration = compress(make_model("mixtral"), dataset=rows, sequence_length=100).report.calibration
    assert (calibration["sequences"], calibration["tokens"]) == (6, 6 * 100)


def test_compressing_twice():
    """A compressed model is a model like any other: it can be compressed again."""
    model = make_model("qwen3_moe")
    first = compress(model, num_experts=6).report
    second = compress(model, num_experts=3).report
    assert first.after == second.before
    assert (second.before.experts, second.after.experts) == (6, 3) == (6, model.config.num_experts)
    assert logits(model).isfinite().all()


def test_groups_of_four():
    """A router with four groups keeps as many experts in each."""
    model = make_model("deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2)
    for layer in compress(model, num_experts=8).report.layers:
        assert [sum(expert // 4 == group for expert in layer.retained) for group in range(4)] == [2, 2, 2, 2]
    assert logits(model).isfinite().all()


def test_to_dict_round_trip():
    """The dict is JSON, names the tools' versions, and makes an equal compressor."""
    compressor = DernCompressor(num_experts=4, dataset="notes.txt", protect_experts={1: [3]}, refit=False)
    values = json.loads(json.dumps(compressor.to_dict()))
    assert any(tool.startswith("transformers:") for tool in values["meta"]["compressor"])
    assert DernCompressor.from_dict(values).config == compressor.config
    with pytest.raises(TypeError, match="sparsety"):
        DernCompressor.from_dict({"sparsety": 0.5})
    with pytest.raises(ValueError, match="num_experts"):
        DernCompressor(DernConfig(), num_experts=4)


def test_report_round_trip(tmp_path):
    """A report comes back from its file equal, totals included."""
    report = compress(make_model("qwen2_moe")).report
    report.save(tmp_path / "report.json")
    loaded = CompressionReport.load(tmp_path / "report.json")
    assert loaded == report
    assert json.loads((tmp_path / "report.json").read_text())["ratio"] == report.ratio < 1
    assert loaded.layers[0].errors == report.layers[0].errors != {}
    with pytest.raises(ValueError, match="version"):
        CompressionReport.from_dict({**report.to_dict(), "report_version": 99})


@contextmanager
def default_device():
    """A default that suits no generator of the CPU, as that of a GPU."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "plain": nullcontext,
    "default": default_device,
    "context": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "no_grad": torch.no_grad,
}
DRAWN = {"num_experts": 4, "dataset": random_tokens(), "num_samples": 10, "protect_experts": {0: [1]}, "batch_size": 4}


def state_of_torch():
    """What the contexts of `STATES` change."""
    switches = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    return torch.get_default_device(), *switches


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A checkpoint, and what becomes of it in memory and on disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = make_model("mixtral")
    model.save_pretrained(folder / "source")
    DernCompressor(**DRAWN).compress_checkpoint(folder / "source", folder / "out")
    DernCompressor(**DRAWN).compress_model(model)
    return folder / "source", state_of(model), load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("state", list(STATES)[1:])
def test_the_state_of_torch(undisturbed, tmp_path, state):
    """A default device, inference mode and autocast around a compression change no bit of it, and come back."""
    source, expected, expected_file = undisturbed
    model, compressor = make_model("mixtral"), DernCompressor(**DRAWN)
    with STATES[state]():
        before = state_of_torch()
        compressor.compress_model(model, batches=compressor.prepare(model))
        compressor.compress_checkpoint(source, tmp_path / "out")
        assert state_of_torch() == before
    assert same_state(state_of(model), expected)
    assert same_state(load_file(tmp_path / "out" / "model.safetensors"), expected_file)


def test_a_model_made_in_inference_mode(undisturbed):
    """Its parameters know no gradients; it is compressed all the same."""
    with torch.inference_mode():
        model = make_model("mixtral")
        DernCompressor(**DRAWN).compress_model(model)
    assert same_state(state_of(model), undisturbed[1])


@pytest.mark.parametrize("model", ["./mixtral", Path("mixtral")])
def test_a_path_is_no_model(model):
    """The message tells what takes one."""
    with pytest.raises(TypeError, match="takes a loaded model, not '.*mixtral'; compress_checkpoint"):
        DernCompressor().compress_model(model)
