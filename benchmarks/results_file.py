"""JSON result files that later runs add to: one entry per model, with the settings that its figures depend on."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any


def read_results(path: Path) -> dict[str, Any]:
    """Read the results by model; empty where the file does not exist."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def check_settings(
    path: Path, name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Exit with an error where a file's figures were made with other settings than this run's.

    Args:
        path: of the results.
        name: of the model.
        settings: of this run.
        defaults: values of settings that the file lacks.
    """
    known = read_results(path).get(name)
    if known is None:
        return
    known, new = {**(defaults or {}), **known["settings"]}, {**(defaults or {}), **settings}
    if differing := [key for key in new | known if (key in known, known.get(key)) != (key in new, new.get(key))]:
        sys.exit(f"{path} has figures of {name} with other {', '.join(differing)}; give another --output")


def write_results(path: Path, results: Mapping[str, Any], indent: int | None = None) -> None:
    """Write the results of all models."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=indent) + "\n", "utf-8")


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of some draws' values; 0 for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def add_rows(path: Path, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Add the rows of one or more calibration draws to a result file of `quality.py`.

    Args:
        path: of the results.
        name: of the model.
        result: with new `rows`, which replace those of the same method, variant, sparsity and seed.

    Returns:
        All results of the model.
    """
    results = read_results(path)
    known = results.get(name, {"rows": [], "seconds": 0, "tasks": {}})

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[part] for part in ("method", "variant", "sparsity", "seed"))

    new = {key(row) for row in result["rows"]}
    rows = [row for row in known["rows"] if key(row) not in new] + result["rows"]
    seconds, tasks = known["seconds"] + result["seconds"], known["tasks"] | result["tasks"]
    merged = result | {"rows": rows, "seconds": seconds, "tasks": tasks}
    write_results(path, {**results, name: merged})
    return merged
