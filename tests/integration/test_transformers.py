"""Compression while transformers loads: every way in gives the plain model, compressed, and refuses before loading."""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import pytest
import torch
from tiny import EXPERTS, compress, make_model, random_tokens, same_state, sample_texts, state_of, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from optimum_dern import (
    DernCompressor,
    DernConfig,
    DernModelForCausalLM,
    load_compressed_model,
    patch_transformers,
    unpatch_transformers,
)
from optimum_dern.integration import transformers as integration


FIELDS = {"num_experts": 4, "batch_size": 4, "method": "prune", "refit": False, "guard": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    make_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source):
    """The same compression by the compressor."""
    model = MixtralForCausalLM.from_pretrained(source)
    DernCompressor(dataset=sample_texts(), **FIELDS).compress_model(model)
    return model


def by_facade(folder, config, **kwargs):
    return DernModelForCausalLM.from_pretrained(folder, dern_config=config, **kwargs)


def by_auto_class(folder, config, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def by_own_class(folder, config, **kwargs):
    return MixtralForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def by_dict(folder, config, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config.to_dict(), **kwargs)


def by_patch(folder, config, **kwargs):
    patch_transformers()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dern_config=config, **kwargs)
    finally:
        unpatch_transformers()


WAYS = [by_facade, by_auto_class, by_own_class, by_dict, by_patch]


@pytest.mark.parametrize("load", WAYS)
def test_every_way_gives_the_compressed_model(load, source, expected):
    """The weights are the compressor's, and nothing about the object says that a quantizer has been there."""
    model = load(source, DernConfig(dataset=sample_texts(), **FIELDS))
    assert type(model) is MixtralForCausalLM and not model.training
    assert same_state(state_of(model), state_of(expected))
    assert model.config.num_local_experts == model.dern_report.after.experts == 4
    assert model.dern_report.source == source.name
    assert not getattr(model, "is_quantized", False)
    assert not any(hasattr(model, name) for name in ("hf_quantizer", "quantization_method"))
    assert not hasattr(model.config, "quantization_config") and "_is_quantized" not in vars(model.config)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("state", [torch.inference_mode, lambda: torch.autocast("cpu")], ids=["inference", "autocast"])
def test_the_state_of_torch(state, source):
    """Inference mode and autocast around loading change no bit of what the compressor gives."""
    fields = {"num_experts": 4, "dataset": random_tokens(), "batch_size": 4}
    with state():
        model = by_auto_class(source, DernConfig(**fields))
    expected = MixtralForCausalLM.from_pretrained(source)
    DernCompressor(**fields).compress_model(expected)
    assert same_state(state_of(model), state_of(expected))


def test_other_auto_classes(source):
    """The base model, too, is compressed by its Auto class."""
    model = AutoModel.from_pretrained(source, quantization_config=DernConfig(dataset=random_tokens(), **FIELDS))
    assert type(model).__name__ == "MixtralModel"
    assert model.layers[0].mlp.experts.down_proj.shape[0] == 4


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
    """A cache of the Hub that is not the default one, with the checkpoint in a subfolder of `me/model`."""
    folder, commit = tmp_path_factory.mktemp("cache"), "0123456789abcdef" * 2 + "01234567"
    (folder / "models--me--model" / "refs").mkdir(parents=True)
    (folder / "models--me--model" / "refs" / "main").write_text(commit, "utf-8")
    shutil.copytree(source, folder / "models--me--model" / "snapshots" / commit / "inner")
    return {"cache_dir": str(folder), "subfolder": "inner", "local_files_only": True}


@pytest.mark.parametrize("load", WAYS)
def test_where_the_checkpoint_is(load, cache, expected, tmp_path):
    """Tokenizer and config are looked for where the weights are: in another cache, in a subfolder, on this machine."""
    model = load("me/model", DernConfig(dataset=sample_texts(), **FIELDS), **cache)
    assert same_state(state_of(model), state_of(expected))
    assert model.dern_report.source == "me/model" and "dern_loading" not in vars(model)
    assert model.dern_source_config == json.loads(
        next(Path(cache["cache_dir"]).rglob("config.json")).read_text("utf-8")
    )
    model.save_pretrained(tmp_path / "repository" / "inner")
    again = load_compressed_model(tmp_path / "repository", subfolder="inner")
    assert same_state(state_of(again), state_of(expected)) and again.dern_report == model.dern_report


@pytest.mark.parametrize("load", [by_facade, by_patch])
def test_who_may_be_asked(load, cache, monkeypatch):
    """Nobody with `local_files_only`, whoever looks for the tokenizer; the Hub with the token that was given."""
    asked, find = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k) or find(*a, **k))
    load("me/model", DernConfig(dataset=sample_texts(), **FIELDS), token="hf_mine", **cache)
    (options,) = asked
    assert {name: options[name] for name in ("token", *cache)} == {"token": "hf_mine", **cache}


