"""Faults injected into real runs: what each run says, and whether the same command then ends with the same bits.

    python benchmarks/faults.py                           # prints the table
    python benchmarks/faults.py --only "full disk, at a layer" --json

Runs are children of this process, on a random model of 1.3 MB.  After each fault no file may have a final name that
is not whole, and the source must be what it was.  Disks that are full or read-only are small ones in memory, mounted
in a namespace of this process where the system allows that (`unshare`); elsewhere these rows are left out, and a
limit on the size of files stands for the full disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import torch
from fault_moments import (
    at_layer,
    at_publication,
    change_source,
    end_by,
    fill_disk,
    limit_files,
    limit_memory,
    limit_size,
)
from fault_runs import Fault, Place, launch, run_into
from forked_runs import digests, warm
from random_model import Sizes, random_tokens, write_model


__all__ = ["FAULTS"]

SIZES = Sizes(layers=3, experts=8, top_k=2, hidden=32, width=16)
WEIGHTS = "model.safetensors"
INSIDE = "DERN_FAULTS_INSIDE"  # set in a namespace with mounts of its own
AGAIN = "then give the same command again"
MOMENTS: dict[str, Callable] = {"at a layer": at_layer, "while files are moved": at_publication}


def at(moment: Callable, action: Callable, *args: object) -> Callable[[Place], object]:
    """Inject something that happens at a moment of the run."""
    return lambda place: moment(partial(action, *args))


def full_disks() -> Iterator[tuple[str, Fault]]:
    """The disk is too small, or somebody fills it during the run."""
    mend = f"free some space there, or choose a folder on another disk, {AGAIN}"
    small, large, wider = (partial(Place.mount, options=o) for o in ("size=1m", "size=20m", "remount,size=20m"))
    yield "full disk, at the start", Fault(f"take .* are free: .*{mend}", before=small, mend=wider, mounts=True)
    for (name, moment), left in zip(MOMENTS.items(), (0, 100_000), strict=True):
        fill = partial(_fill, moment, left)
        yield f"full disk, {name}", Fault(f"No space left .*: .*{mend}", fill, large, Place.free, mounts=True)


def _fill(moment: Callable, left: int, place: Place) -> None:
    moment(partial(fill_disk, place.disk, left))


def limits() -> Iterator[tuple[str, Fault]]:
    """The process may write no larger files, open no more, or has no more memory."""
    for what, limit, says in (
        ("limit on the size of files", limit_size, f"File too large: .*ulimit -f.*{AGAIN}"),
        ("no descriptor left", limit_files, f"Too many open files: .*ulimit -n.*{AGAIN}"),
        ("no memory left", limit_memory, f"not enough memory .*ulimit -v.*{AGAIN}"),
    ):
        yield f"{what}, at the start", Fault(says, lambda place, limit=limit: limit())
        for name, moment in MOMENTS.items():
            if limit is not limit_memory or moment is at_layer:  # moving files needs next to none
                yield f"{what}, {name}", Fault(says, at(moment, limit))


def signals() -> Iterator[tuple[str, Fault]]:
    """Somebody ends the process."""
    rest = "; what is finished stays, the same command goes on from there"
    for name, moment in MOMENTS.items():
        yield f"SIGINT, {name}", Fault(f"interrupted{rest}", at(moment, end_by, SIGINT), code=128 + SIGINT)
        for signal in (SIGTERM, SIGHUP):
            says = f"ended by {signal.name}{rest}"
            yield f"{signal.name}, {name}", Fault(says, at(moment, end_by, signal), code=128 + signal)
        yield f"SIGKILL, {name}", Fault("", at(moment, end_by, SIGKILL), code=-SIGKILL)


def changed_sources() -> Iterator[tuple[str, Fault]]:
    """Somebody changes the source while it is read."""
    says = r"(changed|removed) during the run; put the earlier file back .*\(restart=True, --restart\)"
    for how in ("replaced", "cut short", "removed"):
        yield f"source {how}, and put back", Fault(says, partial(_change, WEIGHTS, how), mend=Place.mend_source)
    config = partial(_change, "config.json", "replaced")
    yield "config.json replaced, and put back", Fault(says, config, mend=Place.mend_source)
    differs = "an unfinished run that differs: weights was .*--restart to start over"
    yield "source replaced for good", Fault(says, partial(_change, WEIGHTS, "replaced"), again=differs)


def _change(name: str, how: str, place: Place) -> None:
    at_layer(partial(change_source, place.source / name, how))


def several_processes() -> Iterator[tuple[str, Fault]]:
    """One of two processes is killed, or hangs."""
    says = "another process of the run has ended or does not answer .*the same command goes on from there"
    for what, rank, signal in (
        ("first of two processes killed", 0, SIGKILL),
        ("second of two processes killed", 1, SIGKILL),
        ("second of two processes hangs", 1, SIGSTOP),
    ):
        yield what, Fault(says, partial(_end_one, rank, signal), processes=2, ill=rank)


def _end_one(rank: int, signal: int, place: Place) -> None:
    if os.environ["RANK"] == str(rank):
        at_layer(partial(end_by, signal))


READ_ONLY = Fault(
    f"Read-only file system: .*/out; choose another one, or have its permissions changed, {AGAIN}",
    before=partial(Place.mount, options="ro"),
    mend=partial(Place.mount, options="remount,rw"),
    mounts=True,
)
FAULTS: dict[str, Fault] = {
    **dict(full_disks()),
    "read-only output": READ_ONLY,
    **dict(limits()),
    **dict(signals()),
    **dict(changed_sources()),
    **dict(several_processes()),
}


def main() -> None:
    """Inject the faults that are asked for, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="NAME", help="some faults")
    parser.add_argument("--json", action="store_true", help="print JSON, one fault a line, instead of a table")
    args = parser.parse_args()
    mounts, lost = can_mount(), 0
    names = [name for name in args.only if mounts or not FAULTS[name].mounts]
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
    """Make a model, compress it undisturbed, and then with every fault."""
    write_model(folder / "model", SIZES)
    (folder / "model" / "vocab.txt").write_text("word\n" * 60_000, "utf-8")  # a large file beside the weights
    torch.save(list(random_tokens(12, 24)), data := folder / "tokens.pt")
    warm(Place(folder / "first", folder / "model", data).words, folder)
    expected = {}
    for count in {FAULTS[name].processes for name in names}:
        place = Place(folder / f"whole {count}", folder / "model", data)
        codes = [process.wait() for process in launch(place, count)]
        assert codes == [0] * count, codes
        expected[count] = digests(place.output)
    for number, name in enumerate(names):
        place, fault = Place(folder / str(number), folder / "model", data), FAULTS[name]
        try:
            yield name, run_into(fault, place, expected[fault.processes])
        finally:
            if fault.mounts:
                subprocess.run(["umount", place.disk], check=True)


if __name__ == "__main__":
    main()
