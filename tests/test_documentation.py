"""What the documentation, the examples and the benchmarks name exists: modules, functions, files, sections."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import optimum_dern


ROOT = Path(__file__).parent.parent
PACKAGE = Path(optimum_dern.__file__).parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
SCRIPTS = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
ROOMS = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/*.py") if path.stem != "__init__"}
IMPORT = re.compile(r"from (optimum_dern[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))")
ROOTS = "|".join({room.split("/")[0] for room in ROOMS})
DOTTED = re.compile(rf"`(?:optimum_dern\.)?((?:{ROOTS})(?:\.\w+)+)`")
FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")


def is_there(dotted):
    """Whether a dotted name is a module of the package, or something inside one."""
    try:
        resolve_name(f"optimum_dern.{dotted}")
    except (ImportError, AttributeError):
        return False
    return True


def missing_imports(text):
    """Names that a text imports from the package, and that are not there."""
    for module, many, some in IMPORT.findall(text):
        inside = f"{module}.".removeprefix("optimum_dern.")
        yield from (f"{inside}{name}" for name in re.findall(r"\w+", many or some) if not is_there(f"{inside}{name}"))


def missing_names(text):
    """Modules, functions and files between backticks that are not there."""
    yield from (name for name in DOTTED.findall(text) if not is_there(name))
    for name, function in FILE.findall(text):
        texts = [(folder / name).read_text("utf-8") for folder in (ROOT, PACKAGE) if (folder / name).is_file()]
        if not texts or (function and not re.search(rf"^(?:def|class) {function}\b", texts[0], re.MULTILINE)):
            yield f"{name}::{function}".removesuffix("::")


def missing_links(text, page):
    """Links to files, and to sections of them, that are not there."""
    for name, section in LINK.findall(text):
        target = page.parent / name if name else page
        titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE) if target.suffix == ".md" else []
        if not target.exists() or (section and section not in map(anchor, titles)):
            yield f"{name}#{section}".removesuffix("#")


def anchor(title):
    """What GitHub calls a section."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_exist(path):
    """No page or script speaks of a module, function, file or section that has moved."""
    text = path.read_text("utf-8")
    missing = [*missing_imports(text), *missing_names(text)]
    assert missing + ([*missing_links(text, path)] if path.suffix == ".md" else []) == []


def test_pages_are_listed():
    """The table of contents has every page once, and no others."""
    listed = re.findall(r"- local: (\w+)", (ROOT / "docs" / "source" / "_toctree.yml").read_text("utf-8"))
    assert sorted(listed) == sorted(page.stem for page in (ROOT / "docs" / "source").glob("*.md"))


def test_the_tree_has_every_room():
    """CONTRIBUTING draws the package as it is."""
    tree = re.search(r"```text\noptimum_dern/\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    assert set(re.findall(r"^  ([\w/]+)/ ", tree[1], re.MULTILINE)) == ROOMS


def test_the_check_finds_faults(tmp_path):
    """So that a page which passes means something."""
    assert [*missing_imports("from optimum_dern.config import (\n    DernConfig,\n    Gone,\n)")] == ["config.Gone"]
    assert [*missing_imports("from optimum_dern.gone import this\nfrom optimum_dern import DernConfig")] == [
        "gone.this"
    ]
    text = "`engine.gone.do`, `engine.layer`, `core.layer.segments.Segments`, `optimum_dern/gone.py`, `config.py`"
    assert [*missing_names(text)] == ["engine.gone.do", "optimum_dern/gone.py"]
    assert [*missing_names("`models/moe/view.py::gone`, `models/moe/view.py::write_layer_`")] == [
        "models/moe/view.py::gone"
    ]
    page = tmp_path / "page.md"
    page.write_text("# A title, and more\n", "utf-8")
    assert [*missing_links("[a](#a-title-and-more) [b](page.md#b)", page)] == ["page.md#b"]
