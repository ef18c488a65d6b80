"""What happens to machines, done to real runs: one line that says so, nothing lost, the same bits afterwards.

`benchmarks/faults.py` has the faults, and runs them; here its results are asked for, a few of them in quick tests.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = (
    "full disk, while files are moved",
    "limit on the size of files, at a layer",
    "no memory left, at the start",
    "SIGTERM, at a layer",
    "SIGKILL, while files are moved",
    "source replaced, and put back",
    "merge: SIGKILL, before it gets its name",
    "merge: fine-tuned model replaced, and put back",
    "merge --layerwise: full disk, at the second layer",
    "patterns build: SIGTERM, between its files",
    "attribute: SIGKILL, while the masked model is written",
)
SLOW = tuple(name for name in FAULTS if name not in QUICK)


@pytest.fixture(scope="module")
def injected(request):
    """What came of the faults that this session asks for, all injected by one process, and its errors."""
    items = [item for item in request.session.items if item.module is request.module]
    names = [item.callspec.params["name"] for item in items]
    command = [sys.executable, BENCHMARKS / "faults.py", "--json", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    return {row["fault"]: row for row in map(json.loads, done.stdout.splitlines())}, done.stderr


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_faults(name, injected):
    """The run says what is wrong and what to do; source and final names are whole; the same command gets it done.

    Names of faults of other commands than `compress` begin with the command.
    """
    rows, errors = injected
    if name not in rows and FAULTS[name].mounts and rows:
        pytest.skip("no disk can be mounted here; a limit on the size of files stands for the full one")
    assert name in rows, errors
    assert rows[name]["problems"] == []
    if ": " not in name:
        kept = {"at the start": 0, "at a layer": 1, "while files are moved": 3}
        assert rows[name]["layers kept"] == kept.get(name.partition(", ")[2], rows[name]["layers kept"])
