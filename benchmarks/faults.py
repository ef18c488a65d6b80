"""Faults injected into real runs: what each run says, and whether the same command then ends with the same bits.

    python benchmarks/faults.py                           # prints the table
    python benchmarks/faults.py --only "full disk" --json

Runs are children of this process, on a random model of 1.3 MB.  Disks that are full or read-only are small ones in
memory, mounted in a namespace of this process where the system allows that (`unshare`); elsewhere these rows are
left out, and a limit on the size of files stands for the full disk.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fault_moments import (
    at_layer,
    at_publication,
    change_source,
    end_by,
    fill_disk,
    free_port,
    join,
    limit_files,
    limit_memory,
    limit_size,
)
from forked_runs import ForkedRun, digests, half_written, start, warm
from random_model import Sizes, random_tokens, write_model


SIZES = Sizes(layers=3, experts=8, top_k=2, hidden=32, width=16)
OPTIONS = "--num-experts 4 --batch-size 4 --self-share 0 --random-share 0 --no-neuron-refit --device cpu"
INSIDE = "DERN_FAULTS_INSIDE"  # set in the namespace with mounts of its own
WEIGHTS = "model.safetensors"


class Place:
    """Folder of one fault: a source of its own, an output folder, and the disk that this is on.

    Args:
        folder: new.
        model: checkpoint to copy as the source.
        data: calibration data.
    """

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.source, self.disk, self.data = folder / "model", folder / "disk", data
        self.output, self.log = self.disk / "out", folder / "log"
        folder.mkdir()
        self.disk.mkdir()
        shutil.copytree(model, self.source)

    @property
    def words(self) -> list[object]:
        """The command."""
        return ["compress", self.source, self.output, "--dataset", self.data, *OPTIONS.split()]

    def mount(self, options: str) -> None:
        """Mount a disk in memory, or mount it again with other options."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], check=True)

    def mend_source(self) -> None:
        """Put back the file of the source that was changed."""
        for kept in self.source.glob("*.kept"):
            kept.replace(kept.with_suffix(""))

    def layers_kept(self) -> int:
        """Number of decoder layers that an unfinished run need not compress again."""
        manifest = self.output / ".dern" / "manifest.json"
        return len(json.loads(manifest.read_text("utf-8"))["layers"]) if manifest.exists() else 0


@dataclass(frozen=True)
class Fault:
    """A fault: how it comes about, what the run must say of it, and how it is mended.

    `inject` is called in the process of the run, `before` and `mend` in this one.  With `mend` None nothing is mended,
    and the same command must say `again` and do nothing.
    """

    says: str  # pattern of the one line
    inject: Callable[[Place], object] = lambda place: None
    before: Callable[[Place], object] = lambda place: None
    mend: Callable[[Place], object] | None = lambda place: None
    again: str = ""
    code: int = 2
    ranks: int = 1
    stopped: int | None = None  # rank that does not go on by itself
    mounts: bool = False


def disk(options: str) -> Callable[[Place], object]:
    return lambda place: place.mount(options)


def wider(place: Place) -> None:
    place.mount("remount,rw,size=20m")


def later(moment: Callable, action: Callable, *args: object) -> Callable[[Place], object]:
    return lambda place: moment(partial(action, *args))


def source(how: str, name: str = WEIGHTS) -> Callable[[Place], object]:
    return lambda place: at_layer(partial(change_source, place.source / name, how))


def at_rank(rank: int, number: int) -> Callable[[Place], object]:
    return lambda place: os.environ["RANK"] == str(rank) and at_layer(partial(end_by, number))


