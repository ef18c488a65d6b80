"""Faults injected into real runs: what each run says, and whether the same command then ends with the same bits.

    python benchmarks/faults.py                           # prints the table
    python benchmarks/faults.py --only "full disk, at a layer" --json
    python benchmarks/faults.py --command merge           # faults of one command

Runs are children of this process, on random models of 1.3 MB.  After each fault no file may have a final name that
is not whole, and models and files of others must be what they were.  Disks that are full or read-only are small ones
in memory, mounted in a namespace of this process where the system allows that (`unshare`); elsewhere these rows are
left out, and a limit on the size of files stands for the full disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fault_commands import command_faults
from fault_compress import compress_faults
from fault_runs import Fault, Place, launch, run_into
from forked_runs import digests, warm
from random_model import Sizes, random_tokens, write_fine_tuned, write_model


__all__ = ["FAULTS"]

SIZES = Sizes(layers=3, experts=8, top_k=2, hidden=32, width=16)
INSIDE = "DERN_FAULTS_INSIDE"  # set in a namespace with mounts of its own
FAULTS: dict[str, Fault] = {**compress_faults(), **command_faults()}
COMMANDS = list(dict.fromkeys(fault.command for fault in FAULTS.values()))


def main() -> None:
    """Inject the faults that are asked for, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="NAME", help="some faults")
    parser.add_argument("--json", action="store_true", help="print JSON, one fault a line, instead of a table")
    parser.add_argument("--command", choices=COMMANDS, help="those of one command")
    args = parser.parse_args()
    mounts, lost = can_mount(), 0
    asked = [name for name in args.only if args.command in (None, FAULTS[name].command)]
    names = [name for name in asked if mounts or not FAULTS[name].mounts]
    with tempfile.TemporaryDirectory() as folder:
        for name, row in run(Path(folder), names):
            lost += bool(row["problems"])
            line = f"| {name} | {row['said']} | {row['layers kept']} | {'; '.join(row['problems']) or row['again']} |"
            print(json.dumps({"fault": name, **row}) if args.json else line, flush=True)
    if lost:
        sys.exit(f"{lost} of {len(names)} faults have done harm")


def can_mount() -> bool:
    """Start this script over in a namespace where it may mount disks, if the system allows one; returns whether so."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    if INSIDE not in os.environ and shutil.which("unshare"):
        probe = [*namespace, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            os.environ[INSIDE] = "1"
            os.execvp("unshare", [*namespace, sys.executable, *sys.argv])
    return INSIDE in os.environ


def run(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Make models, run commands on them undisturbed, and then with every fault."""
    models, data = folder / "models", folder / "tokens.pt"
    write_model(models / "model", SIZES)
    for seed, name in enumerate(("one", "two")):
        write_fine_tuned(models / name, models / "model", seed)
    (models / "model" / "vocab.txt").write_text("word\n" * 60_000, "utf-8")  # a large file beside the weights
    torch.save(list(random_tokens(12, 24)), data)
    expected = {}
    for number, (command, count) in enumerate({(FAULTS[name].command, FAULTS[name].processes) for name in names}):
        warm(Place(folder / f"first {number}", models, data, command).words, folder)
        place = Place(folder / f"whole {number}", models, data, command)
        codes = [process.wait() for process in launch(place, count)]
        assert codes == [0] * count, codes
        expected[command, count] = digests(place.output)
    for number, name in enumerate(names):
        fault = FAULTS[name]
        place = Place(folder / str(number), models, data, fault.command)
        try:
            yield name, run_into(fault, place, expected[fault.command, fault.processes])
        finally:
            if fault.mounts:
                subprocess.run(["umount", place.disk], check=True)
            shutil.rmtree(place.folder)


if __name__ == "__main__":
    main()
