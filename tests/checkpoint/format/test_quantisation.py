"""Checkpoints in FP8 and MXFP4: read, and compressed, as the plain checkpoints that they stand for."""

import json

import pytest
import torch
from quantised import save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file
from tiny import make_model, random_tokens
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.quantisation import check_quantisation
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.checkpoint.output.manifest import Manifest


QUICK = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}
FIRST = "model.layers.1.mlp.experts.0.up_proj.weight"
KINDS = {
    "whole blocks": {"block": [8, 4]},
    "cut blocks": {"block": [12, 10]},
    "one block": {"block": [128, 128]},
    "one factor a matrix": {"block": None},
    "bfloat16 factors": {"block": [8, 16], "scales": "bfloat16"},
    "exponents": {"block": [8, 16], "scales": "float8_e8m0fnu"},
    "exponents as bytes": {"block": [12, 10], "scales": "uint8"},
    "fused experts": {"block": [12, 10], "fused": True},
    "fused experts, one factor each": {"block": None, "fused": True},
    "mxfp4": None,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A quantised checkpoint of each of `KINDS` beside its plain one, made when it is asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def source(kind):
        path = folder / kind
        if not path.exists():
            path.mkdir()
            save_mxfp4(path) if KINDS[kind] is None else save_fp8(path, **KINDS[kind])
        return path

    return source


def compress(source, output, **options):
    """A quick run from folder to folder."""
    return DernCompressor(dataset=random_tokens(12), **QUICK).compress_checkpoint(source, output, **options)


def weights(folder):
    """All tensors of a checkpoint; a compressed one can be larger than the packed files that it came from."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder, target, change, **quantisation):
    """A copy of a quantised checkpoint with its tensors changed in place, and its quantisation's fields replaced."""
    tensors = load_file(folder / "packed" / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "packed" / "config.json").read_text("utf-8"))
    config["quantization_config"] |= quantisation
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor(kind, sources):
    """Names, shapes, sizes, dtypes and values are those of the plain checkpoint; each stored byte is read once."""
    folder = sources(kind)
    plain, seen = load_file(folder / "plain" / "model.safetensors"), {}
    if KINDS[kind] and KINDS[kind].get("fused"):
        assert any(tensor.dim() == 3 for tensor in plain.values())
    reader = CheckpointReader(folder / "packed")
    reader.after_read = seen.__setitem__
    assert reader.infos.keys() == plain.keys()
    for name, tensor in plain.items():
        info, lazy = reader.infos[name], reader.lazy(name)
        assert (info.shape, info.size) == (tuple(tensor.shape), tensor.nbytes), name
        assert (lazy.get_shape(), lazy.get_dtype()) == (list(tensor.shape), info.dtype)
        found = lazy[...]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert seen[name] is not None and torch.equal(seen[name], tensor)
    assert len(seen) == len(plain)
    stored = load_file(folder / "packed" / "model.safetensors")
    unread = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("activation_scale"))
    assert reader.bytes == sum(tensor.nbytes for tensor in stored.values()) == reader.bytes_read + unread
    assert reader.stored.keys() == stored.keys()
    assert reader.config == json.loads((folder / "plain" / "config.json").read_text("utf-8"))
    reader.close()


@pytest.mark.parametrize("kind", ["whole blocks", "one factor a matrix", "exponents", "mxfp4"])
def test_as_transformers_loads_it(kind, sources):
    """transformers, told to dequantise, has the same weights; it knows no cut blocks."""
    folder = sources(kind)
    method = Mxfp4Config(dequantize=True) if kind == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "packed", quantization_config=method, dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype="bfloat16").state_dict()
    assert loaded.state_dict().keys() == plain.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("kind", ["cut blocks", "one factor a matrix", "mxfp4"])
def test_compressed_as_the_plain_one(kind, sources, tmp_path):
    """The same bytes and the same config.json as from the plain checkpoint, without any trace of quantisation."""
    folder, reports = sources(kind), {}
    for name in ("packed", "plain"):
        reports[name] = compress(folder / name, tmp_path / name)
    found, expected = (weights(tmp_path / name) for name in ("packed", "plain"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16 or name.endswith("bias"), name
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("packed", "plain")]
    assert configs[0] == configs[1] and "quantization_config" not in configs[0]
    assert [layer.retained for layer in reports["packed"].layers] == [
        layer.retained for layer in reports["plain"].layers
    ]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("kind", ["cut blocks", "mxfp4"])
def test_resume(kind, sources, tmp_path, monkeypatch):
    """Interrupted after a layer, the next run ends with the same tensors."""
    folder, note = sources(kind), Manifest.finish_layer
    compress(folder / "packed", tmp_path / "whole")

    def interrupted(self, position, value):
        note(self, position, value)
        if value is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(folder / "packed", tmp_path / "part")
    compress(folder / "packed", tmp_path / "part")
    whole, part = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("model*")} for name in ("whole", "part")
    )
    assert whole and whole == part


