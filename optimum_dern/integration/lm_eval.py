"""Evaluation with lm-eval (EleutherAI's harness) on local task files, of a model in memory or a saved checkpoint.

    results = evaluate_with_lm_eval(model, tokenizer, load_tasks(["suite"], folder))

The tasks' rows are written to files with task definitions that include lm-eval's own, so that prompts, scoring and
metrics are lm-eval's; tasks that it does not have use the rows' own texts.  `write_lm_eval_tasks` alone makes the
folder for lm-eval's command line:

    lm_eval run --model hf --model_args pretrained=CHECKPOINT,dtype=float32 --include_path FOLDER --tasks boolq,piqa
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data.batches import preserved_random_state
from ..evaluation.tasks.accuracy import Outcome, TaskResult, summarise_outcomes
from ..evaluation.tasks.load import Task
from ..installation import install_hint
from .lm_eval_rows import DEFINITIONS, plain_definition, plain_row


__all__ = ["evaluate_with_lm_eval", "harness_model", "import_lm_eval", "write_lm_eval_tasks"]


def evaluate_with_lm_eval(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 8, folder: str | Path | None = None
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks with lm-eval.

    Args:
        model: a causal language model, or the folder or Hub id of a checkpoint, which is loaded in float32.
        tokenizer: of the model; None for that of the checkpoint.
        tasks: from `load_tasks` or `make_task`.
        batch_size: sequences per forward pass.
        folder: to write task definitions to and keep them; by default a temporary one.

    Returns:
        Results as from `evaluate_tasks`, without `acc_bytes`, with every item's result from lm-eval's log.

    Raises:
        ImportError: lm-eval is not installed.
    """
    evaluator = import_lm_eval("lm_eval.evaluator")
    manager = import_lm_eval("lm_eval.tasks").TaskManager
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())  # lm-eval seeds the global generators
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        names = write_lm_eval_tasks(tasks, folder)
        answer = evaluator.simple_evaluate(
            model=harness_model(model, tokenizer, batch_size),
            tasks=list(names.values()),
            task_manager=manager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    results = {}
    for task in tasks:
        name = names[task.name]
        parts = answer["group_subtasks"].get(name) or [name]
        samples = [sample for part in parts for sample in answer["samples"][part]]
        results[task.name] = _result(task, sorted(samples, key=lambda sample: sample["doc"]["item"]))
    return results


def harness_model(model: Any, tokenizer: Any = None, batch_size: int = 8, **options: Any) -> Any:
    """Wrap a model for `lm_eval.simple_evaluate`, with log-likelihoods computed in float32.

    Args:
        model: a causal language model, or the folder or Hub id of a checkpoint, which is loaded in float32.
        tokenizer: of the model; None for that of the checkpoint.
        batch_size: sequences per forward pass.
        **options: arguments of lm-eval's `HFLM`, such as `max_length`, which override those set here.

    Returns:
        An `HFLM`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: the model is in memory and no tokenizer is given.
    """
    wrapper = import_lm_eval("lm_eval.models.huggingface").HFLM
    defaults: dict[str, Any] = {"backend": "causal", "batch_size": batch_size, "softmax_dtype": "float32"}
    if isinstance(model, str | Path):
        from ..machine.torch_state import default_device

        model = str(model)
        defaults |= {"dtype": "float32", "device": str(default_device())}
    elif tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer, too")
    if tokenizer is not None:
        defaults["tokenizer"] = copy.deepcopy(tokenizer)  # lm-eval may give it another padding token
    return wrapper(pretrained=model, **defaults | options)


def write_lm_eval_tasks(tasks: Sequence[Task], folder: str | Path) -> dict[str, str]:
    """Write tasks as lm-eval reads them, for `TaskManager(include_path=folder)` or `lm_eval run --include_path`.

    Args:
        tasks: from `load_tasks` or `make_task`.
        folder: to write to; created if needed.

    Returns:
        lm-eval's name of every task; `:cloze` becomes `_cloze` in it.

    Raises:
        ImportError: lm-eval is not installed.
    """
    root = Path(import_lm_eval("lm_eval.tasks").__file__).parent
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for task in tasks:
        names[task.name] = name = task.name.replace(":", "_")
        file, convert = DEFINITIONS.get(task.name, ("", lambda row: None))
        rows = [convert(row) for row in task.rows]
        if any(row is None for row in rows):
            rows = [plain_row(task, position) for position in range(len(task.items))]
            _write_task(folder, name, rows, plain_definition(task))
        elif "{subject}" not in file:
            _write_task(folder, name, rows, {"include": str(root / file)})
        else:
            _write_group(folder, name, rows, str(root / file))
    return names


def _write_group(folder: Path, name: str, rows: list[dict], definition: str) -> None:
    """Write one task per subject, by lm-eval's definition for it, and the group of all subjects."""
    subjects = dict.fromkeys(row["subject"] for row in rows)
    for subject in subjects:
        part = [row | {"item": i} for i, row in enumerate(rows) if row["subject"] == subject]
        _write_task(folder, f"{name}_{subject}", part, {"include": definition.format(subject=subject)})
    metrics = [{"metric": "acc", "weight_by_size": True}]
    tasks = [f"{name}_{subject}" for subject in subjects]
    _write_definition(folder / f"{name}.yaml", {"group": name, "task": tasks, "aggregate_metric_list": metrics})


def _write_task(folder: Path, name: str, rows: list[dict], definition: dict[str, Any]) -> None:
    """Write a task's rows, and a definition that reads them instead of lm-eval's own data set."""
    from datasets import Dataset

    data = folder / f"{name}.parquet"  # JSON would be read with guessed types
    Dataset.from_list([{"item": i} | row for i, row in enumerate(rows)]).to_parquet(data)
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    facts = {"task": name, "dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": source}
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
    _write_definition(folder / f"{name}.yaml", definition | facts | splits | {"num_fewshot": 0})


def _write_definition(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")  # JSON is YAML


def _result(task: Task, samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    outcomes = []
    for item, sample in zip(task.items, samples, strict=True):
        logs = tuple(float(answer[0]) for answer in sample["filtered_resps"])
        measured = {name: float(sample[name]) for name in ("acc", "acc_norm") if name in sample}
        outcomes.append(Outcome(item.id, logs, measured))
    return summarise_outcomes(task, outcomes)


def import_lm_eval(module: str = "lm_eval") -> Any:
    """Import a module of lm-eval; raises ImportError, with how to install it, where lm-eval is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"lm-eval is not installed; run {install_hint('eval')}") from error
