"""Script that runs GGUF files with llama.cpp's Python binding: every folder of the task holds a `model.gguf`.

python run_llama_cpp.py TASK.json RESULT.json
"""

from pathlib import Path

import llama_cpp
import numpy
from exchange import answer_task, log_softmax


def run(folder, task):
    """Generate and score in float32, whose keys and values llama.cpp otherwise keeps in float16."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    file = str(Path(folder) / "model.gguf")
    model = llama_cpp.Llama(file, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **exact)
    tokens = []
    for prompt in task["prompts"]:
        model.reset()
        model.eval(prompt)
        made = [int(numpy.argmax(model.scores[model.n_tokens - 1]))]
        while len(made) < task["new_tokens"]:
            model.eval(made[-1:])
            made.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
        tokens.append(made)
    model.reset()
    model.eval(task["text"])
    logs = log_softmax(model.scores[: len(task["text"]) - 1])  # (positions, vocabulary)
    return {"tokens": tokens, "logs": [float(row[token]) for row, token in zip(logs, task["text"][1:], strict=True)]}


if __name__ == "__main__":
    answer_task(llama_cpp.__version__, run)
