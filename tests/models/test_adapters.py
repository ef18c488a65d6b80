"""Models with PEFT adapters: refused wherever something else than what they compute would be compressed or saved."""

import pytest
import torch
from tiny import compress, make_model, random_tokens, same_state, state_of

from optimum_dern import DernCompressor
from optimum_dern.models.adapters import has_adapter


peft = pytest.importorskip("peft")
PRUNE = {"method": "prune", "preset": "paper"}
TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def lora(targets="attention"):
    """A config whose adapters are no identity."""
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **TARGETS[targets])


def wrapped(model, targets="attention"):
    """The model inside a PeftModel."""
    return peft.get_peft_model(model, lora(targets))


def merged(model, targets="attention"):
    """The same, its adapters added to the weights, but still there."""
    adapted = wrapped(model, targets)
    adapted.merge_adapter()
    return adapted


def injected(model, targets="attention"):
    """A plain transformers class with layers of peft inside."""
    return peft.inject_adapter_in_model(lora(targets), model)


def base_of_wrapped(model, targets="attention"):
    """What a PeftModel was made of, which it has changed in place."""
    wrapped(model, targets)
    return model


WAYS = [wrapped, merged, injected, base_of_wrapped]


def logits(model):
    """Of a fixed batch."""
    with torch.no_grad():
        return model(torch.stack([row["input_ids"] for row in random_tokens(3, seed=9)])).logits


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("way", WAYS)
def test_compressing(way, targets):
    """Refused before any work, and nothing changes."""
    model = way(make_model("mixtral"), targets)
    before = state_of(model)
    compressor = DernCompressor(num_experts=4, dataset=random_tokens(), **PRUNE)
    for job in (compressor.compress_model, compressor.prepare, compressor.check):
        with pytest.raises(ValueError, match=r"carries PEFT adapters.*model = peft_model.merge_and_unload\(\)"):
            job(model)
    assert compressor.report is None and same_state(state_of(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_saving(way, tmp_path):
    """Adapters put on after the compression: nothing is written, by any way to save; merged, it is what computes."""
    model = make_model("mixtral")
    compressor = compress(model, **PRUNE)
    adapted = way(model)
    jobs = [lambda: compressor.save(adapted, tmp_path / "out"), lambda: compressor.push_to_hub(adapted, "me/model")]
    if way is not wrapped and way is not merged:
        jobs += [lambda: model.save_pretrained(tmp_path / "out"), lambda: model.push_to_hub("me/model")]
    for job in jobs:
        with pytest.raises(ValueError, match="carries PEFT adapters.*merge_and_unload"):
            job()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("way", [wrapped, merged])
def test_merged_and_unloaded(way, targets, tmp_path):
    """What the message asks for works: the saved checkpoint computes what the model with its adapters does."""
    from transformers import AutoModelForCausalLM

    model = make_model("mixtral")
    compressor = compress(model, **PRUNE)
    plain = logits(model)
    adapted = way(model, targets)
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 0.1
    result = adapted.merge_and_unload()
    assert not has_adapter(result)
    compressor.save(result, tmp_path)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path)) - expected).abs().max() < 1e-4


def test_adapters_alone(tmp_path):
    """An adapter is still saved as ever: by its wrapper, which a trainer does at every checkpoint."""
    model = make_model("mixtral")
    compress(model, **PRUNE)
    wrapped(model).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "README.md").read_text().count("experts")
    assert not (tmp_path / "config.json").exists()


def test_adapters_of_transformers(tmp_path):
    """`add_adapter` of transformers: the model's own method saves the adapter and nothing that it is not part of."""
    model = make_model("mixtral")
    compressor = compress(model, **PRUNE)
    try:
        model.add_adapter(lora())
    except ValueError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="merge_and_unload"):
        compressor.save(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"config.json", "dern_report.json", "dern_config.json"}
