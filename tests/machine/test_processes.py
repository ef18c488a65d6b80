"""Several processes give the result of one, share the work, and end together; real processes over loopback."""

import datetime
import functools
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.core.dern import recombination
from optimum_dern.machine import processes as distributed
from optimum_dern.machine import torch_state
from optimum_dern.machine.processes import ALONE, Processes, ProcessFailed, joined_processes


TESTS = Path(__file__).parent.parent
DATA = {"even": [12] * 20, "ragged": [5, 24, 17, 9, 24, 3, 24, 11, 24, 24, 8, 24], "few": [24] * 3}  # lengths
CASES = {
    "recommended": ("mixtral", "even", {}),
    "every step": ("mixtral", "even", {"guard": False}),
    "own text": ("mixtral", "even", {"self_share": 0.5, "neuron_refit": False, "sequence_length": 16}),
    "groups": ("deepseek_v3", "ragged", {}),
    "paper": ("qwen3_moe", "ragged", {"preset": "paper", "router_update": "rows"}),
    "prune": ("qwen3_moe", "ragged", {"method": "prune", "selection": "reap", "router_refit": False}),
    "importance": ("qwen3_moe", "ragged", {"preset": "paper", "importance": "heapr"}),
    "widths": ("qwen3_moe", "ragged", {"preset": "paper", "method": "slim", "width": 8, "width_budget": "global"}),
    "widths of all layers": (
        "mixtral",
        "even",
        {"preset": "paper", "num_experts": None, "method": "heapr", "width": 8, "width_budget": "global"},
    ),
    "greedy": ("deepseek_v3", "ragged", {"method": "prune", "preset": "paper", "selection": "greedy"}),
    "random": ("mixtral", "even", {"selection": "random", "cluster_init": "random", "calibration_order": "oneshot"}),
    "three batches": ("mixtral", "few", {"batch_size": 1}),  # the last of three processes has nothing to fit
    "two batches": ("mixtral", "few", {"batch_size": 2}),  # the last of two, likewise
    "by tokens": ("qwen3_moe", "ragged", {"batch_size": None, "neuron_refit": False}),  # one batch for one process
}
TOO_FEW = {2: (), 3: ("two batches",)}  # cases that so many processes cannot share

# Runs cases and notes, for every process, what it has seen, computed and written.
WORKER = """
import hashlib, json, os, sys
from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.shards import ShardWriter
from optimum_dern.core.dern import recombination
from optimum_dern.machine.processes import joined_processes
from optimum_dern.engine.measure.measured import MeasuredLayer
from optimum_dern.engine.walk import walks

folder, notes, write, kmeans = sys.argv[1], [], MeasuredLayer.write_, recombination.spherical_kmeans
write_tensor, measure = ShardWriter.write, walks.measure_layer

def noting_measure(layer, position, run, *others):
    notes.append({"tokens": run.tokens})
    return measure(layer, position, run, *others)

def noting_write(self, candidate):
    weights = b"".join(part.contiguous().numpy().tobytes() for part in candidate.segments[:3])
    notes.append({"weights": hashlib.sha256(weights).hexdigest()})
    write(self, candidate)

def noting_kmeans(*args):
    notes.append({"clustered": 1})
    return kmeans(*args)

def noting_write_tensor(*args):
    notes.append({"written": 1})
    return write_tensor(*args)

MeasuredLayer.write_, recombination.spherical_kmeans = noting_write, noting_kmeans
ShardWriter.write, walks.measure_layer = noting_write_tensor, noting_measure
with joined_processes("cpu") as processes:
    for name, (family, data, fields) in json.load(open(f"{folder}/cases {processes.count}.json")).items():
        options = {"num_experts": 4, "batch_size": 4, "self_share": 0.0, "dataset": f"{folder}/{data}.pt", **fields}
        output = f"{folder}/{name} {processes.count}"
        report = DernCompressor(**options).compress_checkpoint(f"{folder}/{family}", output)
        notes.append({"case": name, "retained": [layer.retained for layer in report.layers]})
    with open(f"{folder}/notes {processes.count} {processes.rank}.json", "w") as file:
        json.dump(notes, file)
    processes.on_main(lambda: None)
os._exit(0)  # as the command does
"""

