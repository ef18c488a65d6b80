"""Every family that cannot be compressed is refused with its reason, by model, skeleton and config alike."""

import families
import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from tiny import (
    EOS,
    EXPERTS,
    HIDDEN,
    PAD,
    TOP_K,
    VOCABULARY,
    WIDTH,
    compress,
    padded_batch,
    random_tokens,
    same_state,
    state_of,
)

from optimum_dern import DernCompressor
from optimum_dern.commands.main import main
from optimum_dern.models import refusals
from optimum_dern.models.refusals import BROKEN, REFUSED, check_config
from optimum_dern.models.skeleton import build_skeleton


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
TOWER = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_hidden_size": HIDDEN,
    "patch_size": 4,
    "num_hidden_layers": 6,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ERNIE = {
    **{name: value for name, value in TEXT.items() if name not in ("head_dim", "num_experts_per_tok")},
    "moe_intermediate_size": [WIDTH, WIDTH],
    "moe_num_experts": EXPERTS,
    "moe_k": TOP_K,
    "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
INKLING = {
    **TEXT,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "mlp_layer_types": ["sparse", "sparse"],
    "local_layer_ids": [0],
}
INKLING2 = {
    **{name: value for name, value in TEXT.items() if name != "intermediate_size"},
    "n_routed_experts": EXPERTS,
    "sliding_window_size": 16,
}
DEEPSEEK_V4 = {
    **TEXT,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "n_routed_experts": EXPERTS,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "sliding_window": 16,
    "mlp_layer_types": ["moe", "hash_moe"],
    "initializer_range": 0.2,
}
SIZES = {"vocab_size": VOCABULARY, "d_model": HIDDEN}

FAMILIES = {  # class, fields of the config, reason
    "jetmoe": ("JetMoeForCausalLM", {**TEXT, "kv_channels": 8, "num_local_experts": EXPERTS}, "attention experts"),
    "dbrx": (
        "DbrxForCausalLM",
        {
            **SIZES,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS},
        },
        "two-dimensional matrices",
    ),
    "deepseek_v4": ("DeepseekV4ForCausalLM", DEEPSEEK_V4, "is a hash layer"),
    "zaya": (
        "ZayaForCausalLM",
        {**TEXT, "num_experts_per_tok": 1, "num_experts": EXPERTS, "router_hidden_size": 16},
        "a class for skipping",
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {
            **TEXT,
            **LATENT,
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 48,
            "moe_topk": TOP_K,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": WIDTH,
        },
        "identity experts",
    ),
    "inkling_text": ("InklingForCausalLM", INKLING, "also score the shared experts"),
    "inkling_mm_model": (
        "InklingForConditionalGeneration",
        {
            "text_config": INKLING,
            "vision_config": TOWER,
            "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": HIDDEN},
        },
        "also score the shared experts",
    ),
    "inkling2_text": ("Inkling2ForCausalLM", INKLING2, "what earlier layers gave"),
    "inkling2": (
        "Inkling2ForConditionalGeneration",
        {"text_config": INKLING2, "vision_config": {**TOWER, "projection_hidden_dim": 16}},
        "what earlier layers gave",
    ),
    "ernie4_5_vl_moe_text": ("Ernie4_5_VLMoeTextModel", ERNIE, "two sets of experts"),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": ERNIE,
            "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32},
        },
        "two sets of experts",
    ),
    "doge": ("DogeForCausalLM", {**TEXT, "is_moe": True, "num_experts": 16}, "product-key embeddings"),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterForTokenClassification",
        {**TEXT, "num_local_experts": EXPERTS},
        "token classifier",
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {**SIZES, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        "an encoder-decoder",
    ),
    "nllb-moe": (
        "NllbMoeForConditionalGeneration",
        {
            **SIZES,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": WIDTH,
            "decoder_ffn_dim": WIDTH,
            "num_experts": EXPERTS,
            "max_position_embeddings": 64,
        },
        "an encoder-decoder",
    ),
}


def make_config(name, **overrides):
    """The config of a tiny model of one of `FAMILIES`."""
    import transformers

    architecture, fields, _ = FAMILIES[name]
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    config = getattr(transformers, architecture).config_class(**{**fields, **overrides})
    config.architectures = [architecture]
    return config


