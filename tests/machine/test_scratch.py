"""A layer's experts in files: the same bits, nothing as large as them in memory, nothing left behind."""

import ctypes
import errno
import gc
import hashlib
import os
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny import make_model, random_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.tensors import CheckpointOutput
from optimum_dern.core.pictures import similarity_map
from optimum_dern.engine.run import prepare as preparation
from optimum_dern.machine import scratch
from optimum_dern.machine.scratch import CopiesInFiles, Scratch, resident_in_files


linux = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
EXPERTS, WIDTH = 24, 96
SOURCES = {  # without and with groups and dense layers
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH, "num_hidden_layers": 2},
}


def mapped_bytes():
    """Of files without a name that this process has mapped."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        spans = [line.split()[0].split("-") for line in lines if "(deleted)" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


@linux
def test_tensors_in_files(tmp_path):
    """They keep their content when their pages go, leave no name in the folder, and give their space back."""
    gc.collect()  # what earlier tests have left
    before = mapped_bytes()
    maker = Scratch(tmp_path)
    tensor = maker.empty((64, 1 << 16), dtype=torch.bfloat16)
    tensor.copy_(torch.arange(64).unsqueeze(1))
    assert mapped_bytes() - before == tensor.nbytes and not list(tmp_path.iterdir())
    resident = resident_in_files()
    maker.unmap_pages()
    assert resident - resident_in_files() >= tensor.nbytes // 2
    assert tensor[:, -1].tolist() == list(range(64))
    del tensor
    gc.collect()
    assert mapped_bytes() == before
    maker.empty((8,), dtype=torch.float32)
    assert mapped_bytes() == before  # not worth a file


@linux
def test_resident_pages_are_bounded(tmp_path):
    """The watching thread lets go of pages beyond the bound, and ends with the context."""
    maker = Scratch(tmp_path)
    tensor = maker.empty((32 << 20,), dtype=torch.uint8)
    with maker.bounded(resident=4 << 20):
        threads = [thread for thread in threading.enumerate() if thread.name == "scratch"]
        before = resident_in_files()
        for value in (7, 8):
            tensor.fill_(value)
            deadline = time.monotonic() + 20
            while resident_in_files() > before + (16 << 20) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert resident_in_files() <= before + (16 << 20)
    assert len(threads) == 1 and not threads[0].is_alive()
    assert int(tensor.min()) == 8


def test_copies_share_files(tmp_path, monkeypatch):
    """Many small tensors take few files, each aligned as torch aligns, and keep their content."""
    monkeypatch.setattr(scratch, "BLOCK", 1000)
    copies, tensors = CopiesInFiles(tmp_path), [torch.randn(n) for n in (3, 100, 1, 500)]
    found = [copies.copy(tensor) for tensor in tensors]
    copies.unmap_pages()
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert len(copies._mapped) == 2 and all(tensor.data_ptr() % 64 == 0 for tensor in found)


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    """Space is reserved at once, and where there is none the error says what to do."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="no room for 0.00 GiB of working files in .*raise max_memory"):
        Scratch(tmp_path).empty((1 << 21,), dtype=torch.uint8)


class LargestInMemory(TorchDispatchMode):
    """Notes the largest storage that an operation returns and that is not in a file, from the first file on.

    Before that the skeleton is built, whose parameters are made one by one and never filled.
    """

    def __init__(self):
        super().__init__()
        self.files, self.found = [], (0, "")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                place, larger = storage.data_ptr(), storage.nbytes() > self.found[0]
                if larger and self.files and not any(start <= place < start + size for start, size in self.files):
                    self.found = storage.nbytes(), str(operation)
        return result


@pytest.fixture
def in_files(monkeypatch):
    """Every run keeps its experts in files, however small, and works in tiny blocks; the places of these files."""
    made, map_file, plan = [], scratch.map_file, preparation.plan_memory

    def noting(folder, size):
        mapped = map_file(folder, size)
        made.append((ctypes.addressof(ctypes.c_char.from_buffer(mapped)), size))
        return mapped

    monkeypatch.setattr(scratch, "map_file", noting)
    monkeypatch.setattr(scratch, "SMALL", 4096)
    monkeypatch.setattr(similarity_map, "BLOCK", 1024)
    monkeypatch.setattr(
        preparation,
        "plan_memory",
        lambda *args: replace(plan(*args), spilled=True, experts_in_file=True, max_elements=1024),
    )
    return made


def digests(folder):
    """Of a checkpoint's weights."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def compress(source, output, **fields):
    """Half of the experts, by four short sequences."""
    options = {"num_experts": EXPERTS // 2, "batch_size": 1, "dataset": random_tokens(4, 8), **fields}
    return DernCompressor(**options).compress_checkpoint(source, output)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_same_bits(family, tmp_path, request):
    """Whether experts are in memory or in files; then nothing half as large as all of them is in memory."""
    options = SOURCES[family] if family == "deepseek_v3" else {**SOURCES[family], "num_hidden_layers": 1}
    make_model(family, **options).save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "memory")
    files = request.getfixturevalue("in_files")
    with LargestInMemory() as watch:
        watch.files = files
        compress(tmp_path / "source", tmp_path / "files")
    assert digests(tmp_path / "files") == digests(tmp_path / "memory") != {}
    assert files and not (tmp_path / "files" / ".dern").exists()
    size, operation = watch.found
    assert size < EXPERTS * 3 * 32 * WIDTH * 4 // 4, operation  # a quarter of them, half of those that stay


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, in_files):
    """With experts in files, too, the same command ends with the bits of an undisturbed run, and no file is left."""
    make_model("mixtral", **SOURCES["mixtral"]).save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "whole", neuron_refit=False)
    gc.collect()  # what earlier tests have left
    finish, before = CheckpointOutput.finish, mapped_bytes() if sys.platform == "linux" else 0

    def stopped(self, position, report):
        if position == 1:
            raise KeyboardInterrupt
        finish(self, position, report)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointOutput, "finish", stopped)
        compress(tmp_path / "source", tmp_path / "out", neuron_refit=False)
    gc.collect()
    assert sys.platform != "linux" or mapped_bytes() <= before
    names = {file.name for file in (tmp_path / "out" / ".dern").iterdir()}
    assert all(name.endswith((".safetensors", ".json", "lock", "threads")) for name in names), names
    compress(tmp_path / "source", tmp_path / "out", neuron_refit=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
