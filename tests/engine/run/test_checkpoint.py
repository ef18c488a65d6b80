"""A checkpoint compressed layer by layer on disk: the same result as in memory, whatever interrupts it."""

import hashlib
import json
import os
import signal
import sys
import time

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    EXPERTS,
    FAMILIES,
    PAD,
    make_model,
    padded_batch,
    random_tokens,
    sample_texts,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.conversion import NameMap
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.engine.cost.memory import plan_memory
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.skeleton import build_skeleton


FIELDS = {"num_experts": 4, "batch_size": 4}
COPY_REST = "optimum_dern.engine.run.checkpoint.copy_rest"
QUICK = {**FIELDS, "neuron_refit": False, "router_refit": False}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of every family, made when it is asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def source(family, **overrides):
        path = folder / "-".join([family, *map(str, overrides.values())])
        if not path.exists():
            make_model(family, **overrides).save_pretrained(path)
        return path

    return source


def content(folder):
    """Digests of all files that must not depend on how a run went; reports tell seconds."""
    skipped = ("dern_report.json", "dern_report.html", "dern_report.png", "README.md")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in skipped]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_in_memory(family, sources, tmp_path):
    """Streaming a checkpoint gives, to the bit, what compressing the loaded model and saving it gives."""
    source, data = sources(family), random_tokens(20)
    compressor = DernCompressor(dataset=data, **FIELDS)
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(source))
    compressor.save(model, tmp_path / "memory")
    report = DernCompressor(dataset=data, **FIELDS).compress_checkpoint(source, tmp_path / "stream")
    expected, found = weights(tmp_path / "memory"), weights(tmp_path / "stream")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((tmp_path / kind / "config.json").read_text("utf-8")) for kind in ("memory", "stream")]
    assert configs[0] == configs[1]
    for mine, theirs in zip(report.layers, compressor.report.layers, strict=True):
        assert (mine.name, mine.retained, mine.errors) == (theirs.name, theirs.retained, theirs.errors)
    assert (report.before, report.after) == (compressor.report.before, compressor.report.after)
    assert not (tmp_path / "stream" / ".dern").exists()


def test_padded_batches(sources, tmp_path):
    """Padding is left out in the streamed pass as it is in memory."""
    source, data = sources("mixtral"), [{"input_ids": row} for row in padded_batch([9, 17, 24], "left")["input_ids"]]
    data = [{"input_ids": row["input_ids"][row["input_ids"] != PAD]} for row in data]
    compressor = DernCompressor(dataset=data, **QUICK)
    compressor.save(compressor.compress_model(AutoModelForCausalLM.from_pretrained(source)), tmp_path / "memory")
    DernCompressor(dataset=data, **QUICK).compress_checkpoint(source, tmp_path / "stream")
    expected, found = weights(tmp_path / "memory"), weights(tmp_path / "stream")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("order", ["sequential", "oneshot"])
@pytest.mark.parametrize("moment", ["before", "after", "copy", "publish"])
def test_resume(order, moment, sources, tmp_path, monkeypatch):
    """Interrupted before or after a layer is noted, or while files are moved: the next run ends the same way."""
    source = sources("deepseek_v3")
    options = {**QUICK, "dataset": random_tokens(12), "calibration_order": order}
    whole = DernCompressor(**options).compress_checkpoint(source, tmp_path / "whole")
    note = Manifest.finish_layer

    def interrupted(self, position, value):
        if moment == "after":
            note(self, position, value)
        if position == 1 and moment in ("before", "after"):
            raise KeyboardInterrupt
        if moment != "after":
            note(self, position, value)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        if moment == "copy":
            patch.setattr(COPY_REST, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        if moment == "publish":
            patch.setattr("optimum_dern.engine.run.checkpoint.publish_shards", _half_published)
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**options).compress_checkpoint(source, tmp_path / "part")
    assert (tmp_path / "part" / ".dern").is_dir()
    report = DernCompressor(**options).compress_checkpoint(source, tmp_path / "part")
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    assert [layer.retained for layer in report.layers] == [layer.retained for layer in whole.layers]


