"""The manifest of an unfinished run: its finished layers, so that the same command resumes after an interruption.

The manifest is a file in the working folder inside the output folder, replaced as a whole after every finished layer.
A run resumes another one if their fingerprints are equal: model, options, calibration data and library versions.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...text_files import read_object, replace_text


__all__ = ["Manifest", "only_process", "read_manifest"]


class Manifest:
    """Finished layers and checksums of the written tensors of a run, kept on disk.

    Args:
        folder: working folder.
        fingerprint: everything that the result depends on, by name.

    In the other processes of a run `writes` is set to False: one process writes for all.

    Raises:
        ValueError: the folder holds a different run; the message names the differences.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = folder / "manifest.json"
        self.writes = True
        # Converted to JSON and back, so that it compares equal to a fingerprint read from the file.
        self.state: dict[str, Any] = {"fingerprint": json.loads(json.dumps(fingerprint)), "layers": {}, "tensors": {}}
        if self.path.exists():
            earlier = read_manifest(self.path)
            _check_same(earlier["fingerprint"], self.state["fingerprint"])
            self.state = earlier

    @property
    def tensors(self) -> dict[str, str]:
        """SHA-256 of the bytes of every written tensor, by name."""
        return self.state["tensors"]

    @property
    def layers(self) -> dict[int, Any]:
        """The note of each finished layer, by its position."""
        return {int(position): note for position, note in self.state["layers"].items()}

    def finish_layer(self, position: int, note: Any) -> None:
        """Note that a layer's tensors are on disk."""
        self.state["layers"][str(position)] = note
        self.save()

    @property
    def report(self) -> dict[str, Any] | None:
        """The run's report, once all tensors are written and the files only need to be moved; None before."""
        return self.state.get("report")

    def choose_layers(self, chosen: Mapping[int, float | None]) -> None:
        """Note which layers of those that are finished belong to the result, with a figure each, in their order."""
        self.state["chosen"] = list(chosen.items())
        self.save()

    @property
    def chosen_layers(self) -> dict[int, float | None] | None:
        """The layers noted by `choose_layers`; None before."""
        return None if "chosen" not in self.state else dict(self.state["chosen"])

    def complete(self, report: dict[str, Any]) -> None:
        """Note that all tensors are on disk, with the run's report."""
        self.state["report"] = report
        self.save()

    def save(self) -> None:
        """Replace the manifest's file on disk."""
        if self.writes:
            replace_text(self.path, json.dumps(self.state), durable=True)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Lock a working folder against other processes while the context is open.

    Raises:
        RuntimeError: another process holds the lock.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is compressing into {folder.parent}; wait for it, or give another output folder"
            ) from None
        yield


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest's file: its fingerprint, and the layers and tensors that are finished.

    Raises:
        ValueError: a part of it is missing or broken.
    """
    try:
        found = read_object(path)
        if all(isinstance(found.get(part), dict) for part in ("fingerprint", "layers", "tensors")):
            list(map(int, found["layers"]))  # positions
            return found
        raise ValueError("a part of it is missing")
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); restart the run (restart=True, --restart)") from error


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [
        f"{name} was {earlier.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"the output folder holds an unfinished run that differs: {'; '.join(differences)}; give the same "
            "arguments to go on with it, or --restart to start over"
        )
