"""Result files that later runs add to: an entry a model, with the settings that its figures depend on."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_results(path: Path) -> dict[str, Any]:
    """What a file has, by model; nothing where there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def check_settings(
    path: Path, name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Leave the program where figures of other settings would be mixed with new ones.

    Args:
        path: of the results.
        name: of the model.
        settings: of this run.
        defaults: what a missing entry means.
    """
    known = read_results(path).get(name)
    if known is None:
        return
    known, new = {**(defaults or {}), **known["settings"]}, {**(defaults or {}), **settings}
    if differing := [key for key in new | known if (key in known, known.get(key)) != (key in new, new.get(key))]:
        sys.exit(f"{path} has figures of {name} with other {', '.join(differing)}; give another --output")


def write_results(path: Path, results: Mapping[str, Any], indent: int | None = None) -> None:
    """Write all models' results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=indent) + "\n", "utf-8")


def add_rows(path: Path, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of one draw or more beside what a file of `quality.py` has.

    Args:
        path: of the results.
        name: of the model.
        result: with new `rows`, which replace those of the same method, variant, sparsity and seed.

    Returns:
        All of the model's.
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
