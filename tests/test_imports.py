"""The package's rooms: imports run one way, from what is used to what uses it, and no room is crowded."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import optimum_dern


ROOT = Path(optimum_dern.__file__).parent
# From the bottom up: a room may import from itself and from those before it, wherever the import stands.
ORDER = """
    versions errors paths text_files installation checks
    core.layer core.neurons core.router core.criteria core.pictures core.dern core.refits core.merging
    machine results models.moe models data data.made methods options config reporting
    checkpoint.format checkpoint.source checkpoint.hub checkpoint.output
    engine.measure engine.layer engine.walk condensing engine.cost engine.run condensing.run compressor
    evaluation.loss evaluation.agreement evaluation.tasks evaluation.compare integration
    search patterns attribution model_merging
    commands.shared commands.look commands __main__
""".split()
MOST = 10  # modules in a room


def modules() -> dict[str, Path]:
    """Files of the package by their dotted name inside it."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def room_of(module: str) -> str:
    """The room that a module is in."""
    return max((room for room in ORDER if f"{module}.".startswith(f"{room}.")), key=len, default="")


def imports(path: Path, package: str, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports, but for those that only its reader needs."""
    tree = ast.parse(path.read_text("utf-8"))
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in checked for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            source = resolve_name("." * node.level + (node.module or ""), package)
            for entry in node.names:
                inside = f"{source}.{entry.name}".removeprefix("optimum_dern.")
                yield inside if inside in known else source.removeprefix("optimum_dern").removeprefix(".")


def test_imports_run_one_way():
    """Nothing imports from a room above its own, not even inside a function."""
    files, seen = modules(), 0
    for module, path in files.items():
        package = f"optimum_dern.{module}".rpartition(".")[0]
        module = module.removesuffix("__init__").removesuffix(".") if path.name == "__init__.py" else module
        if not module:  # names what is public
            continue
        for target in imports(path, package, set(files)):
            seen += 1
            assert ORDER.index(room_of(target)) <= ORDER.index(room_of(module)), f"{module} imports {target}"
    assert seen > 300


def test_every_module_has_a_room():
    """And no room has more modules than one can take in at a glance."""
    rooms = [path.parent for name, path in modules().items() if path.name != "__init__.py"]
    for name, path in modules().items():
        assert path.name == "__init__.py" or room_of(name), name
    assert max(map(rooms.count, set(rooms))) <= MOST
