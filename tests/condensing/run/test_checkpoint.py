"""Layers of a checkpoint condensed from disk to disk: the same as in memory, whatever interrupts it, or refused."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from tiny import WIDTH, padded_batch, random_tokens, tiny_tokenizer
from transformers import AutoConfig

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.commands.main import main
from optimum_dern.condensing.plan import condensed_size
from optimum_dern.core.layer.workspace import MAX_ELEMENTS
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint
from optimum_dern.models.moe.structure import find_moe_layers, layers_by_position
from optimum_dern.models.skeleton import build_skeleton
from optimum_dern.results.report import CompressionReport


DATA = random_tokens(12)
FIELDS = {"method": "cd_moe", "dataset": DATA, "batch_size": 4, "self_share": 0.0, "random_share": 0.0}
RUN = "optimum_dern.condensing.run.checkpoint"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of every family, made when it is asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def source(family):
        if not (folder / family).exists():
            make_model(family).save_pretrained(folder / family)
        return folder / family

    return source


def weights(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def content(folder):
    """Digests of the files that must not depend on how a run went."""
    files = [folder / name for name in ("config.json", "model.safetensors", "dern_manifest.json", "dern_config.json")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(
    ("family", "which", "dense"),
    [
        ("qwen3_moe", [1], [1]),  # which layers are dense is a list; their width is that of what they are made of
        ("deepseek_v3", 1, [1]),  # how many come first; their width is given, and some of it is zeros
        ("glm4v_moe", 1, [1]),  # inside a model that sees images
        ("ernie4_5_moe", [1], [1]),  # tensors have names of their own on disk
    ],
)
def test_the_same_as_in_memory(family, which, dense, sources, tmp_path):
    """Plain transformers loads it, logits are those of the model condensed in memory, and the rest is as it was."""
    source, fields = sources(family), {**FIELDS, "condensed_layers": which, "num_experts": 2}
    report = DernCompressor(**fields).compress_checkpoint(source, tmp_path / "out")
    loaded, information = type(make_model(family)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(information.values())
    model, compressor = type(loaded).from_pretrained(source).eval(), DernCompressor(**fields)
    compressor.save(compressor.compress_model(model), tmp_path / "memory")
    ids = DATA[0]["input_ids"].unsqueeze(0)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    found, expected, before = (weights(folder) for folder in (tmp_path / "out", tmp_path / "memory", source))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(found[name], before[name]) for name in found.keys() & before.keys())
    configs = [json.loads((tmp_path / kind / "config.json").read_text("utf-8")) for kind in ("out", "memory")]
    assert configs[0] == configs[1]
    assert report.dense_layers == compressor.report.dense_layers == dense
    assert (report.before, report.after) == (compressor.report.before, compressor.report.after)
    skeleton = build_skeleton(source)
    assert condensed_size(skeleton, find_moe_layers(skeleton), which, 2) == report.after
    left = layers_by_position(loaded, find_moe_layers(loaded))
    assert not {*dense} & left.keys() and report.after.parameters == sum(p.numel() for p in loaded.parameters())
    for mine, theirs in zip(report.layers, compressor.report.layers, strict=True):
        assert (mine.retained, mine.errors, mine.divergence) == (theirs.retained, theirs.errors, theirs.divergence)
        assert mine.dense and len(mine.retained) == 2 and (mine.divergence is None) == isinstance(which, list)


def test_files_and_dtypes(sources, tmp_path, monkeypatch):
    """Hidden states and experts in files, and several shards, change nothing; experts default to a token's."""
    fields = {**FIELDS, "condensed_layers": 1}
    compressor = DernCompressor(**fields)
    expected = compressor.compress_checkpoint(sources("qwen3_moe"), tmp_path / "plain", dtype="bfloat16")
    memory = SimpleNamespace(spilled=True, experts_in_file=True, mapped=160 << 20, max_elements=MAX_ELEMENTS)
    monkeypatch.setattr("optimum_dern.engine.run.prepare.plan_memory", lambda *args: memory)
    monkeypatch.setattr("optimum_dern.machine.scratch.SMALL", 0)
    options = {"dtype": "bfloat16", "max_shard_size": "20KB"}
    found = compressor.compress_checkpoint(sources("qwen3_moe"), tmp_path / "out", **options)
    assert len([*(tmp_path / "out").glob("model*.safetensors")]) > 2
    plain, out = weights(tmp_path / "plain"), weights(tmp_path / "out")
    assert out.keys() == plain.keys() and all(torch.equal(out[name], plain[name]) for name in out)
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    assert found.layers[0].divergence == expected.layers[0].divergence and len(found.layers[0].retained) == 2
    (dense,) = found.dense_layers
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.mlp_only_layers, config.intermediate_size) == ([dense], 2 * WIDTH)


