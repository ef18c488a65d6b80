"""Subprocess that holds one model, so that its peak memory can be measured and several models can be timed in turn.

Requests and answers are JSON lines: `{"call": name, "arguments": {...}}` to standard input, `{"result": ...}` or
`{"error": ...}` back.  Output of libraries goes to standard error.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import describe_error


__all__ = ["ModelProcess", "ModelProcessError", "model_process"]


class ModelProcessError(ChildProcessError):
    """Raised where a request to a model's process failed, or where the process has ended."""


class ModelProcess:
    """Client of a process that holds one model.

    Args:
        path: checkpoint folder or Hub id; loaded on the first request that needs it.
        process: that runs `main`.
    """

    def __init__(self, path: str, process: subprocess.Popen) -> None:
        self.path = path
        self.process = process

    def call(self, name: str, **arguments: Any) -> Any:
        """Send one request and return its answer.

        Args:
            name: method of `ModelSession`.
            **arguments: of the method, JSON-able.

        Raises:
            ModelProcessError: the request failed there, or the process has ended.
        """
        try:
            self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            raise ModelProcessError(
                f"the process of {self.path} ended with code {code} during {name}"
                + ("; it was killed: most likely the machine's memory is too small for it" if code == -9 else "")
            )
        answer = json.loads(answer)
        if "error" in answer:
            raise ModelProcessError(f"{self.path}: {answer['error']}")
        return answer["result"]


@contextlib.contextmanager
def model_process(path: str | Path, device: str | None = None, **loading: Any) -> Iterator[ModelProcess]:
    """Start a process for one checkpoint, and end it when the context is left.

    Args:
        path: checkpoint folder or Hub id.
        device: to compute on; by default a GPU where there is one.
        **loading: arguments of `from_pretrained`, JSON-able.
    """
    command = [sys.executable, "-m", __name__, json.dumps({"path": str(path), "device": device, "loading": loading})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield ModelProcess(str(path), process)
    finally:
        process.stdin.close()  # the loop there ends with its input
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def main(arguments: str) -> None:
    """Answer requests from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error
    from .model_session import ModelSession

    session = ModelSession(**json.loads(arguments))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(getattr(session, request["call"]), request["arguments"])), file=answers, flush=True)


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": function(**arguments)}
    except Exception as error:  # sent as text; the client raises it
        return {"error": describe_error(error)}


if __name__ == "__main__":
    main(sys.argv[1])
