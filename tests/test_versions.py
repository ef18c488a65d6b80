"""What `make test-versions` says of the tests with another transformers."""

import sys

import pytest
import versions


TESTS = """
import transformers

def test_works(): pass
class TestClass:
    def test_old_name(self): assert hasattr(transformers, "old_name")
    def test_new_name(self): assert hasattr(transformers, "new_name")
    def test_always_wrong(self): assert False
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with four tests, and two folders with something that calls itself transformers."""
    (tmp_path / "test_names.py").write_text(TESTS, "utf-8")
    for release, line in (("5.1.0", "old_name = 1"), ("5.9.0", "new_name = 1"), ("5.5.0", "old_name = new_name = 1")):
        info = tmp_path / release / f"transformers-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: transformers\nVersion: {release}\n", "utf-8")
        (tmp_path / release / "transformers.py").write_text(line, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "5.5.0")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts four times as fast
    monkeypatch.setattr(versions, "version", lambda name: "5.5.0")
    return tmp_path


def test_what_differs(project, monkeypatch, capfd):
    """Failing tests of both are named, those that fail anyway are marked."""
    monkeypatch.setattr(sys, "argv", ["versions.py", "5.1.0", "5.9.0", "-q"])
    monkeypatch.setattr(versions, "newest_release", lambda: "5.9.0")
    always = "  test_names.py::TestClass::test_always_wrong (with 5.5.0, too)"
    old, new = ([f"  test_names.py::TestClass::test_{name}_name"] for name in ("old", "new"))
    expected = ["transformers 5.1.0: 2 passed, 2 failed, 0 skipped", *new, always]
    expected += ["transformers 5.9.0: 2 passed, 2 failed, 0 skipped", *old, always]
    assert versions.main() == 1
    assert capfd.readouterr().out.rsplit("\n\n", 1)[-1].splitlines() == expected


@pytest.mark.parametrize("oldest_fails", [False, True])
def test_the_oldest_alone_decides(monkeypatch, capsys, oldest_fails):
    """What fails with the newest transformers fails nothing else."""
    monkeypatch.setattr(sys, "argv", ["versions.py", "old", "new", "-q"])
    monkeypatch.setattr(versions, "newest_release", lambda: "5.9.0")
    monkeypatch.setattr(versions, "install", lambda release, folder: (release, str(folder)) == ("5.9.0", "new"))
    monkeypatch.setattr(versions, "report", lambda folder, _: ([str(folder)], str(folder) == "new" or oldest_fails))
    assert versions.main() == oldest_fails
    assert capsys.readouterr().out == "\nold\nnew\n"


@pytest.mark.parametrize(
    ("release", "said"),
    [("5.5.0", "5.5.0, the one of `make test`"), (None, "not tried, PyPI could not be asked")],
)
def test_nothing_to_try(monkeypatch, capsys, release, said):
    """The pinned release is not run twice, and a machine without network still tries the oldest."""
    monkeypatch.setattr(sys, "argv", ["versions.py", "old", "new"])
    monkeypatch.setattr(versions, "version", lambda name: "5.5.0")
    monkeypatch.setattr(versions, "newest_release", lambda: release)
    monkeypatch.setattr(versions, "report", lambda folder, _: ([str(folder)], False))
    assert versions.main() == 0
    assert capsys.readouterr().out == f"\nold\nnewest transformers: {said}\n"


def test_tests_that_cannot_start(project, capfd):
    """Files that cannot be imported and a pytest that ends early count as failures."""
    (project / "test_broken.py").write_text("import nothing_of_this_name", "utf-8")
    counts, failed = versions.run_tests(["-q", "-k", "works"])
    assert (counts["passed"], failed) == (1, ["test_broken.py"])
    assert versions.run_tests(["--no-such-option"])[1] == ["pytest ended with status 4"]
