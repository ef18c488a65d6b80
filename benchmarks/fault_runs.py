"""A run into a fault, and the same command once more: what is checked between and after them."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fault_moments import free_port, join
from forked_runs import ForkedRun, digests, half_written, start


__all__ = ["Fault", "Place", "launch", "run_into"]

COMPRESS = "--num-experts 4 --batch-size 4 --self-share 0 --random-share 0 --no-neuron-refit --device cpu"
MASK = "--mask-domain a --device cpu"
NOTES = "notes.txt"  # a file of somebody else's, on the disk
BITS = ("the same bits", "other bits")


class Place:
    """Folder of one fault: models of its own, an output folder, and the disk that this is on.

    Args:
        folder: new.
        models: folder of checkpoints to copy: `model`, and `one` and `two`, which were made from it.
        data: calibration data.
        command: that is run.
    """

    def __init__(self, folder: Path, models: Path, data: Path, command: str = "compress") -> None:
        self.folder, self.models, self.disk, self.data = folder, folder / "models", folder / "disk", data
        self.source, self.output, self.log = self.models / "model", self.disk / "out", folder / "log"
        self.command, self.more = command, []
        folder.mkdir()
        self.disk.mkdir()
        shutil.copytree(models, self.models)

    @property
    def words(self) -> list[object]:
        """The command."""
        source, output, data = self.source, self.output, self.data
        made = self.models / "one", self.models / "two"
        named = [f"{name}={data}" for name in ("a", "b")]
        attribute = ["attribute", source, output, "--data", *named, *MASK.split()]
        words = {
            "compress": ["compress", source, output, "--dataset", data, *COMPRESS.split()],
            "merge": ["merge", source, *made, output, "--method", "ties"],
            "merge --layerwise": ["merge", source, *made, output, "--method", "ties", "--layerwise"],
            "patterns build": ["patterns", "build", source, output, "--task", *named, "--device", "cpu"],
            "attribute": [*attribute, "--mask-neurons", 2],
            "attribute --mask-experts": [*attribute, "--mask-experts", 2],
        }
        return [*words[self.command], *self.more]

    def mount(self, options: str) -> None:
        """Mount a disk in memory, or mount it again with other options."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], check=True)

    def free(self) -> None:
        """Make room on the disk again."""
        (self.disk / "ballast").unlink()

    def mend_source(self) -> None:
        """Put back the file of a model that was changed."""
        for kept in self.models.glob("*/*.kept"):
            kept.replace(kept.with_suffix(""))

    def layers_kept(self) -> int:
        """Count the decoder layers that the next run need not compress again."""
        manifest = self.output / ".dern" / "manifest.json"
        return len(json.loads(manifest.read_text("utf-8"))["layers"]) if manifest.exists() else 0

    def without_paths(self, text: str) -> str:
        """Shorten the paths in a text to what is the same for everybody."""
        for part in (self.disk, self.models):
            text = text.replace(f"{part}/", "")
        return text


def nothing(place: Place) -> None:
    """Do nothing."""


class Fault(NamedTuple):
    """A fault: how it comes about, what the run must say, and how it is mended."""

    says: str  # pattern of the one line; empty where the process cannot say anything
    inject: Callable[[Place], object] = nothing  # in the process of the run, before it begins
    before: Callable[[Place], object] = nothing  # in ours
    mend: Callable[[Place], object] = nothing
    code: int = 2  # exit code of the run
    again: str = ""  # what the same command must then say, where it must not go on
    clear: Callable[[Place], object] | None = None  # does what it says then, after which it must go on
    processes: int = 1
    ill: int | None = None  # number of the process, of several, that is killed or hangs, and is not asked
    mounts: bool = False
    command: str = "compress"


def launch(place: Place, count: int, inject: Callable[[Place], object] = nothing) -> list[ForkedRun]:
    """Start the processes of a run."""
    if count == 1:
        return [start(place.words, place.log, partial(inject, place))]
    port = free_port()

    def prepare(rank: int) -> None:
        join(rank, count, port)
        inject(place)

    return [start(place.words, place.log.with_suffix(f".{rank}"), partial(prepare, rank)) for rank in range(count)]


def run_into(fault: Fault, place: Place, expected: Mapping[str, str]) -> dict:
    """Run into a fault, mend it, and give the same command again.

    Args:
        fault: to run into.
        place: new.
        expected: what `digests` says of an undisturbed run.

    Returns:
        What the run said, decoder layers kept, what the same command said, and the problems: nothing, if all is well.
    """
    before = digests(place.models)
    fault.before(place)
    with suppress(OSError):  # where the disk is full or read-only
        (place.disk / NOTES).write_text(NOTES, "utf-8")
    there = {NOTES for file in place.disk.iterdir() if file.name == NOTES}
    processes = launch(place, fault.processes, fault.inject)
    asked = [process for rank, process in enumerate(processes) if rank != fault.ill]
    codes = [process.wait() for process in asked]
    if fault.ill is not None:
        processes[fault.ill].kill()
    said, kept = [line for process in asked for line in process.said], place.layers_kept()
    problems = [f"half-written: {name}" for name in half_written(place.output, expected)]
    problems += [f"exit code {code}" for code in codes if code != fault.code]
    problems += ["a traceback"] if any(process.has_traceback for process in asked) else []
    if len(said) != bool(fault.says) or not re.search(fault.says, " ".join(said)):
        problems.append(f"says {said}")
    fault.mend(place)
    again = _run_again(fault, place, problems, expected)
    if (not fault.again or fault.clear) and digests(place.models) != before:
        problems.append("the source is not what it was")
    if again in BITS and (left := {file.name for file in place.disk.iterdir()} ^ {"out", *there} - {"ballast"}):
        problems.append(f"left behind, or removed: {sorted(left)}")
    return {"said": place.without_paths(" ".join(said)), "layers kept": kept, "again": again, "problems": problems}


def _run_again(fault: Fault, place: Place, problems: list[str], expected: Mapping[str, str]) -> str:
    """Give the same command once more, and add to the problems; returns what came of it."""
    codes, said = _run(fault, place)
    if fault.again:
        if codes != [2] or not re.search(fault.again, said):
            problems.append(f"again: {codes} {said}")
        if fault.clear is None:
            return place.without_paths(said)
        fault.clear(place)
        codes, said = _run(fault, place)
    if codes != [0] * fault.processes:
        problems.append(f"again: {codes} {said}")
        return place.without_paths(said)
    found = digests(place.output)
    differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    problems += [f"differs: {name}" for name in sorted(differing)]
    return BITS[bool(differing)]


def _run(fault: Fault, place: Place) -> tuple[list[int | None], str]:
    """Run undisturbed; returns the exit codes, and what the first process has said."""
    processes = launch(place, fault.processes)
    return [process.wait() for process in processes], " ".join(processes[0].said)
