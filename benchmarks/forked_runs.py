"""Runs of `optimum-dern` in children of one process that has imported everything: half a second each, easy to disturb.

A child can be limited before it starts, and made to act at a moment of its run; the parent then looks at what is left.
"""

import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from optimum_dern.commands.main import main


__all__ = ["ForkedRun", "digests", "half_written", "start", "warm"]

ENDS = {  # of files that contain times and memory: how a whole one ends
    "dern_report.json": b"}\n",
    "dern_report.html": b"</html>\n",
    "README.md": b"\n",
}


class ForkedRun:
    """A run in a child process.

    Args:
        pid: of the child.
        log: file of its output and errors.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Wait for its end, at most so many seconds.

        Returns:
            Its exit code, a signal's as a negative number; None if it is still running.
        """
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, 0 if seconds == float("inf") else os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.001)

    def kill(self) -> int | None:
        """End it by SIGKILL, and return its exit code."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def said(self) -> list[str]:
        """What the command has said of errors and interrupts, a line each."""
        lines = self.log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
        return [line.partition("optimum-dern: ")[2] for line in lines if "optimum-dern: " in line]

    @property
    def has_traceback(self) -> bool:
        """Whether anything has printed a traceback."""
        return "Traceback (most recent call last)" in self.log.read_text("utf-8", errors="replace")


def start(words: Sequence[object], log: Path, before: Callable[[], object] | None = None) -> ForkedRun:
    """Start `optimum-dern` in a child.

    Args:
        words: of the command.
        log: for its output and errors.
        before: called in the child first, to limit it or to prepare what will happen to it.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return ForkedRun(pid, log)
    code: int | str | None = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        if before is not None:
            before()
        main(list(map(str, words)))
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else bool(code))


def warm(words: Sequence[object], folder: Path) -> None:
    """Run once, undisturbed, and import here what that run has imported, so that all others need not.

    Args:
        words: of the command.
        folder: for its log.
    """
    names = folder / "modules.json"

    def run() -> None:
        main(list(map(str, words)))
        names.write_text(json.dumps(sorted(sys.modules)), "utf-8")
        os._exit(0)

    first = start(words, folder / "log", run)
    if first.wait() != 0:
        sys.exit(f"the undisturbed run has failed: {first.log.read_text('utf-8')}")
    for name in json.loads(names.read_text("utf-8")):
        with suppress(Exception):  # some exist only within another
            importlib.import_module(name)
    gc.freeze()  # a child that collects garbage would otherwise copy all pages of what is imported here


def digests(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of all files of a folder, hidden ones too, but for those with times in them."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in ENDS]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def half_written(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """List the files of an unfinished run that have a final name, and not the content that they should have then.

    Names that begin with a dot or end with `.partial`, and what is in folders of such names, are not final.

    Args:
        folder: of the output.
        expected: what `digests` says of a finished one.
    """
    found = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") or part.endswith(".partial") for part in parts):
            continue
        content = file.read_bytes()
        if file.name in ENDS:
            whole = content.endswith(ENDS[file.name])
        else:
            whole = hashlib.sha256(content).hexdigest() == expected.get("/".join(parts))
        if not whole:
            found.append("/".join(parts))
    return found
