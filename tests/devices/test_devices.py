"""Device placement on a machine without a GPU: what a pretended device gives is what the CPU gives, to the bit.

It runs in a process of its own, since torch cannot forget a device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs torch 2.9"
    ),
]
HERE = Path(__file__).parent
RUNS = {  # name: family and options; from disk also the plan of what is in files, as a bound on memory demands it
    "recommended": ("qwen3_moe", {}),
    "recommended, shared experts": ("qwen2_moe", {"router_refit": True, "recombine": True}),
    "fast": ("mixtral", {"preset": "fast"}),
    "paper": ("mixtral", {"preset": "paper"}),
    "greedy": ("mixtral", {"method": "prune", "selection": "greedy", "preset": "paper"}),
    **{method: ("mixtral", {"method": method, "preset": "paper"}) for method in ("ream", "mergemoe", "sub_moe")},
    "disk": ("qwen3_moe", {"neuron_refit": False, "plan": 0}),
    "disk, hidden states in files": ("qwen3_moe", {"preset": "fast", "plan": 1}),
    "disk, experts in files": ("qwen3_moe", {"preset": "fast", "plan": 2}),
}
MOST_WAITS = {"recommended": 100, "fast": 80, "paper": 75}  # a layer, and two a minibatch of the neuron refit


@pytest.fixture(scope="module")
def results():
    """What every run on the pretended device gave."""
    arguments = [json.dumps([name, *run]) for name, run in RUNS.items()]
    command = [sys.executable, str(HERE / "run_pretended.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_equal_to_the_cpu(name, results):
    """Weights are the same to the bit, and stay on the device where the model was there."""
    assert results[name]["same"]
    assert results[name].get("devices", ["pretended"]) == ["pretended"]


@pytest.mark.parametrize("name", MOST_WAITS)
def test_waits(name, results):
    """A host waits for its device only so often, which does not depend on experts and tokens."""
    found = results[name]
    allowed = 4 * MOST_WAITS[name] + 2 * found["minibatches"]
    assert sum(found["waits"].values()) <= allowed, found["lines"]
