"""The published `config.json`: the source's own file, in which only what changed is different."""

import copy
import json

import pytest
import torch
from tiny import FAMILIES, make_model, random_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.config_json import compressed_config
from optimum_dern.checkpoint.source.provenance import source_config


COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
EXTRAS = {  # what older files have and newer ones do not
    "torch_dtype": "float32",
    "rope_theta": 12345.0,
    "rope_scaling": None,
    "transformers_version": "4.46.0",
    "a key of the authors' own": {"kept": [1, 2]},
    "num_nextn_predict_layers": 0,
}


@pytest.fixture
def old_checkpoint(tmp_path):
    """Save a family's model the way transformers 4 did: `make(family, **changes)` gives the folder and its JSON."""

    def make(family, **changes):
        make_model(family).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text("utf-8"))
        for key in ("dtype", "rope_parameters", "transformers_version"):
            config.pop(key, None)
        if family == "qwen3_moe":
            config["num_experts"] = config.pop("num_local_experts")
        source = dict(reversed(list({**config, **EXTRAS, **changes}.items())))
        path.write_text(json.dumps(source), "utf-8")
        return tmp_path, source

    return make


def published(folder, output, dtype=None, **fields):
    """Compress the checkpoint in a folder and read the config.json that is saved."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    compressor = DernCompressor(**{"num_experts": 4, "dataset": random_tokens(), **fields})
    compressor.compress_model(model)
    compressor.save(model if dtype is None else model.to(dtype), output)
    return json.loads((output / "config.json").read_text("utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_counts_differ(old_checkpoint, tmp_path, family):
    """Every key of the source stays, in its order, with its value; only counts change, under all aliases."""
    folder, source = old_checkpoint(family)
    result = published(folder, tmp_path / "out")
    assert list(result)[: len(source)] == list(source)
    assert {key for key in source if result[key] != source[key]} == {key for key in COUNT_KEYS if key in source}
    assert {key: value for key, value in result.items() if key not in source}.items() <= {
        "num_experts": 4,
        "num_local_experts": 4,
    }.items()
    assert {result[key] for key in COUNT_KEYS if key in result} == {4}
    if family == "qwen3_moe":
        assert result["num_experts"] == result["num_local_experts"] == 4


def test_rope_theta_survives(old_checkpoint, tmp_path):
    """Old readers find the base where the source had it, and new ones load the same rotary embedding."""
    folder, _ = old_checkpoint("mixtral")
    published(folder, tmp_path / "out")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out")]
    frequencies = [model.model.rotary_emb.inv_freq for model in models]
    assert torch.equal(*frequencies)
    assert frequencies[0][1] == pytest.approx(12345.0 ** (-2 / 8))


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_new_dtype_goes_under_the_old_name(old_checkpoint, tmp_path, key):
    """A model that was converted says so, under the name that the source uses."""
    folder, source = old_checkpoint("mixtral")
    if key == "dtype":
        source["dtype"] = source.pop("torch_dtype")
        (folder / "config.json").write_text(json.dumps(source), "utf-8")
    result = published(folder, tmp_path / "out", torch.bfloat16)
    assert result[key] == "bfloat16"
    assert not {"torch_dtype", "dtype"} - {key} & result.keys()


def test_layers_for_prediction_are_gone(old_checkpoint, tmp_path):
    """The extra prediction layers of DeepSeek-V3 are not saved, so the config must not promise them."""
    folder, source = old_checkpoint("deepseek_v3", num_nextn_predict_layers=1)
    result = published(folder, tmp_path / "out")
    assert source["num_nextn_predict_layers"] == 1
    assert result["num_nextn_predict_layers"] == 0


def test_nothing_changed_nothing_differs(old_checkpoint, tmp_path):
    """Sparsity 0 publishes the source's values unchanged."""
    folder, source = old_checkpoint("olmoe")
    assert published(folder, tmp_path / "out", num_experts=None, sparsity=0.0) == source


def test_a_model_from_nowhere():
    """Without a source there is nothing to keep, and the saved JSON is completed."""
    model = make_model("qwen3_moe")
    assert source_config(model) is None
    result = compressed_config(model.config.to_dict(), None, model.config)
    assert result["num_experts"] == result["num_local_experts"] == 8


def test_a_quantisation_is_not_carried_over():
    """A compressed checkpoint is not quantised, whatever the source's file says."""
    config = make_model("mixtral").config
    source = {**config.to_dict(), "quantization_config": {"quant_method": "fp8"}}
    assert "quantization_config" not in compressed_config(config.to_dict(), source, config)


def test_a_source_of_another_type_is_ignored():
    """A text model taken out of a composite checkpoint does not get the composite's file."""
    config = make_model("mixtral").config
    source = {"model_type": "llava", "text_config": config.to_dict()}
    assert compressed_config(config.to_dict(), source, config)["model_type"] == "mixtral"


def test_the_inputs_are_not_modified():
    """Neither the saved nor the source's dict is written to."""
    config = make_model("deepseek_v3").config
    source = {**config.to_dict(), "num_nextn_predict_layers": 2}
    saved = config.to_dict()
    copies = copy.deepcopy((saved, source))
    config.n_routed_experts = 4
    assert compressed_config(saved, source, config)["n_routed_experts"] == 4
    assert (saved, source) == copies


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm4v_moe"])
def test_nested_text_config(model_type):
    """In a composite config the count of the text part changes, and nothing else does."""
    config = AutoConfig.for_model(model_type)
    source = json.loads(json.dumps(config.to_dict()))
    source["text_config"].pop("num_experts", None)
    source["text_config"]["rope_theta"] = 777.0
    source["authors"] = "kept"
    key = next(key for key in COUNT_KEYS if key in source["text_config"])
    config = type(config).from_dict(copy.deepcopy(source))
    setattr(config.text_config, key, 4)
    result = compressed_config(config.to_dict(), source, config)
    text = result["text_config"]
    assert {name for name in text if text[name] != source["text_config"].get(name)} - {"num_experts"} == {key}
    assert text[key] == 4 and text.get("num_experts", 4) == 4
    assert text["rope_theta"] == 777.0
    assert {name: value for name, value in result.items() if name != "text_config"} == {
        name: value for name, value in source.items() if name != "text_config"
    }