# The command itself, in which one process stops at the second layer.
STOPPING = """
import os, signal, sys
from optimum_dern.checkpoint.source.loader import PartLoader
from optimum_dern.commands.main import main

loaded = PartLoader.loaded

def stopping(self, position, *tensors):
    if position == 1 and os.environ["RANK"] == os.environ["STOPS"]:
        if os.environ["STOPS_BY"] == "error":
            raise ValueError("out of luck")
        os.kill(os.getpid(), signal.SIGKILL)
    return loaded(self, position, *tensors)

PartLoader.loaded = stopping
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, calibration data and the programs to launch."""
    folder = tmp_path_factory.mktemp("distributed")
    for family in ("mixtral", "qwen3_moe", "deepseek_v3"):
        make_model(family).save_pretrained(folder / family)
    for name, lengths in DATA.items():
        rows = [random_tokens(1, length, seed)[0]["input_ids"] for seed, length in enumerate(lengths)]
        torch.save(rows, folder / f"{name}.pt")
    (folder / "worker.py").write_text(WORKER, "utf-8")
    (folder / "stopping.py").write_text(STOPPING, "utf-8")
    for count, left_out in TOO_FEW.items():
        cases = {name: case for name, case in CASES.items() if name not in left_out}
        (folder / f"cases {count}.json").write_text(json.dumps(cases), "utf-8")
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """Of each case, the weights and the report of one process, and how many experts it clustered."""
    results, clustered, kmeans = {}, [], recombination.spherical_kmeans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recombination, "spherical_kmeans", lambda *args: (clustered.append(1), kmeans(*args))[1])
        for name, (family, data, fields) in CASES.items():
            data = str(folder / f"{data}.pt")
            options = {"num_experts": 4, "batch_size": 4, "self_share": 0.0, "dataset": data, **fields}
            report = DernCompressor(**options).compress_checkpoint(folder / family, folder / name)
            results[name] = (load_file(folder / name / "model.safetensors"), report, len(clustered))
            clustered.clear()
    return results


@pytest.fixture(scope="module")
def quick(folder):
    """The weights that one process gives for `quick_arguments`."""
    options = {"num_experts": 4, "batch_size": 4, "refit": False, "dataset": str(folder / "even.pt")}
    DernCompressor(**options).compress_checkpoint(folder / "mixtral", folder / "quick")
    return load_file(folder / "quick" / "model.safetensors")


@pytest.fixture(scope="module")
def notes(folder):
    """What each of several processes notes while they run all cases, launched once for each number of processes."""

    @functools.cache
    def launch(count):
        for _, errors, code in together(count, folder / "worker.py", folder):
            assert code == 0, errors
        return [json.loads((folder / f"notes {count} {rank}.json").read_text("utf-8")) for rank in range(count)]

    return launch


def environment(**variables):
    """One thread a process, and nothing of a launcher around the tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def torchrun(count, *arguments, **variables):
    """Start a program under torch's launcher and wait for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return run([*command, *map(str, arguments)], **variables)


def run(command, **variables):
    """Run a command to its end."""
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=120)