def _half_published(folder, plan, output):
    name = next(iter(plan))
    os.replace(folder / name, output / name)
    raise KeyboardInterrupt


def test_finished_layers_are_not_compressed_again(sources, tmp_path, monkeypatch):
    """Going on means going on."""
    source, options = sources("mixtral"), {**QUICK, "dataset": random_tokens(12)}
    note = Manifest.finish_layer

    def interrupted(self, position, value):
        note(self, position, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**options).compress_checkpoint(source, tmp_path)
    positions = []
    monkeypatch.setattr(Manifest, "finish_layer", lambda self, p, value: (positions.append(p), note(self, p, value)))
    DernCompressor(**options).compress_checkpoint(source, tmp_path)
    assert positions == [1]


CHANGES = {
    "option": {"num_experts": 6},
    "data": {"dataset": random_tokens(12, seed=1)},
    "seed": {"seed": 3},
}


@pytest.mark.parametrize("change", [*CHANGES, "weights"])
def test_a_changed_run_is_refused(change, tmp_path, monkeypatch):
    """Another config, calibration set or source than the unfinished run's is named; restarting is the way out."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source)
    options = {**QUICK, "dataset": random_tokens(12)}
    with monkeypatch.context() as patch:
        patch.setattr(COPY_REST, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**options).compress_checkpoint(source, tmp_path / "out")
    before = content(tmp_path / "out")
    if change == "weights":
        make_model("mixtral", seed=1).save_pretrained(source)
    options |= CHANGES.get(change, {})
    with pytest.raises(ValueError, match="differs.*--restart"):
        DernCompressor(**options).compress_checkpoint(source, tmp_path / "out")
    assert content(tmp_path / "out") == before
    DernCompressor(**options).compress_checkpoint(source, tmp_path / "out", restart=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == options["num_experts"]


def test_one_process_at_a_time(sources, tmp_path, monkeypatch):
    """A second run on the same output folder is refused while the first is at it."""
    options = {**QUICK, "dataset": random_tokens(12)}
    note, refusals = Manifest.finish_layer, []

    def second(self, position, value):
        note(self, position, value)
        with pytest.raises(RuntimeError, match="another process") as error:
            DernCompressor(**options).compress_checkpoint(sources("mixtral"), tmp_path)
        refusals.append(error)

    monkeypatch.setattr(Manifest, "finish_layer", second)
    DernCompressor(**options).compress_checkpoint(sources("mixtral"), tmp_path)
    assert len(refusals) == 2


@pytest.mark.slow
def test_kills(sources, tmp_path):
    """Killed at random moments and started again, a run ends with the files of an undisturbed one."""
    source = sources("qwen3_moe", num_hidden_layers=4)
    torch.save([row["input_ids"] for row in random_tokens(24)], tmp_path / "data.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from optimum_dern import DernCompressor; "
        "DernCompressor(num_experts=4, batch_size=4, dataset=sys.argv[1], neuron_refit=False)"
        ".compress_checkpoint(sys.argv[2], sys.argv[3])"
    )

    def start(output):
        return forked.Popen([sys.executable, "-c", code, tmp_path / "data.pt", source, output])

    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - started
    generator = torch.Generator().manual_seed(0)
    for share in torch.rand(2, generator=generator).tolist():
        process = start(tmp_path / "killed")
        try:
            process.wait(timeout=seconds * share)
        except forked.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "killed" / "config.json").exists() and not (tmp_path / "killed" / ".dern").exists():
            break
    else:
        assert start(tmp_path / "killed").wait() == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_what_is_not_moe_passes_through(tmp_path):
    """Other tensors keep their bytes, names and dtypes, float32 router biases in a bfloat16 model too."""
    source = tmp_path / "source"
    make_model("deepseek_v3").to(torch.bfloat16).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    for name in biases:
        tensors[name] = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))  # not a bfloat16 number
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)  # known from older checkpoints
    tensors |= {f"model.layers.3.mlp.experts.{i}.up_proj.weight": torch.zeros(2, 2) for i in range(EXPERTS)}  # MTP
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}), "utf-8")
    report = DernCompressor(dataset=random_tokens(12), **QUICK).compress_checkpoint(source, tmp_path / "out")
    found = weights(tmp_path / "out")
    for name, tensor in tensors.items():
        if ".experts." not in name and ".mlp.gate" not in name:
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for layer in report.layers:
        name = f"{layer.name}.gate.e_score_correction_bias"
        assert torch.equal(found[name], tensors[name][layer.retained])
    assert not any(".layers.3." in name for name in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["num_nextn_predict_layers"] == 0
    manifest = json.loads((tmp_path / "out" / "dern_manifest.json").read_text("utf-8"))["tensors"]
    for name, tensor in found.items():
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert manifest[name] == hashlib.sha256(data).hexdigest()


def test_shards(tmp_path):
    """A sharded source gives shards no larger than its own, an index, and a checkpoint that loads."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source, max_shard_size="60KB")
    DernCompressor(dataset=random_tokens(12), **QUICK).compress_checkpoint(source, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) <= 70_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(weights(tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "out").values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_local_experts == 4
    single = DernCompressor(dataset=random_tokens(12), **QUICK)
    single.compress_checkpoint(source, tmp_path / "single", max_shard_size="1GB")
    assert [file.name for file in (tmp_path / "single").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_source_is_read_once(sources, tmp_path, monkeypatch):
    """Tensors that pass through are written as they are read for the calibration."""
    readers, init = [], CheckpointReader.__init__
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, f: (init(self, f), readers.append(self))[0])
    DernCompressor(dataset=random_tokens(12), **QUICK).compress_checkpoint(sources("qwen3_moe"), tmp_path)
    assert readers[0].bytes <= readers[0].bytes_read <= 1.05 * readers[0].bytes


def test_companions(tmp_path):
    """Tokenizer, generation config and the author's code come along; weights in other forms and the card do not."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    for name in ("modeling_own.py", "chat_template.jinja", "LICENSE"):
        (source / name).write_text(name, "utf-8")
    for name in ("pytorch_model.bin", "README.md"):
        (source / name).write_text("old", "utf-8")
    DernCompressor(dataset=sample_texts(), **QUICK).compress_checkpoint(source, tmp_path / "out")
    for name in ("modeling_own.py", "chat_template.jinja", "LICENSE", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert "routed experts" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_pickled_weights_are_refused(sources, tmp_path):
    """Weights that can run code are not loaded; the message tells how to convert them."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_checkpoints(tmp_path):
    """A shard that is missing or cut short, and one without a tensor that the model needs."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source, max_shard_size="60KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    compressor = DernCompressor(dataset=random_tokens(), **QUICK)
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="shorter than its header"):
        compressor.compress_checkpoint(source, tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its"):
        compressor.compress_checkpoint(source, tmp_path / "out")
    make_model("mixtral").save_pretrained(source)
    for file in source.glob("model*"):
        file.unlink()
    make_model("mixtral").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj.*incomplete"):
        compressor.compress_checkpoint(source, tmp_path / "out")


def test_output_folders(sources, tmp_path):
    """The source itself, a file, and a folder with other things are no place for the result."""
    source = sources("mixtral")
    compressor = DernCompressor(dataset=random_tokens(), **QUICK)
    with pytest.raises(ValueError, match="same folder"):
        compressor.compress_checkpoint(source, source)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ValueError, match="is a file"):
        compressor.compress_checkpoint(source, tmp_path / "file")
    with pytest.raises(ValueError, match="not empty"):
        compressor.compress_checkpoint(source, tmp_path)
    compressor.compress_checkpoint(source, tmp_path, overwrite=True)
    assert (tmp_path / "file").exists() and (tmp_path / "model.safetensors").exists()


def test_nothing_to_compress(sources, tmp_path):
    """Keeping every expert would only copy the checkpoint."""
    with pytest.raises(ValueError, match="nothing to compress.*choose num_experts=2 to 7"):
        DernCompressor(dataset=random_tokens(), num_experts=EXPERTS).compress_checkpoint(sources("mixtral"), tmp_path)


def test_hidden_states_in_a_file(sources, tmp_path):
    """A bound that only a file for the hidden states keeps changes no bit of the result; a tighter one is refused."""
    options = {**QUICK, "dataset": random_tokens(40, 100)}
    skeleton = build_skeleton(sources("mixtral"))
    layers = find_moe_layers(skeleton)
    plan = plan_memory(skeleton, layers, 4000, DernCompressor(**options).config, 4)
    bound = plan.peak - 1
    assert plan_memory(skeleton, layers, 4000, DernCompressor(**options).config, 4, bound).spilled
    DernCompressor(**options).compress_checkpoint(sources("mixtral"), tmp_path / "free")
    compressor = DernCompressor(**options)
    compressor.compress_checkpoint(sources("mixtral"), tmp_path / "spilled", max_memory=bound)
    assert content(tmp_path / "free") == content(tmp_path / "spilled")
    with pytest.raises(ValueError, match="needs at least"):
        compressor.compress_checkpoint(sources("mixtral"), tmp_path / "refused", max_memory="100MB")
    assert not (tmp_path / "refused").exists()


def test_the_experts_of_an_earlier_report(sources, tmp_path):
    """Retained experts that one run has chosen are applied as they are by another, whatever its criterion."""
    options = {**QUICK, "dataset": random_tokens(12)}
    first = DernCompressor(**options, selection="random", seed=5).compress_checkpoint(
        sources("mixtral"), tmp_path / "a"
    )
    del options["num_experts"]
    second = DernCompressor(**options, protect_experts=tmp_path / "a" / "dern_report.json")
    report = second.compress_checkpoint(sources("mixtral"), tmp_path / "b")
    assert [layer.retained for layer in report.layers] == [layer.retained for layer in first.layers]
    plain = DernCompressor(**options, num_experts=4).compress_checkpoint(sources("mixtral"), tmp_path / "c")
    assert [layer.retained for layer in plain.layers] != [layer.retained for layer in first.layers]


def test_experts_stored_fused(tmp_path):
    """Experts in one tensor, though the family usually stores them one by one, are written the same way."""
    make_model("deepseek_v3").save_pretrained(tmp_path / "source", save_original_format=False)
    names = weights(tmp_path / "source").keys()
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    compressor = DernCompressor(dataset=random_tokens(12), **QUICK)
    compressor.compress_checkpoint(tmp_path / "source", tmp_path / "out")
    assert weights(tmp_path / "out").keys() == names
    expected = compressor.compress_model(AutoModelForCausalLM.from_pretrained(tmp_path / "source")).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_only_decoder_layers_are_extra(sources):
    """Layers past the end of the decoder are dropped; numbered ones elsewhere, such as a vision tower, are not."""
    skeleton = build_skeleton(sources("mixtral"))
    names = NameMap(skeleton, list(CheckpointReader(sources("mixtral")).infos))
    assert names.is_extra_layer("model.layers.2.enorm.weight", "model.layers", 2)
    assert names.is_extra_layer("mtp.fc.weight", "model.layers", 2)
    assert not names.is_extra_layer("model.layers.1.rotary_emb.inv_freq", "model.layers", 2)
    assert not names.is_extra_layer("vision.layers.30.weight", "model.layers", 2)


@pytest.mark.parametrize("counts", [{}, {"num_experts": [6, 4]}])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_run_that_has_finished_nothing_blocks_no_other(family, counts, sources, tmp_path, monkeypatch):
    """What an earlier run left before its first MoE layer goes, whatever differs."""
    source, options = sources(family), {**QUICK, "dataset": random_tokens(12)}
    note = Manifest.finish_layer

    def interrupted(self, position, value):
        if value is not None:
            raise KeyboardInterrupt
        note(self, position, value)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**options).compress_checkpoint(source, tmp_path / "out", dtype="bfloat16", **counts)
    assert (tmp_path / "out" / ".dern").is_dir()
    for name in ("out", "other"):
        DernCompressor(**options).compress_checkpoint(source, tmp_path / name)
    assert content(tmp_path / "out") == content(tmp_path / "other")
