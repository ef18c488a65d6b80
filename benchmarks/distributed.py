"""Wall time of compression with one process and with several that share the calibration data, one thread each.

Writes a random checkpoint in Mixtral's layout, compresses it with the command line, alone and under `torchrun`, in
turns, and prints a table and one JSON line, with the largest difference between the results.  The report's own seconds
leave out the start of the interpreter and imports, which every process has.

python benchmarks/distributed.py --processes 1 2 --runs 3
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


SHAPE = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


def main() -> None:
    """Run the compression with every number of processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3, help="of each; the fastest counts")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    rows: dict[int, dict] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "source", args.experts, args.width)
        tokens = torch.randint(1000, (args.sequences, args.sequence_length), generator=torch.manual_seed(0))
        torch.save(tokens, folder / "data.pt")
        for _ in range(args.runs):
            for count in args.processes:
                run = compress(folder, count, args.sequence_length)
                rows[count] = min(rows.get(count, run), run, key=lambda row: row["wall_seconds"])
        for count, row in rows.items():
            row["difference"] = largest_difference(folder / str(args.processes[0]), folder / str(count))
    print_rows(rows, args.processes[0])
    settings = {key: value for key, value in vars(args).items() if key != "output"} | {"load_before": load}
    result = json.dumps({"settings": settings, "rows": [{"processes": n, **row} for n, row in rows.items()]})
    print(result)
    if args.output:
        args.output.write_text(result + "\n", "utf-8")


def write_checkpoint(folder: Path, experts: int, width: int) -> None:
    """Write a random Mixtral whose experts are similar enough for segments to be moved between them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_local_experts": experts, "intermediate_size": width, "vocab_size": 1000}
    config = AutoConfig.for_model("mixtral", **SHAPE, **sizes, initializer_range=0.1, dtype="float32")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(0.7).add_(0.07 * torch.randn_like(parameter[:1]))
    model.save_pretrained(folder)


def compress(folder: Path, count: int, sequence_length: int) -> dict:
    """Run the command once, with one thread per process, and return its times."""
    output = folder / str(count)
    shutil.rmtree(output, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    options = ["--dataset", folder / "data.pt", "--sequence-length", sequence_length]
    options += ["--self-share", "0", "--device", "cpu", "--json"]
    command = [sys.executable, *launcher, "-m", "optimum_dern", "compress", folder / "source", output, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads((output / "dern_report.json").read_text("utf-8"))
    winners = [layer["winner"] for layer in report["layers"]]
    return {"wall_seconds": seconds, "compress_seconds": report["seconds"], "winners": winners}


def largest_difference(expected: Path, found: Path) -> float:
    """Return the largest relative difference of any tensor between two checkpoints."""
    tensors, others = load_file(expected / "model.safetensors"), load_file(found / "model.safetensors")
    return max(((others[name] - tensor).norm() / tensor.norm()).item() for name, tensor in tensors.items())


def print_rows(rows: dict[int, dict], first: int) -> None:
    """Print the table of times, one row per number of processes."""
    print(f"{'processes':>9} {'wall s':>8} {'compress s':>11} {'speed-up':>9} {'difference':>11}")
    for count, row in rows.items():
        speedup = rows[first]["compress_seconds"] / row["compress_seconds"]
        seconds = f"{row['wall_seconds']:8.1f} {row['compress_seconds']:11.1f}"
        print(f"{count:9} {seconds} {speedup:9.2f} {row['difference']:11.1e}")


if __name__ == "__main__":
    main()