def address(count):
    """Where as many processes of a run meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "WORLD_SIZE": str(count),
        }


def together(count, *arguments, awaited=None, **variables):
    """Start a program `count` times, with nobody to stop the rest where one ends.

    Returns:
        Output, errors and exit code of each, or of the first `awaited`.
    """
    meeting, processes = address(count), []
    for rank in range(count):
        own = environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        pipes = {"stdout": forked.PIPE, "stderr": forked.PIPE, "text": True}
        processes.append(forked.Popen([sys.executable, *arguments], env=own, **pipes))
    try:
        return [(*process.communicate(timeout=60), process.returncode) for process in processes[:awaited]]
    finally:
        for process in processes:
            process.kill()


def quick_arguments(folder, output, batch_size=4):
    """Of `optimum-dern compress`: a run that is short."""
    options = ["--num-experts", 4, "--batch-size", batch_size, "--no-refit", "--self-share", 0, "--device", "cpu"]
    return ["compress", folder / "mixtral", output, "--dataset", folder / "even.pt", *options]


def error_lines(text):
    """What the command has to say about an error."""
    return re.findall("optimum-dern: error: .*", text)  # a progress bar may stand before it


def assert_same(path, expected):
    """A checkpoint's weights are those of one process up to the order of float32 sums."""
    found = load_file(path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_result_of_one_process(count, folder, single, notes):
    """Same experts, winners, errors and weights for every preset and method; all processes hold the same layer."""
    chosen = [[note.get("weights") or note.get("retained") for note in own] for own in notes(count)]
    for name in CASES.keys() - set(TOO_FEW[count]):
        weights, report, _ = single[name]
        assert_same(folder / f"{name} {count}", weights)
        layers = json.loads((folder / f"{name} {count}" / "dern_report.json").read_text("utf-8"))["layers"]
        for found, expected in zip(layers, report.layers, strict=True):
            for fact in ("name", "tokens", "held_out_tokens", "retained", "winner", "moved_share"):
                assert found[fact] == getattr(expected, fact), (name, fact)
            behind_fits = expected is not report.layers[0]  # float32 sums in another order, through twelve passes
            assert found["saliency"] == pytest.approx(expected.saliency, rel=1e-5 if behind_fits else 1e-6)
            assert found["errors"] == pytest.approx(expected.errors, rel=1e-3)
    assert all([fact for fact in own if fact] == [fact for fact in chosen[0] if fact] for own in chosen)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_work_is_shared(count, single, notes):
    """Every process runs its share of the tokens and clusters its share of the experts; one writes."""
    tokens = [[note["tokens"] for note in own if "tokens" in note] for own in notes(count)]
    expected = [layer.tokens for name in CASES if name not in TOO_FEW[count] for layer in single[name][1].layers]
    assert [sum(layer) for layer in zip(*tokens, strict=True)] == expected
    assert all(min(own) > 0 for own in tokens)
    assert [any("written" in note for note in own) for own in notes(count)] == [True] + [False] * (count - 1)
    clustered = [sum("clustered" in note for note in own) for own in notes(count)]
    expected = sum(single[name][2] for name in CASES if name not in TOO_FEW[count])
    assert sum(clustered) == expected
    assert min(clustered) >= expected // count // 2


def test_a_killed_process(folder, quick):
    """The launcher ends the others, what is finished stays, and the same command finishes it and reports once."""
    command = quick_arguments(folder, folder / "killed")
    stopped = torchrun(2, folder / "stopping.py", *command, STOPS="1", STOPS_BY="kill")
    assert stopped.returncode != 0
    assert not (folder / "killed" / "model.safetensors").exists()
    manifest = json.loads((folder / "killed" / ".dern" / "manifest.json").read_text("utf-8"))
    assert "0" in manifest["layers"] and "report" not in manifest
    finished = together(2, "-m", "optimum_dern", *command)
    assert [code for *_, code in finished] == [0, 0], finished
    assert [(output.count("saved to"), output.count("experts per layer")) for output, *_ in finished] == [
        (1, 1),
        (0, 0),
    ]
    assert not (folder / "killed" / ".dern").exists()
    assert_same(folder / "killed", quick)


@pytest.mark.parametrize("stops", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_without_launcher(stops, folder):
    """Nobody has to stop the rest: they notice, say so in one line, and leave a folder to go on with."""
    output = folder / f"alone {stops}"
    command = [folder / "stopping.py", *quick_arguments(folder, output)]
    ended = together(2, *command, STOPS=str(stops), STOPS_BY="kill")
    assert ended[stops][-1] == -signal.SIGKILL
    _, errors, code = ended[1 - stops]
    assert code == 2
    assert len(error_lines(errors)) == 1 and "another process of the run has ended" in error_lines(errors)[0]
    assert (output / ".dern" / "manifest.json").exists()


def test_an_error_in_one_process(folder):
    """The process that has failed tells why; the others end with it and keep quiet."""
    command = quick_arguments(folder, folder / "error")
    ended = together(3, folder / "stopping.py", *command, STOPS="1", STOPS_BY="error")
    assert [code for *_, code in ended] == [2, 2, 2]
    assert [error_lines(errors) for _, errors, _ in ended] == [[], ["optimum-dern: error: out of luck"], []]


MISTAKES = {
    "processes": "2 processes cannot share 1 calibration batches",
    "output": "is not empty",
    "unfinished": "error: the output folder holds an unfinished run that differs",
}


DIFFERS = '{"fingerprint": {"seed": 1}, "layers": {"0": {}}, "tensors": {}}'  # a manifest


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_come_once(mistake, folder, tmp_path):
    """What all processes find wrong, or the main one for all, is told by one, before anything is written."""
    (tmp_path / "out").mkdir()
    if mistake == "output":
        (tmp_path / "out" / "other").touch()
    if mistake == "unfinished":
        (tmp_path / "out" / ".dern").mkdir()
        (tmp_path / "out" / ".dern" / "manifest.json").write_text(DIFFERS, "utf-8")
    batch_size = 20 if mistake == "processes" else 4  # all sequences in one batch
    command = ["-m", "optimum_dern", *quick_arguments(folder, tmp_path / "out", batch_size)]
    if mistake == "output":
        launched = torchrun(2, *command)
        lines, codes = error_lines(launched.stderr), [launched.returncode]
    else:
        _, errors, codes = zip(*together(2, *command), strict=True)
        lines = error_lines("".join(errors))
    assert 0 not in codes
    assert len(lines) == 1 and MISTAKES[mistake] in lines[0]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_accelerate_launch(folder, quick):
    """`accelerate launch -m optimum_dern compress` is another way to start the same."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = map(str, ["-m", "optimum_dern", *quick_arguments(folder, folder / "accelerate")])
    launched = run([*launcher, *options, *command])
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("saved to") == 1
    assert_same(folder / "accelerate", quick)


@pytest.mark.slow
def test_a_process_that_hangs(tmp_path):
    """Waiting for a process that is there and does not answer ends after the timeout."""
    (tmp_path / "hang.py").write_text(
        "import datetime, time, torch\n"
        "from optimum_dern.machine.processes import joined_processes\n"
        "with joined_processes('cpu', datetime.timedelta(seconds=3)) as processes:\n"
        "    if not processes.is_main:\n"
        "        time.sleep(100)\n"
        "    else:\n"
        "        processes.reduce(torch.ones(1))\n",
        "utf-8",
    )
    ((_, errors, code),) = together(2, tmp_path / "hang.py", awaited=1)
    assert code == 1 and "ProcessFailed: another process of the run has ended or does not answer" in errors


def test_one_process_talks_to_nobody(monkeypatch):
    """Without a launcher, everything is the plain function."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    value = torch.ones(2)
    with joined_processes("cpu") as processes:
        assert processes == ALONE and processes.is_main and processes.is_first_to_fail()
        assert processes.reduce(value) is value
        assert processes.share([1, 2, 3]) == [1, 2, 3]
        assert list(processes.map(lambda item: (value * item,), [2]))[0][0].tolist() == [2, 2]
        assert processes.on_main(lambda: 5) == processes.main_first(lambda: 5) == 5


def test_shares():
    """Batches are dealt out in turn; nobody gets none."""
    assert [Processes(rank, 3).share("abcdefg") for rank in range(3)] == ["adg", "be", "cf"]
    with pytest.raises(ValueError, match="3 processes cannot share 2 calibration batches; start at most 2"):
        Processes(0, 3).share("ab")


@pytest.mark.parametrize(
    ("device", "local", "expected"),
    [
        (None, "1", "cuda:1"),
        ("cuda", "0", "cuda:0"),
        ("cpu", "5", "cpu"),
        (None, "2", "2 GPUs"),
        (None, None, "process 1 of the run has no LOCAL_RANK"),
        ("cpu", None, "cpu"),
        ("mps", "0", "cannot share"),
        ("cuda:1", "0", "cannot share"),
    ],
)
def test_every_process_has_its_own_gpu(device, local, expected, monkeypatch):
    """The GPU of its number on the machine; what cannot be shared is refused."""
    pretend_launcher(monkeypatch, {} if local is None else {"RANK": "1", "LOCAL_RANK": local})
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            distributed._own_device(device, 1, 2)
    else:
        assert distributed._own_device(device, 1, 2) == torch.device(expected)
        assert distributed._own_device("cuda:1", 0, 1) == torch.device("cuda:1")


def pretend_launcher(monkeypatch, variables):
    """A machine with two GPUs, and no other variables of launchers."""
    for name in itertools.chain(*distributed.LAUNCHERS.items()):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch_state, "check_device", lambda device: None)  # which asks the real machine


def test_other_gpus(monkeypatch):
    """Processes share the GPUs of another kind as they do those of CUDA."""
    pretend_launcher(monkeypatch, {"RANK": "1", "LOCAL_RANK": "1"})
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    assert distributed._own_device("xpu", 1, 2) == torch.device("xpu:1")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="has 1 GPUs"):
        distributed._own_device("xpu", 1, 2)


