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

from optimum_dern.core.criteria.registry import CRITERIA
from optimum_dern.methods import METHODS


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs torch 2.9"
    ),
]
HERE = Path(__file__).parent
# Needs output biases; need gradients through subclasses of tensors, which the pretended ones are not made for.
NOT_HERE = ("mone", "heapr", "slim")
OWN = [  # no test's
    name
    for name, method in METHODS.items()
    if type(method).__module__.startswith("optimum_dern.") and name not in NOT_HERE
]
SHORT, SPLIT = {"model": {"num_hidden_layers": 2}}, {"place": None}
NEEDED = {"cd_moe": {"num_experts": 2}}  # as many as a token uses
PAPER = {"preset": "paper", **SHORT}
MANY = {"num_experts": 8, "model": {"num_experts": 16, "num_hidden_layers": 4}}


RUNS = {  # name: family and options; from disk also the plan of what is in files, as a bound on memory demands it
    "recommended": ("qwen3_moe", {}),
    "recommended, 16 experts": ("qwen3_moe", MANY),
    "recommended, shared experts": ("qwen2_moe", {"router_refit": True, "recombine": True}),
    "recommended, two devices": ("mixtral", SPLIT),
    "recommended, second device": ("mixtral", {"place": "pretended:1"}),
    "fast": ("mixtral", {"preset": "fast"}),
    "paper": ("mixtral", {"preset": "paper"}),
    "paper, two devices": ("qwen3_moe", {"preset": "paper", **SPLIT}),
    **{f"method {name}": ("mixtral", {**PAPER, "method": name, **NEEDED.get(name, {})}) for name in OWN},
    **{f"selection {name}": ("qwen3_moe", {"preset": "fast", "selection": name, **SHORT}) for name in CRITERIA},
    "disk": ("qwen3_moe", {"neuron_refit": False, "plan": 0}),
    "disk, hidden states in files": ("qwen3_moe", {"preset": "fast", "plan": 1}),
    "disk, little memory": ("qwen3_moe", {"preset": "fast", "plan": 1, "max_elements": 1024}),
}
# Waits a layer, all in: here of three micro-batches and up to seven minibatches.
MOST_WAITS = {
    "recommended": 55,
    "recommended, 16 experts": 50,
    "recommended, shared experts": 75,  # recombines and refits the router, too
    "fast": 30,
    "paper": 25,
}
RUN_OF_EXPERTS = "slots_by_expert"  # asks how many tokens each expert gets


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
    """Weights, errors and loss are the same to the bit, and weights stay on the devices that the model is on."""
    facts = results[name]
    assert all(facts[key] for key in facts.keys() & {"same", "same errors", "same loss", "stayed"})
    if "two devices" in name:
        assert facts["devices"] == ["pretended:0", "pretended:1"]


@pytest.mark.parametrize("name", MOST_WAITS)
def test_waits(name, results):
    """A host waits for its device only so often a layer, which does not depend on experts and tokens."""
    found = results[name]
    assert 0 < sum(count for *_, count in found["waits"]) <= MOST_WAITS[name] * found["layers"], found["waits"]


@pytest.mark.parametrize("name", ["recommended, 16 experts", "disk, little memory"])
def test_no_line_waits_for_every_expert(name, results):
    """But for the runs of experts, which memory and minibatches divide, and copies from and to files."""
    found = results[name]
    copies = ("reader.py", "conversion.py", "tensors.py", "recorded.py")
    waits = [
        wait for wait in found["waits"] if not wait[1].endswith(RUN_OF_EXPERTS) and not wait[1].startswith(copies)
    ]
    assert waits[0][2] <= 8 * found["layers"], waits


def test_waits_of_a_minibatch(results):
    """None: how many of its tokens each expert gets is found for all minibatches of a pass at once."""
    found = results["recommended"]
    assert found["minibatches"] > 4 * found["layers"]
    assert not [wait for wait in found["waits"] if wait[1].endswith(("_gradients", "_move", "_reduced"))]
    runs = sum(count for _, line, count in found["waits"] if line.endswith(RUN_OF_EXPERTS))
    passes = sum(count for _, line, count in found["waits"] if line.endswith("_minibatches"))
    micro_batches, others = 3 * 3, 4  # three runs of the layer; the search for a set, two candidates, a spare
    assert runs <= (micro_batches + others) * found["layers"] + passes, found["waits"]
