"""A model in a process of its own, so that its peak memory is its own and several can be timed in turn.

Requests and answers are JSON lines: `{"call": name, "arguments": {...}}` to standard input, `{"result": ...}` or
`{"error": ...}` back.  Whatever libraries print goes to standard error.
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
    """A request that failed, or a process that is gone."""


class ModelProcess:
    """The asking end.

    Args:
        path: checkpoint folder or Hub id; loaded on the first request that needs it.
        process: running `main`.
    """

    def __init__(self, path: str, process: subprocess.Popen) -> None:
        self.path = path
        self.process = process

    def call(self, name: str, **arguments: Any) -> Any:
        """The answer to one request.

        Raises:
            ModelProcessError: with the message of the error there.
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
    """A process for one checkpoint, ended when the context is left.

    Args:
        path: checkpoint folder or Hub id.
        device: where it computes; CUDA where there is one by default.
        **loading: of `from_pretrained`, JSON-able.
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
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on only answers reach the asking end
    from .model_session import ModelSession

    session = ModelSession(**json.loads(arguments))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(getattr(session, request["call"]), request["arguments"])), file=answers, flush=True)


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": function(**arguments)}
    except Exception as error:  # crosses the process boundary as text; the asking end raises it
        return {"error": describe_error(error)}


if __name__ == "__main__":
    main(sys.argv[1])
