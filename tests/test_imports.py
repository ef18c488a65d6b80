"""Modules of the package import one another one way only."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import optimum_dern


ROOT = Path(optimum_dern.__file__).parent


def module_name(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def top_imports(body: list[ast.stmt]) -> Iterator[ast.ImportFrom]:
    """Relative imports that run with the module or, under TYPE_CHECKING, with the reader."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from top_imports(node.body + node.orelse)


def test_no_cycle():
    """CycleError names the modules of one."""
    files = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph = {name: set() for name in files}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in top_imports(ast.parse(path.read_text("utf-8")).body):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for entry in node.names:
                inside = f"{source}.{entry.name}"
                graph[name].add(inside if inside in files else source)
        graph[name].discard(name)
    assert len(graph) > 100 and graph["optimum_dern.evaluation.compare"]
    TopologicalSorter(graph).prepare()
