"""Time and memory of compressing a checkpoint from disk to disk, against plain forward passes and a rival.

The model has 105 million random parameters (`random_model.py`), the calibration data 16 x 256 random tokens.  Each
line runs in a process of its own, after a toy run that takes the first imports: load, calibrate, compress and write
count.  Prints CPU seconds, their ratio to plain forward passes over the same tokens, the peak of resident memory over
that before the run, its ratio to the model's size, and one JSON line.

python benchmarks/rival.py --repeat 3
python benchmarks/rival.py --only "prune, reap" --rival-python ENVIRONMENT/bin/python      # which has llm-compressor
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_model import Sizes, random_tokens, write_model


NO_TEXT_OF_ITS_OWN = {"self_share": 0.0, "random_share": 0.0}
REAP = {"method": "prune", "selection": "reap", "preset": "paper"}
RUNS: dict[str, dict[str, Any]] = {
    "prune, reap": REAP,
    "prune, reap, refit": {**REAP, "refit": True},
    "paper": {"preset": "paper"},
    "fast": {"preset": "fast"},
    "recommended, no neuron refit": {"neuron_refit": False},
    "recommended": {},
}
TOY = Sizes(layers=1, experts=8, top_k=2, hidden=64, width=32)
SEQUENCES, LENGTH, BATCH = 16, 256, 4


def main() -> None:
    """Run every line in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--repeat", type=int, default=1, help="runs of each line, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="with a model of one small layer")
    parser.add_argument("--rival-python", type=Path, help="interpreter with llm-compressor, whose REAP is run too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the child process: a line, or the plain forward pass
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured = plain_forward(args.folder) if args.measure == "plain" else compress(args.folder, args.measure)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", TOY if args.toy else Sizes())
        write_model(Path(folder) / "toy", TOY)
        size = sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))
        results = {name: fastest(name, folder, args) for name in ["plain", *args.only]}
        if args.rival_python:
            results["llm-compressor, reap"] = rival(folder, args)
    print_table(results, size)
    print(json.dumps({"threads": args.threads, "model_bytes": size, "results": results}))


def fastest(name: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run a line some times, each in a new process, and return the figures of least time."""
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    runs = [run(command, args.threads) for _ in range(args.repeat)]
    return min(runs, key=lambda figures: figures["cpu_seconds"])


def rival(folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run llm-compressor's REAP with the interpreter given; the model goes whole through its "basic" pipeline."""
    driver = Path(__file__).parent / "rival_driver.py"
    torch.save(random_tokens(SEQUENCES, LENGTH), Path(folder) / "tokens.pt")
    return run([str(args.rival_python), str(driver), folder, str(BATCH)], args.threads)


def run(command: list[str], threads: int) -> dict[str, float]:
    """Run a child process and return the figures that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


@torch.no_grad()
def plain_forward(folder: Path) -> dict[str, float]:
    """Measure forward passes over the calibration tokens, without loading."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokens = random_tokens(SEQUENCES, LENGTH)
    model(tokens[:1, :16])
    started = time.process_time()
    for batch in tokens.split(BATCH):
        model(batch)
    return {"cpu_seconds": time.process_time() - started}


def compress(folder: Path, name: str) -> dict[str, float]:
    """Measure one compression from disk to disk, after a toy run that takes the first imports."""
    compress_checkpoint(folder / "toy", folder / "toy_out", RUNS[name])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = resident("VmRSS"), time.process_time()
    compress_checkpoint(folder / "model", folder / "out", RUNS[name])
    return {"cpu_seconds": time.process_time() - started, "peak_bytes": resident("VmHWM") - before}


def compress_checkpoint(source: Path, output: Path, options: dict[str, Any]) -> None:
    """Compress a checkpoint on the random tokens."""
    from optimum_dern import DernCompressor

    rows = [{"input_ids": row} for row in random_tokens(SEQUENCES, LENGTH)]
    DernCompressor(dataset=rows, sequence_length=LENGTH, **NO_TEXT_OF_ITS_OWN, **options).compress_checkpoint(
        source, output, overwrite=True
    )


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def print_table(results: dict[str, dict[str, float]], size: int) -> None:
    """Print the results as a Markdown table."""
    print("| | CPU s | / plain forward | peak, MiB | / model |\n| --- | ---: | ---: | ---: | ---: |")
    plain = results["plain"]["cpu_seconds"]
    for name, figures in results.items():
        peak = figures.get("peak_bytes")
        memory = "| |" if peak is None else f"{peak / 2**20:.0f} | {peak / size:.2f} |"
        print(f"| {name} | {figures['cpu_seconds']:.1f} | {figures['cpu_seconds'] / plain:.1f} | {memory}")


if __name__ == "__main__":
    main()
