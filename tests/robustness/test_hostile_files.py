"""Checkpoints that lie, lead elsewhere or make no sense are refused in plain words, and nothing is written."""

import json

import pytest
import torch
from safetensors.torch import save
from tiny import make_model, tiny_tokenizer

from optimum_dern.checkpoint.format.reader import stored_tensors
from optimum_dern.checkpoint.format.tensor_file import read_header
from optimum_dern.checkpoint.format.weight_files import weight_names
from optimum_dern.commands.main import main
from optimum_dern.text_files import parse_object, read_object


DEEP = b"[" * 100_000


def lying(**changes):
    """A safetensors file of two tensors of four bytes, some of its header's entries changed."""
    entries = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    entries |= {
        name: entries[name] | change if isinstance(change, dict) else change for name, change in changes.items()
    }
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


HEADERS = {
    "in one place": (lying(b={"data_offsets": [2, 6]}), "has a and b in the same place"),
    "the same place": (lying(b={"data_offsets": [0, 4]}), "has a and b in the same place"),
    "behind the end": (lying(b={"data_offsets": [400, 404]}), "shorter than its header says"),
    "backwards": (lying(a={"data_offsets": [4, 0]}), "contradicts itself about a"),
    "negative": (lying(a={"data_offsets": [-4, 0]}), "contradicts itself about a"),
    "a huge shape": (lying(a={"shape": [1 << 62, 4]}), "contradicts itself about a"),
    "a negative shape": (lying(a={"shape": [-1]}), "contradicts itself about a"),
    "a fraction": (lying(a={"shape": [1.0]}), "contradicts itself about a"),
    "no shape": (lying(a={"shape": None}), "does not describe a"),
    "no entry": (lying(a=7), "does not describe a"),
    "three offsets": (lying(a={"data_offsets": [0, 1, 2]}), "does not describe a"),
    "another dtype": (lying(a={"dtype": "F64"}), "contradicts itself about a"),
    "no dtype": (lying(a={"dtype": ["F32"]}), "does not describe a|contradicts itself about a"),
    "a list": (b"\x02" + bytes(7) + b"[]", "holds a list where a JSON object is needed"),
    "no JSON": (b"\x02" + bytes(7) + b"{]", "is not JSON"),
    "no text": (b"\x02" + bytes(7) + b"\xff\xfe", "is not JSON"),
    "deep": ((1 << 16).to_bytes(8, "little") + DEEP, "nested too deeply"),
    "a long header": ((1 << 40).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
    "empty": (b"", "is not a safetensors file"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "is not a safetensors file"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name, tmp_path):
    content, message = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_what_the_library_writes_is_read(tmp_path):
    """Tensors without elements, scalars and an empty file among it."""
    tensors = {"a": torch.zeros(0, 3), "b": torch.tensor(1.0), "c": torch.zeros(2, 2, dtype=torch.bfloat16)}
    (tmp_path / "model.safetensors").write_bytes(save(tensors))
    assert {n: i.shape for n, i in read_header(tmp_path / "model.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    (tmp_path / "none.safetensors").write_bytes(save({}))
    assert read_header(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]
)
@pytest.mark.parametrize("where", ["index", "config"])
def test_names_that_leave_the_folder(name, where, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(save({"a": torch.ones(1)}))
    if where == "index":
        text = json.dumps({"weight_map": {"a": name}})
        (folder / "model.safetensors.index.json").write_text(text)
    else:
        (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(ValueError, match="outside of the checkpoint's folder"):
        stored_tensors(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "names 1 as a weight file"),
        ('{"weight_map": {"a": ""}}', "names '' as a weight file"),
        ('{"weight_map": {"a": "' + "a" * 300 + '"}}', "names 'a{79} as a weight file; download it again"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "holds one half of a surrogate pair.*; download it again"),
        ("{", "is not JSON"),
    ],
)
def test_indices(content, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        weight_names(tmp_path)


def test_json_of_others(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with a byte order mark
    assert read_object(path) == {"a": 1}
    for content, message in (
        (DEEP, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b"1", "an? int"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_object(content, "config.json")


CONFIGS = {
    "a list": b"[]",
    "cut": b'{"model_type": "mixtral", "num_',
    "deep": b'{"model_type": ' + DEEP,
    "UTF-16": '{"model_type": "mixtral"}'.encode("utf-16"),
    "no type": b"{}",
    "unknown type": b'{"model_type": "no_such_model"}',
    "type of a wrong type": b'{"model_type": 7}',
    "own code": b'{"model_type": "mine", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}',
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_configs(name, command, tmp_path, capsys):
    """One line on stderr, exit code 2; nothing is written, and code that came along is not run."""
    folder = tmp_path / "model"
    make_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_bytes(CONFIGS[name])
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    arguments = [command, str(folder)] + ([str(tmp_path / "out")] if command == "compress" else [])
    with pytest.raises(SystemExit) as error:
        main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("optimum-dern: error: ")]
    assert error.value.code == 2 and len(lines) == 1, captured.err
    assert "--traceback shows where" not in captured.err, captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
