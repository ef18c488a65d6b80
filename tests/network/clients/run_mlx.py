"""Script that runs checkpoints with mlx-lm.

python run_mlx.py TASK.json RESULT.json
"""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
from exchange import answer_task, log_softmax
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def run(folder, task):
    """Generate and score in float32."""
    model = load_model(Path(folder))[0]
    model.set_dtype(mx.float32)
    tokens = []
    for prompt in task["prompts"]:
        cache, made, ids = make_prompt_cache(model), [], prompt
        while len(made) < task["new_tokens"]:
            made.append(int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item()))
            ids = made[-1:]
        tokens.append(made)
    logits = numpy.array(model(mx.array([task["text"]]))[0, :-1])  # (positions, vocabulary)
    logs = [float(row[token]) for row, token in zip(log_softmax(logits), task["text"][1:], strict=True)]
    return {"tokens": tokens, "logs": logs}


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    answer_task(version("mlx-lm"), run)