@pytest.mark.parametrize("load", WAYS)
def test_a_subfolder_of_a_folder(load, source, expected):
    """The folder above has neither tokenizer nor config."""
    model = load(source.parent, DernConfig(dataset=sample_texts(), **FIELDS), subfolder=source.name)
    assert same_state(state_of(model), state_of(expected)) and model.dern_source_config is not None


def test_arguments_of_transformers_pass_through(source):
    """dtype and device map mean what they mean to transformers."""
    config = DernConfig(dataset=random_tokens(), **FIELDS)
    model = by_facade(source, config, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.num_local_experts == 4


def test_without_a_config_nothing_is_compressed(source):
    """The facade alone, and transformers once patched, load models as ever; unpatching leaves no trace."""
    original = AutoModelForCausalLM.__dict__["from_pretrained"]
    assert DernModelForCausalLM.from_pretrained(source).config.num_local_experts == EXPERTS
    patch_transformers()
    try:
        patch_transformers()  # a second time changes nothing
        assert AutoModelForCausalLM.from_pretrained(source).config.num_local_experts == EXPERTS
    finally:
        unpatch_transformers()
    assert AutoModelForCausalLM.__dict__["from_pretrained"] is original
    with pytest.raises(TypeError, match="dern_config"):
        AutoModelForCausalLM.from_pretrained(source, dern_config=DernConfig(dataset=random_tokens()))


def test_the_config_of_the_caller_stays_as_it_was(source):
    """Loading works on a copy of the model's config and does not write to the caller's DernConfig."""
    config = DernConfig(dataset=random_tokens(), **FIELDS)
    before = copy.deepcopy(config.to_dict())
    by_auto_class(source, config)
    assert config.to_dict() == before


REFUSALS = {
    "too few experts": ({"num_experts": 1}, "at least 2"),
    "unknown method": ({"method": "magic"}, "magic"),
    "missing file": ({"dataset": "nowhere.txt"}, "nowhere.txt"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_weights_are_loaded(case, source, tmp_path, monkeypatch):
    """A request that cannot work fails while the model has no weights."""
    fields, message = REFUSALS[case]
    config = DernConfig(**{"dataset": random_tokens(), **FIELDS, **fields})
    monkeypatch.setattr(MixtralForCausalLM, "_load_pretrained_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        by_auto_class(source, config)


def test_disk_offload_is_refused(source, tmp_path):
    """Weights in an offload folder cannot be replaced."""
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="disk"):
        by_auto_class(
            source, DernConfig(dataset=random_tokens(), **FIELDS), device_map=device_map, offload_folder=tmp_path
        )


def test_mps_is_refused(source):
    """A device map to a device without float64."""
    with pytest.raises(ValueError, match="the device 'mps' has no float64"):
        by_auto_class(source, DernConfig(dataset=random_tokens(), **FIELDS), device_map={"": "mps"})


def test_a_checkpoint_that_does_not_fit_its_config(source, tmp_path):
    """With a quantizer older transformers check no shape, so this package does."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 6}), "utf-8")
    with pytest.raises((ValueError, RuntimeError), match="do not belong together|mismatched_sizes"):
        by_auto_class(tmp_path, DernConfig(dataset=random_tokens(), **FIELDS))


def test_a_quantised_source(source, tmp_path):
    """A quantised checkpoint is not compressed: transformers names both configs."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="GPTQConfig"):
        by_auto_class(tmp_path, DernConfig(dataset=random_tokens()))


@pytest.fixture
def rounding_quantizer():
    """A quantizer that any machine can run: it rounds the head's weights to whole eighths."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class RoundingConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs):
            self.quant_method = "rounding"

    class RoundingQuantizer(HfQuantizer):
        def _process_model_after_weight_loading(self, model, **kwargs):
            model.lm_head.weight.data = (model.lm_head.weight * 8).round() / 8

        def is_serializable(self):
            return False

        def is_trainable(self):
            return False

    auto.register_quantization_config("rounding")(RoundingConfig)
    auto.register_quantizer("rounding")(RoundingQuantizer)
    yield RoundingConfig
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop("rounding")
    auto.AUTO_QUANTIZER_MAPPING.pop("rounding")


def test_compressed_then_quantised(source, expected, rounding_quantizer, tmp_path, monkeypatch):
    """With a second quantizer the facade compresses first and loads the result quantised; no file stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = DernConfig(dataset=sample_texts(), **FIELDS)
    model = by_facade(source, config, quantization_config=rounding_quantizer(), dtype=torch.float32)
    assert model.is_quantized and model.config.num_local_experts == 4
    assert torch.equal(model.lm_head.weight, (expected.lm_head.weight * 8).round() / 8)
    state = state_of(expected)
    assert all(torch.equal(value, state[name]) for name, value in state_of(model).items() if name != "lm_head.weight")
    assert model.name_or_path == str(source) and model.dern_report.after.experts == 4
    assert list(tmp_path.iterdir()) == []
    patch_transformers()
    try:
        with pytest.raises(ValueError, match="DernModelForCausalLM"):
            AutoModelForCausalLM.from_pretrained(source, dern_config=config, quantization_config=rounding_quantizer())
    finally:
        unpatch_transformers()


def test_compressed_then_quantised_from_elsewhere(cache, expected, rounding_quantizer):
    """The first step finds what the second would."""
    config = DernConfig(dataset=sample_texts(), **FIELDS)
    model = by_facade("me/model", config, quantization_config=rounding_quantizer(), **cache)
    assert torch.equal(model.lm_head.weight, (expected.lm_head.weight * 8).round() / 8)
    assert model.name_or_path == model.dern_report.source == "me/model"
    assert model.dern_report.revision == "0123456789abcdef" * 2 + "01234567"


def test_compressed_checkpoints_load_unchanged(expected, tmp_path):
    """Loading a result without a config compresses nothing, marked or not."""
    expected.save_pretrained(tmp_path)
    assert same_state(state_of(DernModelForCausalLM.from_pretrained(tmp_path)), state_of(expected))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"] = DernConfig(num_experts=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(state_of(model), state_of(expected))
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")


def test_compressing_a_compressed_checkpoint(expected, tmp_path):
    """8 -> 4 -> 2 experts, the second time while loading."""
    expected.save_pretrained(tmp_path)
    model = by_facade(tmp_path, DernConfig(**{**FIELDS, "num_experts": 2}, dataset=random_tokens()))
    assert model.config.num_local_experts == 2


def test_the_facade_is_no_model():
    """Instances make no sense."""
    with pytest.raises(OSError, match="from_pretrained"):
        DernModelForCausalLM()


def test_registration_needs_only_the_import(source):
    """A dict names the quantizer once `import optimum_dern` has run, before or after transformers is imported."""
    script = """if True:
        import {first}, {second}
        from transformers import AutoModelForCausalLM
        fields = dict(quant_method="dern", num_experts=4, dataset=["some words to calibrate with"], guard=False)
        model = AutoModelForCausalLM.from_pretrained({folder!r}, quantization_config=fields)
        assert model.config.num_local_experts == 4
    """
    orders = (("optimum_dern", "transformers", subprocess), ("transformers.quantizers", "optimum_dern", forked))
    for first, second, processes in orders:  # a forked one has imported transformers
        code = script.format(first=first, second=second, folder=str(source))
        result = processes.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_the_import_stays_light():
    """`import optimum_dern` alone brings neither torch nor transformers."""
    code = "import sys, optimum_dern; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_compressed_model(source, expected, tmp_path):
    """A saved result comes back with its report, and saves itself to the same files again."""
    expected.save_pretrained(tmp_path / "first")
    model = load_compressed_model(tmp_path / "first", dtype=torch.float32)
    assert type(model) is MixtralForCausalLM
    assert model.dern_report == expected.dern_report
    model.save_pretrained(tmp_path / "second")
    for name in ("config.json", "dern_config.json", "dern_report.json", "README.md", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    with pytest.raises(ValueError, match="no dern_report.json"):
        load_compressed_model(source)


def test_save_pretrained_of_the_model(source, tmp_path):
    """The model's own `save_pretrained` leaves the source's config with the new counts, as `DernCompressor.save`."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as older checkpoints have it
    config["some_key_of_the_author"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    compressor = DernCompressor(dataset=random_tokens(), **FIELDS)
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path / "by model")
    copy.deepcopy(model).save_pretrained(tmp_path / "by copy")
    compressor.save(model, tmp_path / "by compressor", tokenizer=None)
    for name in ("by model", "by copy", "by compressor"):
        written = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert {key: value for key, value in written.items() if key not in ("num_experts", "num_local_experts")} == {
            key: value for key, value in config.items() if key != "num_local_experts"
        }
        assert written["num_local_experts"] == 4
        assert (tmp_path / name / "dern_report.json").exists()
    (tmp_path / "by model" / "README.md").write_text("mine", "utf-8")
    model.save_pretrained(tmp_path / "by model")
    assert (tmp_path / "by model" / "README.md").read_text("utf-8") == "mine"


def test_a_copy_saves_its_own_weights(tmp_path):
    """`copy.deepcopy` binds the methods to the copy."""
    model = make_model("mixtral")
    compress(model, method="prune", refit=False, guard=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any()


def test_other_processes_write_no_config(tmp_path):
    """Of several processes that save, only the main one writes what stands beside the weights."""
    model = make_model("mixtral")
    compress(model, method="prune", refit=False, guard=False)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "dern_report.json").exists()


def test_the_quantizer_is_the_registered_one():
    """transformers finds this class under the method's name."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["dern"] is integration.DernQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["dern"] is DernConfig
