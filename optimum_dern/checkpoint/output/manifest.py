"""What a run over a checkpoint has done so far, so that the same command can go on after an interruption.

The manifest lies in a working folder inside the output, and is replaced as a whole after every finished step.  What
makes two runs the same is its fingerprint: model, options, calibration data and tools.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...text_files import replace_text


__all__ = ["Manifest", "only_process"]


class Manifest:
    """Finished layers and their checksums.

    Args:
        folder: working folder.
        fingerprint: everything that the result depends on, by name.

    A copy in another process of the run sets `writes` to False: one process writes for all.

    Raises:
        ValueError: the folder holds another run; the message names what differs.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = folder / "manifest.json"
        self.writes = True
        # Written and read once, so that tuples and numbers compare as JSON has them.
        self.state: dict[str, Any] = {"fingerprint": json.loads(json.dumps(fingerprint)), "layers": {}, "tensors": {}}
        if self.path.exists():
            earlier = json.loads(self.path.read_text("utf-8"))
            _check_same(earlier["fingerprint"], self.state["fingerprint"])
            self.state = earlier

    @property
    def tensors(self) -> dict[str, str]:
        """SHA-256 of the bytes of every tensor that is written."""
        return self.state["tensors"]

    @property
    def layers(self) -> dict[int, Any]:
        """What was noted about each finished layer, by its position."""
        return {int(position): note for position, note in self.state["layers"].items()}

    def finish_layer(self, position: int, note: Any) -> None:
        """Note that a layer and its tensors are on the disk."""
        self.state["layers"][str(position)] = note
        self.save()

    @property
    def report(self) -> dict[str, Any] | None:
        """The run's report, once all tensors are written and only the final places are missing."""
        return self.state.get("report")

    def complete(self, report: dict[str, Any]) -> None:
        """Note that all tensors are on the disk."""
        self.state["report"] = report
        self.save()

    def save(self) -> None:
        """Replace the manifest on the disk."""
        if self.writes:
            replace_text(self.path, json.dumps(self.state), durable=True)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes out of a working folder.

    Raises:
        RuntimeError: another one is at it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is compressing into {folder.parent}; wait for it, or give another output folder"
            ) from None
        yield


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
