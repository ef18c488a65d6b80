"""Threads by idle cores, by what a container allows, and the same ones when a run goes on."""

import pytest
import torch

from optimum_dern.machine import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores, of which others use some while they are watched; its container's limits."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(threads, "PROC", stat)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)

    def make(busy, quota=None):
        stat.write_text("cpu  1000 10 100 5000 50 0 5 0 0 0\ncpu0 1\n")
        ticks = 100 * busy
        watched = f"cpu  {1000 + ticks // 2} 10 {100 + ticks // 2} {5000 + 400 - ticks} 50 0 5 0 0 0\n"
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: stat.write_text(watched))
        if quota is not None:
            (tmp_path / "cpu.max").write_text(quota)

    return make


@pytest.mark.parametrize(
    ("busy", "quota", "expected"),
    [
        (0, None, 4),
        (1, None, 3),
        (4, None, 1),  # one thread in any case
        (0, "max 100000\n", 4),
        (0, "150000 100000\n", 2),  # one and a half cores' worth of time
        (3, "200000 100000\n", 1),
    ],
)
def test_idle_cores(machine, busy, quota, expected):
    """As many threads as there are idle cores, within what the container allows."""
    machine(busy, quota)
    environment = {}
    threads.choose_threads(environment)
    assert environment == {"OMP_NUM_THREADS": str(expected), "GOMP_SPINCOUNT": threads.SPINS}


def test_the_older_control_groups(machine, tmp_path):
    """Their quota and period are in two files."""
    machine(0)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.allowed_cores() == 1


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_user_has_set_stays(name):
    """Nothing is added beside it."""
    environment = {name: "3"}
    threads.choose_threads(environment)
    assert environment == {name: "3"}


def test_a_run_goes_on_with_its_own_number(tmp_path):
    """The first run's number counts for those after it, and the caller's comes back."""
    before, file = torch.get_num_threads(), tmp_path / "threads"
    torch.set_num_threads(2)
    assert threads.threads_of_run(file) == 2
    torch.set_num_threads(1)
    assert threads.threads_of_run(file) == 2
    with pytest.raises(ZeroDivisionError), threads.computing_with(2):
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
