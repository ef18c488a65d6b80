"""What the documentation, the examples and the package itself say about installing it is one and the same."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sample_reports import sample_report

from optimum_dern import installation
from optimum_dern.installation import install_command, install_hint, project_link
from optimum_dern.reporting.card import model_card


ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"""pip install (?:--?\S+ )*(["']?)(?:\.|optimum-dern)(?:\[[\w,-]+\])?\1(?![\w./=-])""")
EXTRAS = ("eval", "heal", "report")
README, QUICKTOUR = ROOT / "README.md", ROOT / "docs" / "source" / "quicktour.md"
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
PACKAGE = [
    path
    for path in (ROOT / "optimum_dern").rglob("*")
    if path.suffix in (".py", ".md", ".js", ".html") and path.name != "installation.py"
]


def contradictions(text):
    """What a text says about installing that is not so."""
    right = {install_command(), *map(install_command, EXTRAS)}
    wrong = [match[0] for match in COMMAND.finditer(text) if match[0] not in right]
    published = project_link() != "optimum-dern"
    wrong += [] if published else re.findall("pypi.org/project/optimum-dern", text)
    return wrong + (re.findall("not on PyPI", text) if published else [])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_contradicts(path):
    """Every command that installs the package is the one that works."""
    assert contradictions(path.read_text("utf-8")) == []


def test_the_package_has_no_words_of_its_own():
    """Cards, pages, help and errors take theirs from the one place."""
    assert {path.name: found for path in PACKAGE if (found := COMMAND.findall(path.read_text("utf-8")))} == {}
    assert [path.name for path in PACKAGE if "pypi.org" in path.read_text("utf-8")] == []


@pytest.mark.parametrize("path", [README, QUICKTOUR], ids=lambda path: path.name)
def test_the_command_is_there(path):
    """In a block of its own, for a reader who only looks for that."""
    assert f"```bash\n{install_command()}\n```" in path.read_text("utf-8")


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_explained(extra):
    """Each one's sentence is somewhere in the documentation, and it is one that the package has."""
    assert any(install_hint(extra) in " ".join(path.read_text("utf-8").split()) for path in TEXTS)
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


def test_the_card():
    """A published card says what works, and links to nothing that is not there."""
    text = str(model_card(sample_report()))
    assert f"optimum-dern is installed with {install_hint()}." in text
    assert contradictions(text) == []


def test_the_day_of_publishing(monkeypatch):
    """One constant changes commands, cards and links; what the documentation then has to say is named."""
    monkeypatch.setattr(installation, "DISTRIBUTION", "optimum-dern")
    assert install_command() == install_hint().strip("`") == "pip install optimum-dern"
    assert install_command("eval") == "pip install 'optimum-dern[eval]'"
    text = str(ModelCard(str(model_card(sample_report()))).text)
    assert "[optimum-dern](https://pypi.org/project/optimum-dern)" in text and "in a clone" not in text
    assert contradictions(text) == []
    assert contradictions(README.read_text("utf-8")) == ["pip install .", "not on PyPI"]


def test_the_check_finds_faults():
    """So that a text which passes means something."""
    for wrong in ("pip install optimum-dern", "pip install 'optimum-dern[eval]'", 'pip install -U ".[eval]"'):
        assert contradictions(f"run `{wrong}`, then") == [wrong]
    assert contradictions("see https://pypi.org/project/optimum-dern") == ["pypi.org/project/optimum-dern"]
    for right in ("pip install .", "pip install '.[heal]'", "pip install ./optimum_dern-0.1.0-py3-none-any.whl"):
        assert contradictions(f"run `{right}`, then") == []
