"""Rotary embeddings that transformers 5 wrote, for readers that look for them in the older form."""

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from elsewhere import run_elsewhere, transformers_4
from families import make_config as family_config
from load_families import observe
from tiny import compress, make_config, make_model, random_tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.config_json import complete_rope, compressed_config


TINY = Path(__file__).parents[3] / "examples" / "tiny_moe"
PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 7.0]}
LONG |= {"rope_theta": 20000.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 20000.0, "factor": 2.0}
SHORT_TEXT = {"original_max_position_embeddings": 32}  # beyond it PhiMoE has other frequencies in transformers 4 and 5
OF_FAMILIES = {  # family and rotary embedding
    "mixtral": ("mixtral", PLAIN),
    "qwen3_moe": ("qwen3_moe", YARN),
    "olmoe": ("olmoe", LLAMA3),
    "qwen2_moe, linear": ("qwen2_moe", LINEAR),
    "qwen2_moe, dynamic": ("qwen2_moe", DYNAMIC),
    "phimoe": ("phimoe", {**LONG, **SHORT_TEXT, "short_mscale": 1.25, "long_mscale": 1.5}),
    "qwen3_moe, longrope": ("qwen3_moe", LONG),
    "glm4_moe": ("glm4_moe", {**PLAIN, "partial_rotary_factor": 0.75}),
    "deepseek_v3": ("deepseek_v3", {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "gpt_oss": ("gpt_oss", {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
}


def read_json(folder):
    """The config.json of a folder."""
    return json.loads((folder / "config.json").read_text("utf-8"))


def saved_by_5(rope, family="mixtral"):
    """A config's JSON as transformers 5 saves it, and the config."""
    config = make_config(family, rope_parameters=copy.deepcopy(rope))
    return json.loads(config.to_json_string()), config


def test_the_older_form():
    """What each reader looks for: the base by itself, the rest without it, nothing for an ordinary embedding."""
    for rope in (PLAIN, YARN, LLAMA3, LINEAR, DYNAMIC):
        values, config = saved_by_5(rope)
        assert values["rope_parameters"] == rope and "rope_theta" not in values
        expected = {key: value for key, value in rope.items() if key != "rope_theta"}
        complete_rope(values, config)
        assert values["rope_parameters"] == rope
        assert values["rope_theta"] == 20000.0
        assert values["rope_scaling"] == (None if rope is PLAIN else expected)
        assert "partial_rotary_factor" not in values


def test_a_partial_embedding():
    """The share of the dimensions that rotate stands by itself."""
    values, config = saved_by_5({**PLAIN, "partial_rotary_factor": 0.5}, "qwen3_moe")
    complete_rope(values, config)
    assert (values["rope_scaling"], values["partial_rotary_factor"]) == (None, 0.5)


def test_longrope():
    """The length before the extension is looked for at the top."""
    values, config = saved_by_5(LONG, "qwen3_moe")
    complete_rope(values, config)
    assert values["original_max_position_embeddings"] == 8
    assert values["rope_scaling"]["long_factor"] == LONG["long_factor"]


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_transformers_5_reads_the_same(name):
    """The config object of the new file is that of the old one."""
    family, rope = OF_FAMILIES[name]
    config = AutoConfig.for_model(family, rope_parameters=copy.deepcopy(rope), max_position_embeddings=128)
    before = json.loads(config.to_json_string())
    after = copy.deepcopy(before)
    complete_rope(after, config)
    assert after != before
    objects = [type(config).from_dict(copy.deepcopy(values)) for values in (before, after)]
    assert objects[0].rope_parameters == objects[1].rope_parameters


def test_composite_models():
    """In the part that holds it, be it the text's or the vision tower's, and nowhere else."""
    config = family_config("llama4")
    values = json.loads(config.to_json_string())
    config.text_config.num_local_experts = 4
    result = compressed_config(config.to_dict(), values, config)
    assert (result["text_config"]["rope_theta"], result["text_config"]["rope_scaling"]) == (20000.0, None)
    assert result["vision_config"]["rope_theta"] == values["vision_config"]["rope_parameters"]["rope_theta"]
    assert "rope_theta" not in result


def test_sections():
    """Of a multimodal embedding the ordinary type stays with its sections."""
    config = family_config("qwen3_vl_moe")
    result = compressed_config(config.to_dict(), json.loads(config.to_json_string()), config)
    assert result["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 1, 1]}


@pytest.mark.parametrize("family", ["mellum", "deepseek_v4", "gemma4", "cohere2_moe", "jamba", "kimi_linear"])
def test_what_stays_as_it_is(family):
    """A map for types of layers, a field of the class's own, and models without an embedding of this kind."""
    config = family_config(family)
    values = json.loads(config.to_json_string())
    result = copy.deepcopy(values)
    complete_rope(result, config)
    assert "rope_parameters" in json.dumps(values) and result == values


def test_a_file_with_the_older_form_keeps_it():
    """The source's own values are not replaced, and a second compression changes nothing."""
    values, config = saved_by_5(YARN)
    complete_rope(values, config)
    again = copy.deepcopy(values)
    complete_rope(again, config)
    assert again == values
    values["rope_theta"] = 5.0  # of two that disagree, transformers 5 takes this one
    config = type(config).from_dict(copy.deepcopy(values))
    assert compressed_config(config.to_dict(), values, config) == values | {"num_experts": 8}


@pytest.mark.parametrize("form", ["older", "newer", "both"])
def test_a_change_in_memory(form):
    """An embedding that was changed when the model was loaded is the published one, in every form."""
    values, config = saved_by_5(LINEAR)
    if form != "newer":
        complete_rope(values, config)
    if form == "older":
        values.pop("rope_parameters")
    config.rope_parameters = copy.deepcopy(YARN)
    result = compressed_config(config.to_dict(), values, config)
    assert type(config).from_dict(copy.deepcopy(result)).rope_parameters == result["rope_parameters"] == YARN
    assert result["rope_scaling"] == {key: value for key, value in YARN.items() if key != "rope_theta"}


@pytest.mark.parametrize("way", ["save", "save_pretrained", "checkpoint", "no source"])
def test_every_way_of_saving(tmp_path, way):
    """Each writes the older form, and transformers 5 computes what it would without."""
    source, output = tmp_path / "source", tmp_path / "output"
    model = make_model("qwen3_moe", rope_parameters=copy.deepcopy(YARN))
    model.save_pretrained(source)
    assert "rope_theta" not in read_json(source)
    if way == "checkpoint":
        DernCompressor(num_experts=4, dataset=random_tokens(), batch_size=4).compress_checkpoint(source, output)
    else:
        model = model if way == "no source" else AutoModelForCausalLM.from_pretrained(source)
        compressor = compress(model)
        (model.save_pretrained if way == "save_pretrained" else lambda path: compressor.save(model, path))(output)
    result = read_json(output)
    assert (result["rope_theta"], result["num_experts"]) == (20000.0, 4)
    assert result["rope_scaling"] == {key: value for key, value in YARN.items() if key != "rope_theta"}
    ids = torch.arange(60).view(1, -1)
    new = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    for key in ("rope_theta", "rope_scaling"):
        result.pop(key)
    (output / "config.json").write_text(json.dumps(result), "utf-8")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(ids).logits, new)


@pytest.mark.parametrize("name", ["upcycled", "scratch"])
def test_the_models_of_the_repository(tmp_path, name):
    """They have the older form, as the script that trains them writes it."""
    model = AutoModelForCausalLM.from_pretrained(TINY / name)
    model.config.save_pretrained(tmp_path)
    assert "rope_theta" not in read_json(tmp_path)
    runpy.run_path(str(TINY.parent / "train_tiny_moe.py"))["write_config"](model, tmp_path / "config.json")
    written, expected = read_json(tmp_path), read_json(TINY / name)
    assert (written["rope_theta"], written["rope_scaling"]) == (10000.0, None)
    assert {**written, "transformers_version": None} == {**expected, "transformers_version": None}


@pytest.mark.slow
def test_transformers_4_computes_the_same(tmp_path):
    """Of every kind of embedding, logits of the compressed checkpoint: in this transformers, and in 4.57."""
    path, expected = transformers_4(), {}
    for name, (family, rope) in OF_FAMILIES.items():
        config = family_config(family)
        config.rope_parameters = copy.deepcopy(rope)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
        assert "rope_theta" not in read_json(tmp_path / "source")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        compress(model, method="prune", preset="paper").save(model, tmp_path / name)
        expected[str(tmp_path / name)] = observe(model)["seen"]["logits"]
    found = run_elsewhere("load_families.py", tmp_path / "result.pt", *expected, path=path)
    assert found["version"].startswith("4.57")
    assert {
        name: result["problems"] for name, result in found.items() if name in expected and result["problems"]
    } == {}
    different = {
        name: (found[name]["seen"]["logits"] - logits).abs().max().item() for name, logits in expected.items()
    }
    assert {name: difference for name, difference in different.items() if not difference < 1e-4} == {}


@pytest.mark.slow
def test_the_trained_models_in_transformers_4(tmp_path):
    """Both models of the repository, half their experts gone, write the same 64 tokens in both releases."""
    path, folders = transformers_4(), [tmp_path / name for name in ("upcycled", "scratch")]
    data = {"dataset": str(TINY / "text" / "calibration"), "num_samples": 8, "sequence_length": 128}
    for folder in folders:
        source = tmp_path / "source" / folder.name
        AutoModelForCausalLM.from_pretrained(TINY / folder.name).save_pretrained(source)
        assert "rope_theta" not in read_json(source)
        AutoTokenizer.from_pretrained(TINY / folder.name).save_pretrained(source)
        DernCompressor(method="prune", preset="paper", **data).compress_checkpoint(source, folder)
    arguments = ("generate_greedily.py", tmp_path / "result.pt", "64", "The city of", *map(str, folders))
    newer, older = run_elsewhere(*arguments), run_elsewhere(*arguments, path=path)
    assert older["version"].startswith("4.57") and newer["version"].startswith("5.")
    for folder in map(str, folders):
        assert newer[folder].shape == (64,)
        assert torch.equal(newer[folder], older[folder]), folder
