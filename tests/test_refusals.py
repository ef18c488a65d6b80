"""Whatever cannot work is refused with the reason, and the model stays as it was to the bit."""

import pytest
import torch
from tiny import PAD, VOCABULARY, make_model, random_tokens, same_state, sample_texts, state_of, tiny_tokenizer

from optimum_dern import DernCompressor, DernConfig


def dense_model():
    """A Llama: no experts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def marked_as_quantised(family):
    """A model whose config says that a quantiser has been at it."""
    model = make_model(family)
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def with_kernels(family):
    """A model whose experts have been replaced by kernels from the Hub."""
    model = make_model(family)
    model._use_kernels = True
    return model


def without_weights(family):
    """A model one of whose layers is offloaded."""
    model = make_model(family)
    model.model.layers[1].mlp.experts.to("meta")
    return model


def broken(family, layer=0):
    """A model whose hidden states are NaN from one layer on."""
    model = make_model(family)
    norm = model.model.layers[layer].input_layernorm
    norm.weight.data[3] = torch.nan
    return model


def renamed(family, model_type):
    """A model that claims to be of a family that is refused by name."""
    model = make_model(family)
    model.config.__dict__["model_type"] = model_type
    return model


def check_refusal(model, match, error=ValueError, tokenizer=None, **fields):
    """Compressing raises, and changes neither a tensor nor the config."""
    before, config = state_of(model), model.config.to_dict()
    compressor = DernCompressor(**{"num_experts": 4, "dataset": random_tokens(), **fields})
    with pytest.raises(error, match=match):
        compressor.compress_model(model, tokenizer)
    after = state_of(model)
    real = {name for name, tensor in before.items() if tensor.device.type != "meta" and tensor.isfinite().all()}
    assert before.keys() == after.keys() and len(real) > len(before) // 2
    assert same_state({name: before[name] for name in real}, {name: after[name] for name in real})
    assert all(before[name].shape == after[name].shape for name in before)
    assert model.config.to_dict() == config
    assert compressor.report is None
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("mixtral", {"num_experts": 1}, r"num_experts=1 would leave 1 of 8 experts.*at least 2.*choose num_.*=2 to 7"),
        ("mixtral", {"num_experts": None, "sparsity": 0.9}, r"sparsity=0.9 would leave 1 of 8.*choose num_.*=2 to 7"),
        ("mixtral", {"num_experts": 9}, "num_experts=9, but each layer has 8 experts; choose num_experts=2 to 7"),
        ("deepseek_v3", {"num_experts": 5}, "the router's 2 groups; choose num_experts=4 to 6, a multiple of 2"),
        ("deepseek_v3", {"num_experts": 2}, "needs at least 4"),
        ("mixtral", {"method": "distil"}, "unknown method 'distil'.*dern, .*prune"),
        ("mixtral", {"selection": "astrology"}, "unknown selection criterion 'astrology'.*reap"),
        ("mixtral", {"dataset": []}, "holds no token"),
        ("mixtral", {"dataset": ["", "  \n"]}, "holds no token"),
        ("mixtral", {"dataset": sample_texts()}, "give a tokenizer"),
        ("mixtral", {"dataset": [{"input_ids": [1, VOCABULARY]}]}, "token 300, but the model's vocabulary has 300"),
        ("mixtral", {"protect_experts": {0: [8]}}, r"protected experts \[8\] do not exist"),
        ("mixtral", {"protect_experts": {0: [0, 1, 2, 3, 4]}}, "5 protected experts share 4 places"),
        ("mixtral", {"dataset": [{"input_ids": [1, 2], "attention_mask": [0, 0]}]}, "no calibration token reached"),
    ],
)
def test_requests(family, fields, match):
    """Counts that the router cannot work with, unknown names, unusable data."""
    check_refusal(make_model(family), match, **fields)


def test_top_k():
    """Fewer experts than each token chooses."""
    check_refusal(make_model("qwen3_moe", num_experts_per_tok=4), r"at least 4 \(top_k=4", num_experts=3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (dense_model, "has no Mixture-of-Experts layer"),
        (lambda: marked_as_quantised("mixtral"), "quantised"),
        (lambda: with_kernels("mixtral"), "use_kernels=False"),
        (lambda: without_weights("mixtral"), r"model\.layers\.1\.mlp are not in memory"),
        (lambda: broken("mixtral"), r"the inputs of model\.layers\.0\.mlp contain NaN"),
        (lambda: renamed("mixtral", "jetmoe"), "jetmoe models cannot be compressed"),
        (lambda: make_model("mixtral", num_local_experts=32), "as many experts as hidden units"),
    ],
)
def test_models(make, match):
    """Dense, quantised, offloaded and broken models, and those of families that cannot work."""
    check_refusal(make(), match)


def test_a_whole_model_without_weights():
    """A skeleton on the meta device."""
    with pytest.raises(ValueError, match="not in memory"):
        DernCompressor(num_experts=4, dataset=random_tokens()).compress_model(make_model("mixtral").to("meta"))


def test_mps(monkeypatch, tmp_path):
    """A device without float64, before anything is read; its number does not matter."""
    model = make_model("mixtral")
    monkeypatch.setattr(type(model), "device", torch.device("mps:0"))
    check_refusal(model, "the device 'mps:0' has no float64.*use the CPU")
    with pytest.raises(ValueError, match="the device 'mps' has no float64"):
        DernCompressor().compress_checkpoint(tmp_path / "nowhere", tmp_path / "out", device="mps")


def test_both_amounts():
    """A sparsity and a count contradict each other."""
    with pytest.raises(ValueError, match="both sparsity=0.5 and num_experts=4"):
        DernCompressor(sparsity=0.5, num_experts=4)


def test_saving_before_compressing(tmp_path):
    """There is nothing to save, and nothing is written."""
    with pytest.raises(ValueError, match="call compress_model first"):
        DernCompressor(DernConfig(num_experts=4)).save(make_model("mixtral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_need_two_experts_each():
    """Each group is scored by its two best experts, also where all groups may be chosen."""
    check_refusal(make_model("deepseek_v3", topk_group=2), "needs at least 4", num_experts=2)


def test_check_counts_without_changing_anything():
    """`check` tells how many experts would stay."""
    model = make_model("deepseek_v3")
    before = state_of(model)
    assert DernCompressor(num_experts=6, dataset=random_tokens()).check(model) == 6
    assert same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("make", "fields", "match"),
    [
        pytest.param(make_model, {"protect_experts": {1: [8]}}, "do not exist", id="protected"),
        pytest.param(make_model, {"protect_experts": {1: [0, 1, 2, 3, 4]}}, "share 4 places", id="crowded"),
        pytest.param(lambda family: broken(family, 1), {}, r"layers\.1\.mlp contain NaN", id="nan"),
    ],
)
def test_refusals_of_a_later_layer(make, fields, match):
    """What is wrong with a later layer does not leave the earlier ones compressed."""
    check_refusal(make("mixtral"), match, **fields)


def test_protection_of_a_dense_layer():
    """A protected expert in a layer without experts, or beyond the last layer, is a mistake."""
    check_refusal(make_model("deepseek_v3"), "layer", protect_experts={0: [1]})


def test_negative_tokens():
    """Ids such as the label mask -100 are no tokens."""
    check_refusal(make_model("mixtral"), "token -100", dataset=[{"input_ids": [1, -100]}])


def test_empty_token_rows():
    """Token dicts without tokens are no data."""
    check_refusal(make_model("mixtral"), "holds no token", dataset=[{"input_ids": []}])


def test_the_guard_needs_a_token_to_judge_by():
    """With a single short sequence the guard must not declare every candidate perfect."""
    compressor = DernCompressor(num_experts=4, dataset=random_tokens(1, 9))
    compressor.compress_model(make_model("mixtral"))
    for layer in compressor.report.layers:
        assert layer.held_out_tokens > 0
        assert layer.errors["pruned"] > 0


def test_text_of_another_tokenizer():
    """A tokenizer with more entries than the model's vocabulary is caught by its ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(PAD + 1, VOCABULARY + 1)])
    check_refusal(
        make_model("mixtral"), "give the tokenizer that belongs", tokenizer=tokenizer, dataset=["a <extra 300>"]
    )
