"""Saving: every file is there, an interrupted save destroys nothing, and no stale file stays."""

import copy
import json
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import make_model, random_tokens, same_state, sample_texts, state_of, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import CompressionReport, DernCompressor, DernConfig
from optimum_dern.checkpoint.output import publishing, writer
from optimum_dern.errors import describe_error


FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "README.md",
    "dern_config.json",
    "dern_report.json",
    "dern_report.html",
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def compress(family="mixtral", num_experts=4, model_seed=0, **fields):
    """A compressor and its compressed model."""
    model = make_model(family, model_seed)
    compressor = DernCompressor(num_experts=num_experts, **{"dataset": random_tokens(), **fields})
    return compressor, compressor.compress_model(model)


def names(folder):
    """All files in a folder, hidden ones included."""
    return {file.name for file in folder.iterdir()}


def test_files(tmp_path):
    """The checkpoint, its card, its report and its provenance; nothing of the staging stays."""
    compressor, model = compress()
    compressor.save(model, tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == FILES
    assert names(tmp_path / "a") == {"b"}
    assert CompressionReport.load(tmp_path / "a" / "b" / "dern_report.json") == compressor.report


def test_provenance(tmp_path):
    """`dern_config.json` tells how to make the checkpoint again."""
    compressor, model = compress(dataset=[row["input_ids"].tolist() for row in random_tokens(12)], seed=3)
    compressor.save(model, tmp_path)
    stored = json.loads((tmp_path / "dern_config.json").read_text("utf-8"))
    assert stored["config"]["dataset"] == stored["calibration"]["dataset"] == "12 lists in memory (list)"
    assert (stored["calibration"]["sequences"], stored["calibration"]["tokens"]) == (12, 12 * 24)
    assert len(stored["calibration"]["sha256"]) == 64
    assert DernConfig(**stored["config"]).to_dict() == compressor.config.to_dict()
    assert stored["retained_experts"] == {layer.name: layer.retained for layer in compressor.report.layers}
    assert stored["seed"] == 3
    assert stored["versions"].keys() >= {"optimum-dern", "torch", "transformers"}
    assert (stored["source"], stored["revision"]) == (None, None)


def test_texts_are_not_published(tmp_path):
    """Calibration texts given in memory are described, and copied into none of the files."""
    model = make_model("mixtral")
    compressor = DernCompressor(num_experts=4, dataset=sample_texts())
    compressor.compress_model(model, tiny_tokenizer())
    compressor.save(model, tmp_path)
    for name in ("dern_config.json", "dern_report.json", "README.md"):
        content = (tmp_path / name).read_text("utf-8")
        assert "12 strs in memory (list)" in content
        assert sample_texts()[0] not in content


@pytest.mark.parametrize("form", ["object", "path", "source"])
def test_tokenizer(tmp_path, form):
    """A tokenizer is saved from an object, from a path, or from beside the source checkpoint."""
    source, output = tmp_path / "source", tmp_path / "out"
    make_model("mixtral").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    compressor = DernCompressor(num_experts=4, dataset=random_tokens())
    compressor.compress_model(model)
    compressor.save(model, output, {"object": tiny_tokenizer(), "path": str(source), "source": None}[form])
    assert names(output) >= FILES | TOKENIZER_FILES
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("some text")["input_ids"] == tiny_tokenizer()("some text")["input_ids"]
    assert json.loads((output / "dern_config.json").read_text("utf-8"))["source"] == "source"


def test_a_small_shard_size(tmp_path):
    """Several shards and their index, which plain transformers loads to the same tensors."""
    compressor, model = compress("qwen3_moe")
    compressor.save(model, tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    assert names(tmp_path) == FILES - {"model.safetensors"} | shards | {"model.safetensors.index.json"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(state_of(loaded), state_of(model))


@pytest.mark.parametrize(("first", "second"), [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "60KB")])
def test_stale_weights_are_removed(tmp_path, first, second):
    """Of an earlier save with other shards nothing stays; other files do."""
    compressor, model = compress(model_seed=1)
    compressor.save(model, tmp_path, max_shard_size=first)
    (tmp_path / "notes.md").write_text("mine", "utf-8")
    compressor, model = compress(num_experts=6, model_seed=2)
    compressor.save(model, tmp_path, max_shard_size=second)
    weights = {name for name in names(tmp_path) if name.startswith("model")}
    if second == "5GB":
        assert weights == {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
        assert weights == {*index["weight_map"].values(), "model.safetensors.index.json"}
        assert sum(len(load_file(tmp_path / name)) for name in set(index["weight_map"].values())) == len(
            index["weight_map"]
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_local_experts == 6
    assert same_state(state_of(loaded), state_of(model))
    assert (tmp_path / "notes.md").read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    "broken", ["save_pretrained", "write_sidecars", "_save_tokenizer", "write_presentation", "_publish"]
)
def test_a_failing_save_leaves_the_earlier_one(tmp_path, monkeypatch, broken):
    """Whatever fails before the files are moved, the checkpoint that was there still loads, and nothing is left."""
    compressor, model = compress(model_seed=1)
    compressor.save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    earlier = state_of(model)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    compressor, model = compress(num_experts=6, model_seed=2)
    if broken == "save_pretrained":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    elif broken == "write_presentation":
        monkeypatch.setattr(publishing, broken, fail)
    else:
        monkeypatch.setattr(writer, broken, fail)
    with pytest.raises(OSError, match="no space"):
        compressor.save(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same_state(state_of(AutoModelForCausalLM.from_pretrained(tmp_path)), earlier)


def test_a_disk_that_is_full(tmp_path):
    """The system refuses the weights: the error says what to do, and no file of the checkpoint is there."""
    compressor, model = compress()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))  # bytes; stands for a disk, which needs a mount
    try:
        with pytest.raises((OSError, SafetensorError)) as caught:
            compressor.save(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space there" in describe_error(caught.value)
    assert names(tmp_path) == set()
    compressor.save(model, tmp_path)
    assert names(tmp_path) == FILES


def test_the_index_comes_last(tmp_path, monkeypatch):
    """Files are renamed into place one by one, never written there, and the index after all shards."""
    moved = []
    replace = writer.os.replace
    monkeypatch.setattr(writer.os, "replace", lambda a, b: (moved.append((a, b)), replace(a, b)))
    compressor, model = compress()
    compressor.save(model, tmp_path, max_shard_size="20KB")
    targets = [target.relative_to(tmp_path).as_posix() for _, target in moved if target.parent == tmp_path]
    assert set(targets) == names(tmp_path)
    assert targets[-1] == "model.safetensors.index.json"


def test_the_model_is_not_changed_by_saving(tmp_path):
    """Tensors, config and dtype are the same after a save, so that a model can be saved twice."""
    compressor, model = compress("deepseek_v3")
    before, config = state_of(model), model.config.to_dict()
    for name in ("first", "second"):
        compressor.save(model, tmp_path / name)
    assert same_state(before, state_of(model))
    assert {key: value for key, value in model.config.to_dict().items() if key != "architectures"} == {
        key: value for key, value in config.items() if key != "architectures"
    }
    assert (tmp_path / "first" / "config.json").read_bytes() == (tmp_path / "second" / "config.json").read_bytes()
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_a_bfloat16_checkpoint(tmp_path, family):
    """Tensors go out in the dtype that the model has, and come back equal."""
    model = make_model(family, tie_word_embeddings=True).to(torch.bfloat16)
    compressor = DernCompressor(num_experts=4, dataset=random_tokens())
    compressor.compress_model(model)
    compressor.save(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    expected = {name: tensor.to(loaded.state_dict()[name].dtype) for name, tensor in state_of(model).items()}
    assert same_state(state_of(loaded), expected)


def test_permissions(tmp_path):
    """All files can be read by whoever the process's umask lets read."""
    compressor, model = compress()
    compressor.save(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    (tmp_path / "plain").write_text("", "utf-8")
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()} == dict.fromkeys(
        names(tmp_path / "out"), expected
    )


@pytest.mark.parametrize("spelling", ["source", "link", "other/../source"])
def test_the_source_is_never_overwritten(tmp_path, spelling):
    """The folder that a model was loaded from keeps its original, however it is spelt."""
    make_model("mixtral").save_pretrained(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "other").mkdir()
    compressor = DernCompressor(num_experts=4, method="prune", dataset=random_tokens())
    model = compressor.compress_model(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    with pytest.raises(ValueError, match="is the folder that the model was loaded from.*choose another"):
        compressor.save(model, tmp_path / spelling)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "source").config.num_local_experts == 8
    for _ in range(2):
        compressor.save(model, tmp_path / "out")


def test_another_model_gets_no_card(tmp_path):
    """Only the compressed model is saved, or what has its number of experts: a healed copy, or one loaded again."""
    compressor, model = compress(preset="paper", method="prune")
    with pytest.raises(ValueError, match=r"2 MoE layers with \[8\] experts, the one that was compressed 2 with \[4\]"):
        compressor.save(make_model("mixtral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressor.save(copy.deepcopy(model), tmp_path / "copy")
    compressor.save(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), tmp_path / "again")
    compress(num_experts=2, preset="paper", method="prune")[0].compress_model(model)
    with pytest.raises(ValueError, match=r"with \[2\] experts"):
        compressor.save(model, tmp_path / "out")
