"""Loading of a layer: bit for bit as transformers does, each byte read once, no conversion where none is due."""

import os

import pytest
import torch
from families import make_model as make_family
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dern.checkpoint.format import reader as reader_module
from optimum_dern.checkpoint.format.conversion import NameMap
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.checkpoint.source import loader as loader_module
from optimum_dern.checkpoint.source.loader import PartLoader
from optimum_dern.models.moe.structure import find_moe_layers


def open_loader(folder, dtype):
    """A loader of a model that is on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    reader = CheckpointReader(folder)
    names = NameMap(model, list(reader.infos))
    return PartLoader(model, find_moe_layers(model), reader, names, torch.device("cpu"))


def count_conversions(monkeypatch):
    """The names of the tensors of every call of transformers' loading functions."""
    calls, load = [], loader_module.load_tensors_
    monkeypatch.setattr(loader_module, "load_tensors_", lambda *args: (calls.append(set(args[1])), load(*args)))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe", "nemotron_h"])
def test_layers_are_those_of_transformers(kind, dtype, tmp_path, monkeypatch):
    """Whether stored one by one or fused, with or without a gate, also when converted from float32."""
    make_family(kind).float().save_pretrained(tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters())
    loader, calls = open_loader(tmp_path, dtype), count_conversions(monkeypatch)
    for position, layer in enumerate(loader.decoder_layers):
        calls.clear()
        loader.reader.bytes_read = 0
        with loader.loaded(position):
            found = {f"{loader.decoder}.{position}.{name}": value for name, value in layer.named_parameters()}
            for name, value in found.items():
                assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        assert loader.reader.bytes_read == sum(lazy.info.size for lazy in loader.tensors(position).values())
        assert len(calls) == 1  # the tensors that are none of single experts'


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    """As many numbers in another shape are not taken for an expert's."""
    make_model("mixtral").save_pretrained(tmp_path)
    loader = open_loader(tmp_path, torch.float32)
    tensors = loader.tensors(0)
    name = next(name for name in tensors if ".experts." in name and "w2" in name)
    info = tensors[name].info
    tensors[name] = loader.reader.lazy(name)
    loader.reader.stored[name] = tensors[name].info = info._replace(shape=info.shape[::-1])
    with pytest.raises(ValueError, match="does not fit the model"), loader.loaded(0, tensors):
        pass


def test_other_conversions_are_left_to_transformers(tmp_path, monkeypatch):
    """Experts that are more than put together are converted one at a time, with the same result."""
    make_model("mixtral").save_pretrained(tmp_path)
    loader = open_loader(tmp_path, torch.float32)
    with loader.loaded(0):
        direct = {name: value.clone() for name, value in loader.decoder_layers[0].named_parameters()}
    calls = count_conversions(monkeypatch)
    monkeypatch.setattr(NameMap, "slots", lambda *_: None)
    with loader.loaded(0):
        assert all(torch.equal(direct[n], value) for n, value in loader.decoder_layers[0].named_parameters())
    experts = len(direct["mlp.experts.down_proj"])
    assert len(calls) == 2 * experts + 1


def note_announcements(monkeypatch):
    """The byte ranges that the system is told of."""
    ranges = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *args: ranges.append(args), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return ranges


def test_the_next_layer_is_announced(tmp_path, monkeypatch):
    """All of its bytes and no others, when this layer has been read; nothing behind the last layer."""
    make_model("mixtral").save_pretrained(tmp_path)
    loader, ranges = open_loader(tmp_path, torch.float32), note_announcements(monkeypatch)
    last = len(loader.decoder_layers) - 1
    infos = [lazy.info for lazy in loader.tensors(last).values()]
    with loader.loaded(last - 1):
        assert sorted(ranges) == sorted((info.start, info.size, 3) for info in infos)
        assert loader.reader.bytes_read == sum(lazy.info.size for lazy in loader.tensors(last - 1).values())
    ranges.clear()
    with loader.loaded(last):
        assert not ranges


def test_announcements_are_bounded_and_optional(tmp_path, monkeypatch):
    """Only so much of a large layer, and a system or file system without them does as well."""
    make_model("mixtral").save_pretrained(tmp_path)
    loader, ranges = open_loader(tmp_path, torch.float32), note_announcements(monkeypatch)
    monkeypatch.setattr(reader_module, "AHEAD", 1000)
    with loader.loaded(0):
        assert sum(size for _, size, _ in ranges) == 1000

    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with loader.loaded(0):
        pass
    monkeypatch.delattr(os, "posix_fadvise")
    with loader.loaded(0):
        pass