@pytest.mark.parametrize("moment", ["layer", "search", "copy"])
def test_resume(moment, sources, tmp_path, monkeypatch):
    """Interrupted after a layer, in the search, or before it copies: it ends the same way, without repeats."""
    fields, source = {**FIELDS, "condensed_layers": 1, "num_experts": 1}, sources("qwen3_moe")
    DernCompressor(**fields).compress_checkpoint(source, tmp_path / "whole")
    places = {"search": f"{RUN}.search_layers", "copy": f"{RUN}.copy_rest"}
    note = Manifest.finish_layer

    def stop(*args, **kwargs):
        if moment == "layer":
            note(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "layer":
            patch.setattr(Manifest, "finish_layer", stop)
        else:
            patch.setattr(places[moment], stop)
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**fields).compress_checkpoint(source, tmp_path / "part")
    made = []
    monkeypatch.setattr(Manifest, "finish_layer", lambda self, at, value: (made.append(at), note(self, at, value)))
    DernCompressor(**fields).compress_checkpoint(source, tmp_path / "part")
    assert made == ([1] if moment == "layer" else [])
    assert content(tmp_path / "part") == content(tmp_path / "whole") and not (tmp_path / "part" / ".dern").exists()


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("mixtral", {"condensed_layers": [0]}, "mixtral cannot say that a layer is dense.*num_experts=2 keeps their"),
        ("qwen2_moe", {"condensed_layers": 1}, "its block also has shared_expert_gate.weight"),
        ("deepseek_v3", {"condensed_layers": [2]}, r"layers \[2\] cannot become dense alone; give all from 1 on"),
        ("deepseek_v3", {"condensed_layers": [0, 1]}, r"layer 0 is to become dense, but the MoE layers are \[1, 2\]"),
        ("deepseek_v3", {"condensed_layers": 3}, "3 layers are to become dense, but the model has 2"),
        ("deepseek_v3", {"condensed_layers": 1, "num_experts": 3}, "neurons, and its config has one width for all"),
        ("qwen3_moe", {"condensed_layers": 1, "num_experts": 0}, "no shared ones; give 1 to 8"),
    ],
)
def test_refused(family, fields, match, sources, tmp_path, monkeypatch):
    """With the reason, before any weight is read or anything written; and so in memory."""
    config, source = {**FIELDS, **fields}, sources(family)
    model = make_model(family)
    monkeypatch.setattr("optimum_dern.checkpoint.format.reader.CheckpointReader.read", None)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=match):
        DernCompressor(**config).compress_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=match):
        DernCompressor(**config).compress_model(model)


def test_runs_that_are_refused(sources, tmp_path):
    """Several numbers of experts, and recorded statistics."""
    compressor, places = DernCompressor(**FIELDS, condensed_layers=1), (sources("qwen3_moe"), tmp_path / "out")
    with pytest.raises(ValueError, match="a run condenses layers in one way; give one number"):
        compressor.compress_checkpoint(*places, num_experts=[1, 2])
    with pytest.raises(ValueError, match="recorded statistics are not enough"):
        compressor.compress_checkpoint(*places, statistics=tmp_path / "none")


def test_as_published(sources, tmp_path):
    """Without guard and refit nothing is judged; the command finds the same as Python, and says what is dense."""
    source = sources("deepseek_v3")
    tiny_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n\n".join(f"text number {n} of some length" for n in range(30)), "utf-8")
    arguments = ["--method", "cd_moe", "--num-experts", "0", "--preset", "paper", "--dataset", tmp_path / "text.txt"]
    main(["compress", *map(str, [source, tmp_path / "out", *arguments, "--condensed-layers", "[1]"])])
    report = CompressionReport.load(tmp_path / "out" / "dern_report.json")
    (layer,) = report.layers
    assert (layer.layer, layer.winner, layer.errors, layer.held_out_tokens) == (1, "condensed", {}, 0)
    assert layer.retained == [] and AutoConfig.from_pretrained(tmp_path / "out").first_k_dense_replace == 2
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# deepseek_v3, layer 1 dense" in card and ": the shared experts alone work on every token" in card
    assert "--condensed-layers '[1]'" in card and "--num-experts 0" in card


def test_trained_copies_are_saved(sources, tmp_path):
    """The report is known to be of a model with dense layers, even where all are; such a model is still measured."""
    compressor = DernCompressor(**FIELDS, condensed_layers=[0, 1], num_experts=1)
    model = compressor.compress_model(make_model("qwen3_moe"))
    del model.dern_report
    compressor.save(model, tmp_path / "all")
    assert compressor.report.after.experts == 0 and not find_moe_layers(model)
    batch = padded_batch([20, 14], "left")
    (logits,) = StreamedCheckpoint(tmp_path / "all", torch.device("cpu")).stream_logits([batch])
    assert torch.equal(logits, model(**batch).logits)
    with pytest.raises(ValueError, match="model.layers.0.mlp has routed experts in this model, and is dense in"):
        other = DernCompressor(**FIELDS, condensed_layers=[0], num_experts=1)
        other.compress_model(make_model("qwen3_moe"))
        other.save(make_model("qwen3_moe"), tmp_path / "other")
