"""Loading of evaluation tasks from JSONL files with one question per line (`items` has the formats)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.files import parse_json, read_text
from .items import Item, kind_of_row, make_item


__all__ = ["SUITE", "Task", "load_tasks", "make_task"]

SUITE = ("boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "mmlu")
CLOZE = ":cloze"  # after a task's name: score the texts of the choices, not their letters


@dataclass(frozen=True)
class Task:
    """An evaluation task: its items, all of one kind, and the rows they were made from."""

    name: str
    kind: str
    items: tuple[Item, ...]
    rows: tuple[dict[str, Any], ...]  # as they were read, item by item

    @property
    def chance(self) -> float:
        """Accuracy of random guessing; 0 for tasks that ask for a word."""
        if self.kind == "last_word":
            return 0.0
        return sum(1 / len(item.requests) for item in self.items) / len(self.items)


def load_tasks(names: Iterable[str | Path], folder: str | Path | None = None, limit: int | None = None) -> list[Task]:
    """Load several tasks.

    Args:
        names: files, or names of files in `folder` without their `.jsonl`; `"suite"` stands for the eight tasks of
            the paper (`SUITE`), `"all"` for every file that can be scored, and `NAME:cloze` scores choices by their
            texts where the rows have letters.
        folder: in which names are looked up.
        limit: at most this many items per task, evenly spaced in its file, which may be sorted by subject.

    Returns:
        The tasks, in the order of their names.

    Raises:
        FileNotFoundError: a task is not found.
        ValueError: a line is not a JSON object, a file cannot be scored, or a name is given twice.
    """
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder of tasks {str(folder)!r}; give one, or .jsonl files alone")
    paths: list[tuple[Path, bool]] = []
    for name in map(str, names):
        plain = name.removesuffix(CLOZE)
        if plain in ("suite", "all"):
            if folder is None:
                raise ValueError(f"{name!r} stands for the tasks of a folder; name the folder, too")
            listed = SUITE if plain == "suite" else _scorable(Path(folder).expanduser())
            paths += [(_find(entry, folder), False) for entry in listed]
        else:
            paths.append((_find(plain, folder), name.endswith(CLOZE)))
    tasks = [make_task(path.stem, list(_rows(path)), limit, cloze) for path, cloze in paths]
    found = [task.name for task in tasks]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"task {twice[0]!r} is given twice; give files different names")
    return tasks


def make_task(name: str, rows: Sequence[Mapping[str, Any]], limit: int | None = None, cloze: bool = False) -> Task:
    """Make a task from rows in memory.

    Args:
        name: of the task.
        rows: dicts, all of one kind.
        limit: at most this many items, evenly spaced.
        cloze: score choices by their texts where the rows have letters.

    Raises:
        ValueError: there are no rows, the rows cannot be scored, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1 item a task")
    if not rows:
        raise ValueError(f"task {name!r} has no row; give data with at least one")
    count = min(len(rows), limit or len(rows))
    places = [i * len(rows) // count for i in range(count)]
    try:
        kind = kind_of_row(rows[0])
        items = tuple(make_item(rows[i], kind, f"row {i}", cloze) for i in places)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    return Task(name + CLOZE * cloze, kind, items, tuple(dict(rows[i]) for i in places))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, skipping empty lines."""
    lines = read_text(path).split("\n")  # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds a {type(row).__name__}; give one JSON object a line")
        yield row


def _find(name: str, folder: str | Path | None) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" or folder is None:
        if path.is_file():
            return path
        hint = "give a .jsonl file" if path.suffix == ".jsonl" else "give a .jsonl file, or the folder that holds it"
        raise FileNotFoundError(f"there is no task file {name!r}; {hint}")
    path = Path(folder).expanduser() / f"{name}.jsonl"
    if path.is_file():
        return path
    there = sorted(file.stem for file in path.parent.glob("*.jsonl"))
    raise FileNotFoundError(f"there is no task {name!r} in {folder}; it has {', '.join(there) or 'no .jsonl file'}")


def _scorable(folder: Path) -> list[str]:
    names = []
    for file in sorted(folder.glob("*.jsonl")):
        first = next(_rows(file), {})
        try:
            kind_of_row(first)
        except ValueError:
            continue  # generated answers
        names.append(file.stem)
    if not names:
        raise FileNotFoundError(f"there is no task that can be scored in {folder}")
    return names
