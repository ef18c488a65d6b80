"""Faults of the commands beside `compress` that write: `merge`, `patterns build` and `attribute`.

None of them keeps unfinished work: after an error nothing is left, after a kill at most what has no final name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import NamedTuple

from fault_compress import AGAIN, CHANGED, FULL, RIGHTS, at
from fault_moments import at_call, at_layer, at_publication, change_source, end_by, fill_disk, limit_size
from fault_runs import Fault, Place

from optimum_dern.attribution import masking
from optimum_dern.model_merging import output, runs


__all__ = ["command_faults"]

WEIGHTS = "model.safetensors"
BETWEEN = partial(at_call, os, "replace", number=1)  # of several files, the first has its name
NAMED = partial(at_call, Path, "replace")  # when the new folder is whole
UNFINISHED = r"out.*\.partial exists, .*; remove it if none runs"


class Moment(NamedTuple):
    """A moment of a run: how to act then, what is still needed, and what a kill leaves."""

    at: Callable
    room: bool = False  # something has to be written after it
    left: str = ""  # what the same command says after a kill, where that has left something
    always: bool = False  # and after an interrupt, too
    clear: Callable[[Place], object] = lambda place: None  # does what it says then


def _remove(name: str, place: Place) -> None:
    shutil.rmtree(place.disk / name)


def _overwrite(place: Place) -> None:
    place.more.append("--overwrite")


PART = {"left": UNFINISHED, "clear": partial(_remove, "out.partial")}
MASKED = {"left": UNFINISHED, "clear": partial(_remove, "out/masked.partial")}
MOMENTS = {
    "merge": {
        "while models are read": Moment(partial(at_call, runs, "load_model", number=1), True, **PART),
        "while files are copied": Moment(partial(at_call, runs, "copy_companions"), True, **PART),
        "before it gets its name": Moment(NAMED, **PART),
    },
    "merge --layerwise": {
        "at the second layer": Moment(at_layer, True, **PART),
        "while files are moved": Moment(partial(at_call, output, "publish_shards"), True, **PART),
        "before it gets its name": Moment(NAMED, **PART),
    },
    "patterns build": {
        "at the second layer": Moment(at_layer, True),
        "between its files": Moment(BETWEEN, False, "holds a library; .*--overwrite", True, _overwrite),
    },
    "attribute": {
        "at the second layer": Moment(at_layer, True),
        "between its files": Moment(BETWEEN, True),
        "while the masked model is written": Moment(partial(at_call, masking, "copy_companions"), True, **MASKED),
    },
    "attribute --mask-experts": {
        "while files of the masked model are moved": Moment(at_publication, True),
    },
}


def command_faults() -> dict[str, Fault]:
    """All of them, by name, which begins with the command."""
    return {
        f"{command}: {name}": fault._replace(command=command)
        for command, moments in MOMENTS.items()
        for faults in (lacking(command, moments), ended(moments), changed(command, moments))
        for name, fault in faults
    }


def lacking(command: str, moments: dict[str, Moment]) -> Iterator[tuple[str, Fault]]:
    """The disk is full, may not be written to, or takes no large files."""
    large, free = partial(Place.mount, options="size=20m"), Place.free
    says = f"No space left .*: .*{FULL}"
    if command.startswith("merge"):
        small, wider = (partial(Place.mount, options=o) for o in ("size=1m", "remount,size=20m"))
        yield "full disk, at the start", Fault(f"take .* are free: .*{FULL}", before=small, mend=wider, mounts=True)
    else:
        yield "full disk, at the start", Fault(says, before=_mount_full, mend=free, mounts=True)
    for name, moment in moments.items():
        if moment.room:
            fill = partial(_fill, moment.at)
            yield f"full disk, {name}", Fault(says, fill, large, free, mounts=True)
    read_only, writable = (partial(Place.mount, options=o) for o in ("ro", "remount,rw"))
    refused = f"Read-only file system: .*/out.*{RIGHTS}"
    yield "read-only output", Fault(refused, before=read_only, mend=writable, mounts=True)
    if command != "patterns build":  # which writes no large ones
        too_large = f"File too large: .*ulimit -f.*{AGAIN}"
        name, moment = next(iter(moments.items()))
        yield f"limit on the size of files, {name}", Fault(too_large, at(moment.at, limit_size))


def _mount_full(place: Place) -> None:
    place.mount("size=20m")
    fill_disk(place.disk)


def _fill(moment: Callable, place: Place) -> None:
    moment(partial(fill_disk, place.disk))


def ended(moments: dict[str, Moment]) -> Iterator[tuple[str, Fault]]:
    """Somebody ends the process."""
    for name, moment in moments.items():
        for signal, says in ((SIGINT, "^interrupted$"), (SIGTERM, "^ended by SIGTERM$"), (SIGKILL, "")):
            code = 128 + signal if says else -SIGKILL
            fault = Fault(says, at(moment.at, end_by, signal), code=code)
            if moment.always or signal == SIGKILL:
                fault = fault._replace(again=moment.left, clear=moment.clear)
            yield f"{signal.name}, {name}", fault


def changed(command: str, moments: dict[str, Moment]) -> Iterator[tuple[str, Fault]]:
    """Somebody changes a model while it is read."""
    if command == "attribute --mask-experts":  # whose two runs, one after the other, have these faults elsewhere
        return
    moment = next(iter(moments.values())).at
    models = {"source": "model", "fine-tuned model": "one"} if command.startswith("merge") else {"source": "model"}
    for what, model in models.items():
        for how in ("replaced", "removed"):
            inject = partial(_change, moment, model, WEIGHTS, how)
            yield f"{what} {how}, and put back", Fault(CHANGED, inject, mend=Place.mend_source)
    config = partial(_change, moment, "model", "config.json", "replaced")
    yield "config.json replaced, and put back", Fault(CHANGED, config, mend=Place.mend_source)


def _change(moment: Callable, model: str, name: str, how: str, place: Place) -> None:
    moment(partial(change_source, place.models / model / name, how))
