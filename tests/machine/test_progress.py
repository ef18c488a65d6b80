"""The memory that a process may use."""

import resource

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