SLURM, MPIRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, {"OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_RANK": "1"}, "cuda:1"),
        (SLURM, "cuda:1"),
        (SLURM | {"RANK": "3"}, "cuda:1"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "cuda:1"),
        ({"PMI_RANK": "3", "MPI_LOCALRANKID": "1"}, "cuda:1"),
        (SLURM | {"RANK": "3", "LOCAL_RANK": "0"}, "cuda:0"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "RANK": "3"}, None),  # of the batch script
        ({"RANK": "3"}, None),
    ],
)
def test_launchers_that_tell_the_gpu(variables, expected, monkeypatch):
    """srun and mpirun have variables of their own; a process that none of them has numbered takes no GPU."""
    pretend_launcher(monkeypatch, variables)
    if expected is None:
        with pytest.raises(ValueError, match="process 3 of the run has no LOCAL_RANK"):
            distributed._own_device(None, 3, 4)
    else:
        assert distributed._own_device(None, 3, 4) == torch.device(expected)


def test_errors_that_are_no_other_process():
    """Only what the connection reports means that another process has ended; the rest stays what it is."""

    def fail(error):
        raise error

    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
    )
    for error in (gloo, torch.distributed.DistNetworkError("the server socket has timed out")):
        with pytest.raises(ProcessFailed, match="another process of the run has ended"):
            distributed._talk(fail, error)
    for error in (RuntimeError("The size of tensor a must match"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(RuntimeError) as info:
            distributed._talk(fail, error)
        assert info.value is error


def test_nobody_to_find(monkeypatch):
    """The other processes of the run do not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessFailed), joined_processes("cpu", datetime.timedelta(seconds=1)):
        pass


def test_no_state_stays_behind(tmp_path):
    """After the context, logging and progress bars are the caller's again, and another one can be opened."""
    (tmp_path / "state.py").write_text(
        "import logging, sys, torch\n"
        "from transformers.utils import logging as transformers_logging\n"
        "from optimum_dern.machine.processes import joined_processes\n"
        "def state():\n"
        "    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()\n"
        "    return bars, level, logging.getLogger('optimum_dern').level, torch.distributed.is_initialized()\n"
        "transformers_logging.set_verbosity_info()\n"
        "before = state()\n"
        "with joined_processes('cpu') as processes:\n"
        "    within, store = state(), processes.store\n"
        "    with joined_processes('cpu') as inner:\n"
        "        assert inner.store is store is not None\n"
        "assert state() == before, (before, state())\n"
        "assert processes.is_main or within[:3] == (False, logging.ERROR, logging.ERROR)\n",
        "utf-8",
    )
    for _, errors, code in together(2, tmp_path / "state.py"):
        assert code == 0, errors
