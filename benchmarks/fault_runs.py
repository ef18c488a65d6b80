"""A run into a fault, and the same command once more: what is checked between and after them."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fault_moments import free_port, join
from forked_runs import ForkedRun, digests, half_written, start


__all__ = ["Fault", "Place", "launch", "run_into"]

OPTIONS = "--num-experts 4 --batch-size 4 --self-share 0 --random-share 0 --no-neuron-refit --device cpu"


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

    def free(self) -> None:
        """Make room on the disk again."""
        (self.disk / "ballast").unlink()

    def mend_source(self) -> None:
        """Put back the file of the source that was changed."""
        for kept in self.source.glob("*.kept"):
            kept.replace(kept.with_suffix(""))

    def layers_kept(self) -> int:
        """Count the decoder layers that the next run need not compress again."""
        manifest = self.output / ".dern" / "manifest.json"
        return len(json.loads(manifest.read_text("utf-8"))["layers"]) if manifest.exists() else 0

    def without_paths(self, text: str) -> str:
        """Shorten the paths in a text to what is the same for everybody."""
        for part in (self.disk, self.source.parent):
            text = text.replace(f"{part}/", "")
        return text


def nothing(place: Place) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Fault:
    """A fault: how it comes about, what the run must say, and how it is mended."""

    says: str  # pattern of the one line; empty where the process cannot say anything
    inject: Callable[[Place], object] = nothing  # in the process of the run, before it begins
    before: Callable[[Place], object] = nothing  # in ours
    mend: Callable[[Place], object] = nothing
    code: int = 2  # exit code of the run
    again: str = ""  # what the same command must then say, where it must not go on
    processes: int = 1
    ill: int | None = None  # number of the process, of several, that is killed or hangs, and is not asked
    mounts: bool = False


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
    before = digests(place.source)
    fault.before(place)
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
    if not fault.again and digests(place.source) != before:
        problems.append("the source is not what it was")
    return {"said": place.without_paths(" ".join(said)), "layers kept": kept, "again": again, "problems": problems}


def _run_again(fault: Fault, place: Place, problems: list[str], expected: Mapping[str, str]) -> str:
    """Give the same command once more, and add to the problems; returns what came of it."""
    processes = launch(place, fault.processes)
    codes, said = [process.wait() for process in processes], " ".join(processes[0].said)
    if fault.again:
        if codes != [2] or not re.search(fault.again, said):
            problems.append(f"again: {codes} {said}")
        return place.without_paths(said)
    if codes != [0] * fault.processes:
        problems.append(f"again: {codes} {said}")
        return place.without_paths(said)
    found = digests(place.output)
    differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    problems += [f"differs: {name}" for name in sorted(differing)]
    return "other bits" if differing else "the same bits"