ROOM, FULL = "free some space there, or choose a folder on another disk", "No space left on device: .*"
CHANGED = "(changed|removed) during the run; put the earlier file back"
MEMORY = "not enough memory .* raise the limit"
OPEN = "Too many open files.*ulimit -n"
GONE = "another process of the run has ended or does not answer"
FAULTS = {
    "full disk, at the start": Fault(f"take .* are free: .*{ROOM}", before=disk("size=1m"), mend=wider, mounts=True),
    "full disk, at a layer": Fault(
        f"{FULL}{ROOM}",
        lambda place: at_layer(partial(fill_disk, place.disk)),
        disk("size=20m"),
        lambda place: (place.disk / "ballast").unlink(),
        mounts=True,
    ),
    "full disk, while files are moved into place": Fault(
        f"{FULL}{ROOM}",
        lambda place: at_publication(partial(fill_disk, place.disk, 100_000)),
        disk("size=20m"),
        lambda place: (place.disk / "ballast").unlink(),
        mounts=True,
    ),
    "limit on the size of files, at the start": Fault("File too large: .*ulimit -f", lambda place: limit_size()),
    "limit on the size of files, at a layer": Fault("File too large: .*ulimit -f", later(at_layer, limit_size)),
    "limit on the size of files, while files are moved into place": Fault(
        "File too large: .*ulimit -f", later(at_publication, limit_size)
    ),
    "read-only output": Fault(
        "Read-only file system: .*choose another one", before=disk("ro"), mend=wider, mounts=True
    ),
    "no descriptors left, at the start": Fault(OPEN, lambda place: limit_files()),
    "no descriptors left, at a layer": Fault(OPEN, later(at_layer, limit_files)),
    "no descriptors left, while files are moved into place": Fault(OPEN, later(at_publication, limit_files)),
    "no addresses left, at the start": Fault(MEMORY, lambda place: limit_memory()),
    "no addresses left, at a layer": Fault(MEMORY, later(at_layer, limit_memory)),
    "SIGINT, at a layer": Fault("interrupted; what is finished stays", later(at_layer, end_by, signal.SIGINT), code=130),
    "SIGTERM, at a layer": Fault("ended by SIGTERM; what is", later(at_layer, end_by, signal.SIGTERM), code=143),
    "SIGTERM, while files are moved into place": Fault(
        "ended by SIGTERM; what is", later(at_publication, end_by, signal.SIGTERM), code=143
    ),
    "SIGHUP, at a layer": Fault("ended by SIGHUP; what is", later(at_layer, end_by, signal.SIGHUP), code=129),
    "SIGKILL, at a layer": Fault("", later(at_layer, end_by, signal.SIGKILL), code=-signal.SIGKILL),
    "SIGKILL, while files are moved into place": Fault(
        "", later(at_publication, end_by, signal.SIGKILL), code=-signal.SIGKILL
    ),
    "source replaced during the run": Fault(CHANGED, source("replaced"), mend=Place.mend_source),
    "source cut short during the run": Fault(CHANGED, source("cut"), mend=Place.mend_source),
    "source removed during the run": Fault(CHANGED, source("removed"), mend=Place.mend_source),
    "config.json replaced during the run": Fault(CHANGED, source("replaced", "config.json"), mend=Place.mend_source),
    "source replaced for good": Fault(
        CHANGED, source("replaced"), mend=None, again="an unfinished run that differs: weights was .*--restart"
    ),
    "one of two processes killed": Fault(GONE, at_rank(1, signal.SIGKILL), ranks=2, stopped=1),
    "the first of two processes killed": Fault(GONE, at_rank(0, signal.SIGKILL), ranks=2, stopped=0),
    "one of two processes hangs": Fault(GONE, at_rank(1, signal.SIGSTOP), ranks=2, stopped=1),
}


