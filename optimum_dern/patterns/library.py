"""`PatternLibrary`: a folder with the expert scores of some tasks for one model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..text_files import json_text, read_object, replacing


__all__ = ["FACTS", "SCORES", "PatternLibrary"]

FORMAT = 1
FACTS, SCORES = "library.json", "patterns.safetensors"


@dataclass(frozen=True)
class PatternLibrary:
    """Scores of the experts of every MoE layer for some tasks, and the model that they are of."""

    model: Mapping[str, Any]  # its identity, from `checkpoint.source.recorded.identify_model`, and its name
    layers: list[int]  # positions of the MoE layers
    tasks: Mapping[str, Mapping[str, Any]]  # by name: number of tokens, and what the data was
    scores: Mapping[str, Tensor]  # by task: (layers, E) float64
    settings: Mapping[str, Any]  # `top` and `confidence` of the scores

    def save(self, folder: str | Path) -> None:
        """Write the library, complete once it has its JSON file; an earlier one goes when both files are written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: getattr(self, name) for name in ("model", "layers", "tasks", "settings")}
        with replacing(folder / FACTS) as facts, replacing(folder / SCORES) as scores:
            save_file({name: own.contiguous() for name, own in self.scores.items()}, scores)
            facts.write_text(json_text({"format": FORMAT, **named}), "utf-8")
            (folder / FACTS).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> "PatternLibrary":
        """Load a library.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: it is broken, or of another format.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise FileNotFoundError(
                f"{folder} holds no library of patterns; make one with optimum-dern patterns build"
            )
        try:
            facts = read_object(folder / FACTS)
            found = facts.pop("format")
            if found == FORMAT:
                library = cls(**facts, scores=load_file(folder / SCORES))
                shapes = {tuple(scores.shape[:1]) for scores in library.scores.values()}
                if library.scores.keys() != library.tasks.keys() or shapes != {(len(library.layers),)}:
                    raise ValueError("its scores are of other tasks or layers than it says")
                return library
        except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} is a broken library of patterns ({error}); build it again") from error
        raise ValueError(f"{folder} has the format {found!r}, this release reads {FORMAT}; build it again")

    def check_model(self, identity: Mapping[str, Any], name: str) -> None:
        """Refuse a model that the library is not of.

        Raises:
            ValueError: naming both.
        """
        if any(self.model.get(key) != value for key, value in identity.items()):
            raise ValueError(
                f"the library is of {self.model.get('name')!r}, not of {name!r}: weights or config differ; build one "
                "for this model"
            )

    def task_scores(self, task: str) -> Tensor:
        """Return the scores (layers, E) of a task.

        Raises:
            ValueError: there is no such task.
        """
        if task not in self.scores:
            raise ValueError(f"the library has no task {task!r}; it has {', '.join(sorted(self.scores))}")
        return self.scores[task]

    def nearest(self, vector: Tensor) -> list[tuple[str, float]]:
        """Order the tasks by the distance of their first layer's scores to a vector (E,), nearest first."""
        distances = {task: torch.dist(scores[0], vector).item() for task, scores in self.scores.items()}
        return sorted(distances.items(), key=lambda entry: entry[1])
