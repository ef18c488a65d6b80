"""Python programs in processes forked from one that has imported torch and transformers, by subprocess's own names.

A new process takes four seconds to import them, a forked one a tenth of a second to start.  Processes whose imports
are tested have to be new ones.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import Any


__all__ = ["DEVNULL", "PIPE", "CompletedProcess", "Popen", "TimeoutExpired", "run"]

SERVER = Path(__file__).with_name("fork_server.py")


@functools.cache
def servers() -> dict[str, socket.socket]:
    """Start the processes to fork from, once a session, by what they have imported; they end with this one."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    ends = [theirs.fileno() for _, theirs in pairs]
    command = [sys.executable, SERVER, *map(str, ends)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=ends)
    atexit.register(process.wait)
    for ours, theirs in pairs:
        theirs.close()
        atexit.register(ours.close)
    return dict(zip(("torch", "transformers"), (ours for ours, _ in pairs), strict=True))


class Popen:
    """A process; its pipes are of text.

    Args:
        command: this interpreter, then "-c", "-m" or the path of a script, and arguments.
        env: environment; variables that are read on import have no effect on what is `imported`.
        cwd: working folder.
        stdin, stdout, stderr: None, for those of this process, `PIPE` or `DEVNULL`.
        text: True wherever there is a pipe.
        imported: "transformers", or "torch" alone, where huggingface_hub has to read `env` on import.
    """

    def __init__(
        self,
        command: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = False,
        imported: str = "transformers",
    ) -> None:
        interpreter, *words = map(str, command)
        assert interpreter == sys.executable and (text or PIPE not in (stdin, stdout, stderr))
        self.args, self.returncode = command, None
        pipes = [_pipe(number, kind) for number, kind in enumerate((stdin, stdout, stderr))]
        (self.stdin, self.stdout, self.stderr), ends = ([pipe[side] for pipe in pipes] for side in (0, 1))
        self._answer, end = os.pipe()
        request = {"command": words, "folder": str(cwd or os.getcwd())}
        request["environment"] = dict(os.environ if env is None else env)
        socket.send_fds(servers()[imported], [json.dumps(request).encode()], [*ends, end])
        for descriptor in (*ends, end):
            os.close(descriptor)
        self.pid = int(self._line())

    def _line(self) -> str:
        """Read what the server's child tells."""
        line = b""
        while not line.endswith(b"\n"):
            letter = os.read(self._answer, 1)
            assert letter, f"the process to fork from has not started {self.args}"
            line += letter
        return line.decode()

    def poll(self, timeout: float | None = 0) -> int | None:
        """Return the exit code, or None after so many seconds."""
        if self.returncode is None and select.select([self._answer], [], [], timeout)[0]:
            self.returncode = int(self._line())
            os.close(self._answer)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code: a signal's as a negative number."""
        if self.poll(timeout) is None:
            raise TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Write its input, wait for its end, and return its output and errors."""
        with ThreadPoolExecutor(2) as readers:
            read = [pipe and readers.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            try:
                if self.stdin is not None:
                    self.stdin.write(input or "")
                    self.stdin.close()
                self.wait(timeout)
            except TimeoutExpired:
                self.kill()
                raise
        for pipe in filter(None, (self.stdout, self.stderr)):
            pipe.close()
        return tuple(found and found.result() for found in read)


def _pipe(number: int, kind: int | None) -> tuple[Any, int]:
    """Return our end of a stream, if it is a pipe, and the descriptor for the process."""
    if kind == PIPE:
        reading, writing = os.pipe()
        ours, theirs, mode = (writing, reading, "w") if number == 0 else (reading, writing, "r")
        return os.fdopen(ours, mode, encoding="utf-8"), theirs
    return None, os.dup(number) if kind is None else os.open(os.devnull, os.O_RDWR)


def run(
    command: Sequence[object],
    input: str | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> CompletedProcess:
    """Run a program to its end, as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    process = Popen(command, stdin=None if input is None else PIPE, **options)
    output, errors = process.communicate(input, timeout)
    done = CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done