def main() -> None:
    """Inject the faults that are asked for, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON, one fault a line, instead of a table")
    args = parser.parse_args()
    mounts = can_mount()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in run(Path(folder), [name for name in FAULTS if args.only in name and (mounts or not FAULTS[name].mounts)]):
            rows.append(row)
            print(json.dumps(row) if args.json else f"| {row['fault']} | {row['said']} | {row['outcome']} |", flush=True)
    if any(row["problems"] for row in rows):
        sys.exit("something was lost")


def can_mount() -> bool:
    """Start this script over in a namespace where it may mount disks; returns whether it is in one."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    if INSIDE not in os.environ and shutil.which("unshare"):
        probe = [*namespace, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            os.environ[INSIDE] = "1"
            os.execvp("unshare", [*namespace, sys.executable, *sys.argv])
    return INSIDE in os.environ


def run(folder: Path, names: list[str]) -> Iterator[dict]:
    """Make a model, compress it undisturbed, and then with every fault."""
    write_model(folder / "model", SIZES)
    (folder / "model" / "vocab.txt").write_text("word\n" * 60_000, "utf-8")  # a file beside the weights that takes long
    torch.save(list(random_tokens(12, 24)), data := folder / "tokens.pt")
    first = Place(folder / "first", folder / "model", data)
    warm(first.words, folder)
    expected = {}
    for ranks in sorted({FAULTS[name].ranks for name in names}):
        place = Place(folder / f"whole-{ranks}", folder / "model", data)
        assert [process.wait() for process in launch(place, ranks)] == [0] * ranks, place.log.read_text("utf-8")
        expected[ranks] = digests(place.output)
    for number, name in enumerate(names):
        place = Place(folder / str(number), folder / "model", data)
        try:
            yield {"fault": name} | inject(FAULTS[name], place, expected[FAULTS[name].ranks])
        finally:
            if FAULTS[name].mounts:
                subprocess.run(["umount", place.disk], check=True)


def launch(place: Place, ranks: int, inject: Callable[[Place], object] = lambda place: None) -> list[ForkedRun]:
    """Start the processes of a run."""
    if ranks == 1:
        return [start(place.words, place.log, partial(inject, place))]
    port = free_port()
    return [
        start(place.words, place.log.with_suffix(f".{rank}"), lambda r=rank: (join(r, ranks, port), inject(place)))
        for rank in range(ranks)
    ]


def inject(fault: Fault, place: Place, expected: dict[str, str]) -> dict:
    """Run into a fault, mend it, and give the same command again; tells what was wrong with that."""
    fault.before(place)
    before = digests(place.source)
    processes = launch(place, fault.ranks, fault.inject)
    watched = [process for rank, process in enumerate(processes) if rank != fault.stopped]
    codes = [process.wait() for process in watched]
    for rank, process in enumerate(processes):
        if rank == fault.stopped:
            process.kill()
    said, kept = [line for process in watched for line in process.said], place.layers_kept()
    problems = [f"half-written: {name}" for name in half_written(place.output, expected)]
    problems += [f"exit code {code}" for code in codes if code != fault.code]
    if (len(said), *said) != ((1, *said) if fault.says else (0,)) or not re.search(fault.says, " ".join(said)):
        problems.append(f"says {said}")
    problems += ["a traceback"] if any(process.has_traceback for process in watched) else []
    (fault.mend or place.__class__.layers_kept)(place)
    again = launch(place, fault.ranks)
    codes = [process.wait() for process in again]
    if fault.mend is None:
        if codes != [2] or not re.search(fault.again, " ".join(again[0].said)):
            problems.append(f"again: {codes} {again[0].said}")
    elif codes != [0] * fault.ranks:
        problems.append(f"again: {codes} {again[0].said}")
    else:
        problems += [f"differs: {name}" for name, digest in expected.items() if digests(place.output).get(name) != digest]
        problems += [f"left behind: {name}" for name in digests(place.output).keys() - expected.keys()]
    if fault.mend is not None and digests(place.source) != before:
        problems.append("the source has changed")
    text = " ".join(said).replace(str(place.disk), "").replace(str(place.source.parent), "")
    outcome = "the same bits" if fault.mend is not None else again[0].said[0].replace(str(place.disk), "")
    return {"said": text, "kept": kept, "outcome": outcome, "problems": problems}


if __name__ == "__main__":
    main()
