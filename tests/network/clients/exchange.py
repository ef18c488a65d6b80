"""What the scripts of all clients share: the task that they read, and the results that they write, both as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


__all__ = ["answer_task", "log_softmax"]


def answer_task(version: str, run: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Run every model of a task, and write the results: `python SCRIPT TASK.json RESULT.json`.

    Args:
        version: of the client, as the table shows it.
        run: called with a checkpoint's folder and the task: `prompts` (lists of token ids), `new_tokens` (how many to
            generate greedily after each) and `text` (token ids to score).  It returns `tokens` (those generated, a
            list a prompt) and `logs` (log-probability of each token of the text but the first).
    """
    task_file, result_file = map(Path, sys.argv[1:3])
    task, models = json.loads(task_file.read_text("utf-8")), {}
    for name, folder in task["models"].items():
        try:
            models[name] = run(folder, task)
        except Exception as error:  # an engine that refuses a model is a result, too
            models[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    result_file.write_text(json.dumps({"version": version, "models": models}), "utf-8")


def log_softmax(logits: Any) -> Any:
    """Log-probabilities of an array (positions, vocabulary) of numpy, in float64."""
    import numpy

    shifted = numpy.asarray(logits, numpy.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))
