"""Conversion of this package's task rows to rows of the data sets that lm-eval's own task definitions read.

Every function returns the converted row, or None where lm-eval's prompt would not reproduce the row's text; the task
is then evaluated with the row's text as it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..evaluation.tasks.load import Task


__all__ = ["DEFINITIONS", "plain_definition", "plain_row"]

Row = Mapping[str, Any]


def _boolq(row: Row) -> dict | None:
    found = re.fullmatch(r"(.*)\nQuestion: (.*)\?\nAnswer:", row["context"], re.DOTALL)
    if found is None or row["choices"] != ["no", "yes"]:
        return None
    return {"passage": found[1], "question": found[2], "label": row["label"]}


def _question(row: Row) -> str | None:
    found = re.fullmatch(r"Question: (.*)\nAnswer:", row["context"], re.DOTALL)
    return None if found is None else found[1]


def _piqa(row: Row) -> dict | None:
    if (goal := _question(row)) is None or len(row["choices"]) != 2:
        return None
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}


def _lettered(row: Row) -> dict:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["label"]]}


def _arc(row: Row) -> dict | None:
    question = _question(row)
    return None if question is None else _lettered(row) | {"question": question}


def _openbookqa(row: Row) -> dict:
    return _lettered(row) | {"question_stem": row["context"]}


def _hellaswag(row: Row) -> dict | None:
    """Convert a HellaSwag row so that lm-eval's clean-up, which removes text in brackets, reproduces its texts."""
    label, colon, context = row["context"].partition(": ")
    texts = [_protected(text) for text in (label, context, *row["choices"])]
    if not colon or row["context"] != row["context"].strip() or None in texts:
        return None
    label, context, *endings = texts
    return {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": endings, "label": str(row["label"])}


def _protected(text: str) -> str | None:
    """Return a text that lm-eval's clean-up (strip, drop brackets, halve double spaces) turns into this, or None."""
    if re.search(r"\[.*\]", text) or ("[" in text and text != text.strip()):
        return None
    before, after = "[]" * text[:1].isspace(), "[]" * text[-1:].isspace()
    return before + text.replace(" ", "  ") + after


def _winogrande(row: Row) -> dict | None:
    if "_" not in row.get("sentence", "") or len(row.get("choices", ())) != 2:
        return None
    options = {"option1": row["choices"][0], "option2": row["choices"][1]}
    return {"sentence": row["sentence"], **options, "answer": str(row["label"] + 1)}


def _mmlu(row: Row) -> dict | None:
    if row.get("letters") != ["A", "B", "C", "D"] or "subject" not in row:
        return None
    return {"question": row["question"], "subject": row["subject"], "choices": row["choices"], "answer": row["label"]}


def _lambada(row: Row) -> dict | None:
    return None if " " in row["target"] else {"text": f"{row['context']} {row['target']}"}


DEFINITIONS: dict[str, tuple[str, Callable[[Row], dict | None]]] = {  # lm-eval's file, and the converter of its rows
    "arc_challenge": ("arc/arc_challenge.yaml", _arc),
    "arc_easy": ("arc/arc_easy.yaml", _arc),
    "boolq": ("super_glue/boolq/default.yaml", _boolq),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag),
    "lambada_openai": ("lambada/lambada_openai.yaml", _lambada),
    "mmlu": ("mmlu/default/mmlu_{subject}.yaml", _mmlu),
    "openbookqa": ("openbookqa/openbookqa.yaml", _openbookqa),
    "piqa": ("piqa/piqa.yaml", _piqa),
    "winogrande": ("winogrande/default.yaml", _winogrande),
}


def plain_row(task: Task, position: int) -> dict[str, Any]:
    """Convert one item to a row with its own texts, for `plain_definition`."""
    item = task.items[position]
    if task.kind == "multiple_context":
        contexts = [request.context for request in item.requests]
        return {"choices": contexts, "continuation": item.requests[0].continuation, "label": item.label}
    request = item.requests[0]
    if task.kind == "last_word":
        return {"context": request.context, "continuation": request.continuation}
    choices = [request.continuation[1:] for request in item.requests]  # the delimiter puts the space back
    return {"context": request.context, "choices": choices, "label": item.label}


def plain_definition(task: Task) -> dict[str, Any]:
    """Make a task definition of lm-eval for rows from `plain_row`."""
    metrics = ["acc", "acc_norm"] if task.items[0].lengths else ["acc"]
    common = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    if task.kind == "last_word":
        common = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
        metrics = ["acc", "perplexity"]
    elif task.kind == "multiple_context":
        common |= {"doc_to_text": "label", "doc_to_target": "continuation", "target_delimiter": ""}
    else:
        common |= {"doc_to_text": "context"}
    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]
    for entry in listed:
        if entry["metric"] == "perplexity":
            entry |= {"aggregation": "perplexity", "higher_is_better": False}
    return {**common, "metric_list": listed, "metadata": {"version": 1.0}}
