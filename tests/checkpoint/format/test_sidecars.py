"""What lies beside weights: of a source only what belongs is copied, and nothing in the output gets in the way."""

import json
import logging

import pytest
import torch
from tiny import make_model, random_tokens, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.sidecars import companions, left_out
from optimum_dern.checkpoint.output.folder import check_no_foreign, set_card_aside


FIELDS = {"num_experts": 4, "dataset": random_tokens(), "method": "prune", "preset": "paper", "batch_size": 4}
BELONGS = (  # names from public repositories
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model tokenizer.model.v3 spiece.model sentencepiece.bpe.model tekken.json qwen.tiktoken hy.tiktoken "
    "bpe.codes rwkv_vocab_v20230424.txt preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "chat_template.json chat_template.jinja generation_config.json modeling_own.py tokenization_own.py LICENSE "
    "LICENSE.txt License.md LICENCE NOTICE NOTICE.txt USE_POLICY.md README_zh.md requirements.txt"
).split()
STRAY = (
    "adapter_config.json adapter_model.bin hf_quant_config.json quantize_config.json quant_config.json params.json "
    "__0_0.distcp optimizer.pt optimizer.bin scheduler.pt training_args.bin rng_state.pth rng_state_0.pth data.pkl "
    "trainer_state.json all_results.json events.out.tfevents.1.host.0 model-q4.gguf pytorch_model.bin "
    "consolidated.safetensors modules.json recipe.yaml picture.png zero.tar"
).split()
FOLDERS = ("runs", "checkpoint-500", "original", "global_step10")
PICTURES = "assets/dern_report.png"  # of a source that is a result itself


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with everything that people's folders hold."""
    folder = tmp_path_factory.mktemp("source") / "model"
    make_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in (
        *BELONGS,
        *STRAY,
        *(f"{name}/file" for name in FOLDERS),
        "additional_chat_templates/tools.jinja",
        PICTURES,
    ):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}", "utf-8")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "me/nowhere"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), "utf-8")
    (folder / "README.md").write_text("old", "utf-8")
    return folder


def test_what_belongs(source):
    """By name alone."""
    assert sorted(companions(source)) == sorted([*BELONGS, "additional_chat_templates/tools.jinja"])
    assert sorted(left_out(source)) == sorted([*STRAY, *(f"{name}/" for name in FOLDERS)])


def test_only_that_is_copied(source, tmp_path, caplog):
    """One line names the rest, and the result loads, though an adapter lies beside the source's weights."""
    with caplog.at_level(logging.WARNING):
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    names = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    own = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}
    assert {name for name in names if not name.startswith("dern_")} - own == {*companions(source)}
    (line,) = [record.getMessage() for record in caplog.records if "not copied" in record.getMessage()]
    assert "adapter_config.json" in line and "hf_quant_config.json" in line
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.num_local_experts == 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A source without anything strange, and without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    make_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_by_disk(source, output):
    """`compress --overwrite`."""
    DernCompressor(**FIELDS).compress_checkpoint(source, output, overwrite=True)


def write_by_memory(source, output):
    """`compress_model` and `save`."""
    compressor = DernCompressor(**FIELDS)
    compressor.save(compressor.compress_model(AutoModelForCausalLM.from_pretrained(source)), output)


WRITERS = [write_by_disk, write_by_memory]
FOREIGN = (
    "pytorch_model.bin pytorch_model-00001-of-00002.bin adapter_config.json adapter_model.safetensors model-q4.gguf "
    "consolidated.00.pth consolidated.safetensors params.json hf_quant_config.json quantize_config.json tf_model.h5"
).split()


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_weights(name, tmp_path):
    """What programs would read instead of the result, or with it."""
    (tmp_path / name).write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=f"holds files of another checkpoint.*: {name}; they are not deleted: move"):
        check_no_foreign([tmp_path / "nowhere", tmp_path])


@pytest.mark.parametrize("write", WRITERS)
def test_foreign_weights_are_refused_before_any_work(write, plain, tmp_path, monkeypatch):
    """And left as they are; a folder of several results is looked into, too."""
    (tmp_path / "adapter_config.json").write_text("mine", "utf-8")
    if write is write_by_disk:
        monkeypatch.setattr("optimum_dern.engine.run.checkpoint._compress", None)
        monkeypatch.setattr("optimum_dern.engine.run.prepare._load_data", None)
    with pytest.raises(ValueError, match="holds files of another checkpoint"):
        write(plain, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    (tmp_path / "several" / "6-experts").mkdir(parents=True)
    (tmp_path / "several" / "6-experts" / "model.gguf").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="6-experts holds files of another checkpoint"):
        compressor = DernCompressor(**FIELDS)
        compressor.compress_checkpoint(plain, tmp_path / "several", num_experts=[6, 4], overwrite=True)


@pytest.mark.parametrize("write", WRITERS)
def test_an_earlier_checkpoint_is_replaced(write, plain, tmp_path):
    """Its weights and tokenizer go, its card is kept under another name, and what is no part of a model stays."""
    torch.save({}, tmp_path / "training_args.bin")
    mine = {"notes.txt": "mine", "my_tokens.json": "mine", "LICENSE": "mine", "README.md": "# about\nmine"}
    stale = ("chat_template.jinja", "tokenizer.model", "merges.txt", "additional_chat_templates/tools.jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    for name in (*mine, *stale, "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_text(mine.get(name, "old"), "utf-8")
    for _ in range(2):
        write(plain, tmp_path)
    assert not [name for name in (*stale, "model-00001-of-00001.safetensors") if (tmp_path / name).exists()]
    kept = {name: (tmp_path / name).read_text("utf-8") for name in mine if name != "README.md"}
    assert kept == dict.fromkeys(kept, "mine") and (tmp_path / "training_args.bin").exists()
    assert (tmp_path / "README.old.md").read_text("utf-8") == mine["README.md"]
    assert "routed experts" in (tmp_path / "README.md").read_text("utf-8")
    assert not list(tmp_path.glob("README.old1*"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and model.config.num_local_experts == 4
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_a_tokenizer_that_was_saved_first_stays(tmp_path):
    """`save` without a tokenizer of its own does not take away the one that is there."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    compressor = DernCompressor(**FIELDS)
    compressor.save(compressor.compress_model(make_model("mixtral")), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_cards_are_kept_once_each(tmp_path):
    """A second card of something else gets a name of its own; one that is no text is no obstacle."""
    for content in (b"one", b"\xff\xfe two"):
        (tmp_path / "README.md").write_bytes(content)
        set_card_aside(tmp_path)
    assert (tmp_path / "README.old.md").read_bytes() == b"one"
    assert (tmp_path / "README.old1.md").read_bytes() == b"\xff\xfe two"
    (tmp_path / "README.md").write_text("---\ntags:\n- moe\n- dern\n---\n# x\n", "utf-8")
    set_card_aside(tmp_path)
    assert (tmp_path / "README.md").exists()
