"""The memory that a process may use, and the memory that GPUs have used."""

import resource
from types import SimpleNamespace

import psutil
import pytest
import torch

from optimum_dern.machine import progress


@pytest.mark.parametrize(
    ("cgroup", "limit", "expected"),
    [
        ("max", resource.RLIM_INFINITY, None),
        ("5000", resource.RLIM_INFINITY, 5000),
        ("5000", 3000, 3000),
        (None, 3000, 3000),
        (None, resource.RLIM_INFINITY, None),
    ],
)
def test_total_memory(monkeypatch, tmp_path, cgroup, limit, expected):
    """The machine's, or less where a container or a limit of the process allows less."""
    file = tmp_path / "memory.max"
    if cgroup is not None:
        file.write_text(f"{cgroup}\n")
    monkeypatch.setattr(progress, "CGROUP_LIMIT", file)
    monkeypatch.setattr(progress.resource, "getrlimit", lambda kind: (limit, resource.RLIM_INFINITY))
    assert progress.total_memory(torch.device("cpu")) == (expected or psutil.virtual_memory().total)


def test_memory_of_several_gpus(monkeypatch):
    """A model that is spread over GPUs, and perhaps the CPU, has used what all of them have used."""
    used = {"cuda:0": 5, "cuda:1": 7}
    counters = SimpleNamespace(
        max_memory_allocated=lambda device: used[str(device)], memory_allocated=lambda device: used[str(device)] - 1
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: counters)
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")]
    assert progress.peak_memory_bytes(devices) == 12
    assert progress.resident_bytes(devices) == 10
    assert progress.resident_bytes(devices[:1]) <= progress.peak_memory_bytes(devices[:1])