def make_model(name, **overrides):
    """A random model of one of `FAMILIES`, in the class that its checkpoints name."""
    import transformers

    config = make_config(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, config.architectures[0])(config).eval()


def test_all_reasons_are_tested():
    """No reason is without a model that it refuses."""
    assert REFUSED.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_models(name):
    """Refused before the calibration data, which would be refused as well; the model stays as it is."""
    model, reason = make_model(name), FAMILIES[name][2]
    assert model.config.model_type == name
    before, config = state_of(model), model.config.to_dict()
    compressor = DernCompressor(num_experts=4, dataset=[])
    for refuse in (compressor.compress_model, compressor.check, compressor.prepare):
        with pytest.raises(ValueError, match=reason):
            refuse(model)
    assert same_state(before, state_of(model))
    assert model.config.to_dict() == config
    assert compressor.report is None
    with pytest.raises(ValueError, match=reason):
        compressor.prepare(model.to("meta"))


@pytest.mark.parametrize("name", FAMILIES)
def test_configs(name, tmp_path, capsys):
    """A folder with nothing but a config is refused by `inspect`, in one line, whatever class the config names."""
    for architectures in (make_config(name).architectures, None):
        config = make_config(name)
        config.architectures = architectures
        config.save_pretrained(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", str(tmp_path), "--num-experts", "4"])
        lines = [line for line in capsys.readouterr().err.splitlines() if "[transformers]" not in line]
        assert len(lines) == 1 and lines[0].startswith("optimum-dern: error: ") and FAMILIES[name][2] in lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_by_name_alone(name):
    """Neither modules nor weights are needed where the name decides."""
    with pytest.raises(ValueError, match=f"{name} models cannot be compressed: {REFUSED[name]}"):
        check_config(make_config(name))


def test_the_text_config_decides_too():
    """A model around a language model that is refused is refused for the same reason."""
    config = make_config("inkling_mm_model")
    config.__dict__["model_type"] = "wrapped"
    with pytest.raises(ValueError, match="inkling_text models cannot be compressed"):
        check_config(config)


@pytest.mark.parametrize(("name", "release"), BROKEN)
def test_releases_that_cannot_run_a_family(name, release, monkeypatch, tmp_path):
    """With such a release model and checkpoint are refused, naming one that works; with another one they are not."""
    model, (reason, others) = families.make_model(name), BROKEN[name, release]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "__version__", release)
    for refuse in (DernCompressor(num_experts=4, dataset=[]).prepare, lambda _: build_skeleton(tmp_path)):
        with pytest.raises(ValueError) as refusal:
            refuse(model)
        assert f"{name} models cannot be compressed with transformers {release}: {reason}" in str(refusal.value)
        assert str(refusal.value).endswith(f"install {others} instead")
    assert not SpecifierSet(others.removeprefix("transformers")).contains(release)
    monkeypatch.setattr(transformers, "__version__", "5.18.0")
    check_config(model.config)
    assert build_skeleton(tmp_path).config.model_type == name


@pytest.mark.parametrize(("name", "release"), BROKEN)
def test_they_cannot_run_it_indeed(name, release):
    """A refusal for a release is no longer true than its models fail."""
    if transformers.__version__ != release:
        pytest.skip(f"only with transformers {release}")
    with pytest.raises(Exception) as failure:  # noqa: B017 - the reason says which
        families.make_model(name)(**padded_batch([5, 9], "right"))
    assert str(failure.value) in BROKEN[name, release][0]


def test_routers_of_another_size(monkeypatch):
    """Where nobody has listed a family, a router whose rows are not the experts is refused all the same."""
    monkeypatch.setattr(refusals, "REFUSED", {})
    for name in ("zaya", "longcat_flash", "inkling_text"):
        with pytest.raises(ValueError, match="no router weight with a row for each of the 8 experts"):
            DernCompressor(num_experts=4, dataset=random_tokens()).compress_model(make_model(name))


def test_deepseek_v4_without_hash_layers(tmp_path):
    """Hash layers are what is refused: without them the same family is compressed, saved and loaded."""
    from transformers import AutoModelForCausalLM

    model = make_model("deepseek_v4", mlp_layer_types=["moe", "moe"])
    compressor = compress(model)
    compressor.save(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.n_routed_experts == 4
    ids = random_tokens(1)[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
