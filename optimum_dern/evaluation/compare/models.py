"""Comparison of an original with compressed models: quality one after the other, speed in interleaved rounds."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ...machine.progress import progress_bar
from .model_process import ModelProcess, model_process
from .speed import SpeedSettings


__all__ = ["Comparison", "ModelFigures", "compare_models"]


@dataclass
class ModelFigures:
    """The measured values of one model."""

    path: str
    experts: int  # routed, per layer
    experts_per_token: int
    parameters: int
    active_parameters: int  # used for one token
    disk_bytes: int  # of the weights
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)  # by text: loss, standard_error, tokens
    agreement: dict[str, dict[str, Any]] = field(default_factory=dict)  # by text, with the first model
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: metrics, and values of the main one
    memory_bytes: int = 0  # peak while running, beyond the interpreter and its libraries
    prefill: list[float] = field(default_factory=list)  # tokens per second, one value per round
    decode: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """The measured values of all models, the original first, and how they were measured."""

    models: list[ModelFigures]
    speed: SpeedSettings | None
    device: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON, with the medians of the speeds."""
        values = asdict(self)
        for model in values["models"]:
            model |= {f"{name}_median": median(model[name]) for name in ("prefill", "decode") if model[name]}
        return values


def compare_models(
    original: str | Path,
    compressed: Sequence[str | Path],
    data: str | Path | None = None,
    sequence_length: int | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    speed: SpeedSettings | None = None,
    device: str | None = None,
    **loading: Any,
) -> Comparison:
    """Measure several models on the same data and machine, each in a process of its own.

    Quality is measured with one model in memory at a time.  For speed all of them are, and each round times every
    model once, so that other load on the machine affects all models alike.

    Args:
        original: folder or Hub id.
        compressed: the models to compare it with.
        data: held-out text, a file or a folder with one file per domain; None skips the loss.
        sequence_length: tokens of the evaluation sequences, for all models; by default the original's context length,
            at most 2,048.
        limit: at most this many sequences per text and items per task; all by default.
        tasks: files or names, as `load_tasks` takes them.
        tasks_folder: folder in which tasks are looked up by name.
        speed: settings of the timing; None skips speed and memory.
        device: by default a GPU where there is one.
        **loading: `dtype` by name, `trust_remote_code`.

    Raises:
        ModelProcessError: a model cannot be loaded or run; the message names it.
    """
    import torch

    from ...machine.torch_state import default_device
    from ...models.loading import load_config
    from ..loss.perplexity import evaluation_length

    device = str(default_device(device))
    paths = [str(original), *map(str, compressed)]
    texts = {"data": None if data is None else str(data), "limit": limit}
    if data is not None:
        config = load_config(original, trust_remote_code=loading.get("trust_remote_code", False))
        texts["sequence_length"] = evaluation_length(config, sequence_length)
    questions = {"names": list(tasks), "folder": tasks_folder and str(tasks_folder), "limit": limit}
    figures = []
    with tempfile.TemporaryDirectory() as cache:
        for path in progress_bar(paths, "Measuring quality"):
            with model_process(path, device, **loading) as process:
                found = process.call("size")
                if data is not None:
                    found |= process.call("texts", **texts, cache=cache, record=not figures)
                if tasks:
                    found["tasks"] = process.call("tasks", **questions)
                figures.append(ModelFigures(path, **found))
    if speed is not None:
        with ExitStack() as stack:
            processes = [stack.enter_context(model_process(path, device, **loading)) for path in paths]
            _measure_speed(processes, figures, speed)
    return Comparison(figures, speed, device, torch.get_num_threads())


def _measure_speed(processes: Sequence[ModelProcess], figures: list[ModelFigures], speed: SpeedSettings) -> None:
    for process, row in zip(processes, figures, strict=True):
        row.memory_bytes = process.call("warm_up", **asdict(speed))
    tokens = {"prefill": speed.batch_size * speed.prompt_length, "decode": speed.batch_size * speed.new_tokens}
    for order in progress_bar(list(_rounds(len(processes), speed.repeats)), "Measuring speed"):
        for name, count in tokens.items():
            for position in order:
                seconds = processes[position].call(name, **asdict(speed))
                getattr(figures[position], name).append(count / seconds)


def _rounds(count: int, repeats: int) -> Iterator[list[int]]:
    """Yield the order of the models in each round; every round begins with another model."""
    for first in range(repeats):
        yield [(first + offset) % count for offset in range(count)]
