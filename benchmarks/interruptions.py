"""Kill a compression at random moments, resume it with the same command, and compare the output bit by bit.

Every kill is followed by another start; a run that finishes before its kill is compared, and the next one starts over.

python benchmarks/interruptions.py examples/tiny_moe/upcycled --dataset examples/tiny_moe/text/calibration --kills 20
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


TIMED = ("dern_report.json", "dern_report.html", "dern_report.png", "README.md")  # they contain times and memory


def main() -> None:
    """Run once without kills, then with kills, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n", "utf-8")
    if result["equal"] != result["runs"]:
        sys.exit("a resumed run differs from the undisturbed one")


def run(args: argparse.Namespace, folder: Path) -> dict:
    """Start and kill runs until enough unfinished ones were killed, and compare every finished output."""
    generator = random.Random(args.seed)
    started = time.monotonic()
    start(args, folder / "whole").wait()
    whole, expected = time.monotonic() - started, digests(folder / "whole")
    kills = runs = equal = resumed = 0
    while kills < args.kills:
        process = start(args, folder / "killed")
        try:
            process.wait(generator.uniform(0.3, 1.0) * whole)  # the first third is imports
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            unfinished = (folder / "killed" / ".dern").exists() or not (folder / "killed").exists()
            if unfinished:  # else it was about to exit
                kills += 1
                resumed += (folder / "killed" / ".dern" / "manifest.json").exists()
                if kills < args.kills:
                    continue
                start(args, folder / "killed").wait()
        runs += 1
        found = digests(folder / "killed")
        equal += found == expected
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                print(f"{name} differs", flush=True)
        shutil.rmtree(folder / "killed")
        print(f"{kills} kills, {runs} finished runs, {equal} of them equal", flush=True)
    return {"kills": kills, "kills_with_work_done": resumed, "runs": runs, "equal": equal, "seconds_of_a_run": whole}


def start(args: argparse.Namespace, output: Path) -> subprocess.Popen:
    """Start the compression command with quick settings."""
    words = ["compress", args.model, str(output), "--dataset", args.dataset, "--num-samples", "24"]
    words += ["--sequence-length", "256", "--batch-size", "8", "--no-neuron-refit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "optimum_dern", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def digests(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every output file without times in it."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in TIMED]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    main()