def test_changed_factors_are_another_run(sources, tmp_path, monkeypatch):
    """An unfinished run does not go on with scales that have changed, even if weights in other files have not."""
    folder = rewrite(sources("cut blocks"), tmp_path / "source", lambda tensors: None)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"{'scales' if name.endswith('_scale_inv') else 'weights'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), "utf-8")
    finish_layer = Manifest.finish_layer

    def interrupted(self, position, report):
        finish_layer(self, position, report)
        if report is not None:  # an MoE layer is finished: less would not be gone on with
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(folder, tmp_path / "out")
    scales = {name: 2 * tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    save_file(scales, folder / "scales.safetensors")
    with pytest.raises(ValueError, match="weights was.*--restart"):
        compress(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},  # as bitsandbytes wrote it once
        {"quant_method": "compressed-tensors"},
        {"quant_method": "mxfp4"},  # of another model than gpt-oss
        {"bits": 3},
    ],
)
def test_other_quantisations_are_refused(method, tmp_path):
    """By name, with what to do instead, before anything is written or looked for."""
    make_model("mixtral").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": method}), "utf-8")
    name = method.get("quant_method", "unnamed" if "bits" in method else "bitsandbytes")
    with pytest.raises(ValueError, match=rf"quantised \(.*{name}.*only fp8 .* and mxfp4 .*unquantised"):
        compress(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_a_quantisation_is_found():
    """At the top, in a sub-config, under its older name; null is none."""
    fp8 = {"quant_method": "fp8"}
    assert check_quantisation({"quantization_config": fp8}) == fp8
    assert check_quantisation({"text_config": {"quantization_config": fp8}}) == fp8
    assert check_quantisation({"quantization_config": None, "text_config": {}}) is None
    with pytest.raises(ValueError, match="compressed-tensors"):
        check_quantisation({"compression_config": {"quant_method": "compressed-tensors"}})


def test_plain_checkpoints_are_left_alone(sources):
    """What is stored is what is read."""
    reader = CheckpointReader(sources("cut blocks") / "plain")
    assert reader.infos == reader.stored


FP8_FAULTS = {
    "no scales": (lambda t: t.pop(f"{FIRST}_scale_inv"), {}, "up_proj.weight_scale_inv"),
    "other blocks": (lambda t: None, {"weight_block_size": [16, 16]}, r"asks for .* \(\d+, \d+\)"),
    "four bits": (lambda t: t.update({FIRST: t[FIRST].view(torch.int8)}), {}, "I8.*asks for F8_E4M3"),
    "no matrix": (lambda t: t.update({FIRST: t[FIRST].flatten()}), {}, "asks for a matrix"),
    "no block size": (lambda t: None, {"weight_block_size": [128]}, "two positive numbers"),
    "empty blocks": (lambda t: None, {"weight_block_size": [12, 0]}, "two positive numbers"),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_broken_fp8(fault, sources, tmp_path):
    """Scales that are missing or do not fit are named, and nothing is written."""
    change, fields, message = FP8_FAULTS[fault]
    source = rewrite(sources("cut blocks"), tmp_path / "source", change, **fields)
    with pytest.raises(ValueError, match=message):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BLOCKS, SCALES = (f"model.layers.0.mlp.experts.down_proj_{kind}" for kind in ("blocks", "scales"))
MXFP4_FAULTS = {
    "no scales": (lambda t: t.pop(SCALES), "down_proj_scales"),
    "other scales": (lambda t: t.update({SCALES: t[SCALES][:, 1:].contiguous()}), "asks for U8"),
    "other dtype": (lambda t: t.update({BLOCKS: t[BLOCKS].float()}), "F32.*asks for U8"),
    "three sizes": (lambda t: t.update({BLOCKS: t[BLOCKS].flatten(2)}), "4 sizes"),
}


@pytest.mark.parametrize("fault", MXFP4_FAULTS)
def test_broken_mxfp4(fault, sources, tmp_path):
    """Blocks without their scales, or of other shapes, are named, and nothing is written."""
    change, message = MXFP4_FAULTS[fault]
    source = rewrite(sources("mxfp4"), tmp_path / "source", change)
    with pytest.raises(ValueError, match=message):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
