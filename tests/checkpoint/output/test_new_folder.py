"""Folders of results: nothing of others is removed, nothing half-written is seen, what fails leaves nothing."""

import errno
import os
from pathlib import Path

import pytest

from optimum_dern.checkpoint.output import new_folder as new_folder_module
from optimum_dern.checkpoint.output.new_folder import check_new, check_no_part, folder_to_fill, new_folder


def write(folder: Path, text: str) -> Path:
    """Write a folder with one file."""
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    """All names in a folder, hidden ones too."""
    return sorted(file.name for file in folder.iterdir())


def test_a_name_at_the_end(tmp_path):
    """Until the context is left the folder lies beside its name, which is made with the folders above it."""
    output = tmp_path / "above" / "out"
    with new_folder(output) as part:
        (part / "file").write_text("new")
        assert not output.exists() and part.name == "out.partial"
    assert names(tmp_path / "above") == ["out"] and names(output) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_an_error(tmp_path, error, replace):
    """Nothing of it stays, and what was there does."""
    if replace:
        write(tmp_path / "out", "earlier")
    with pytest.raises(error), new_folder(tmp_path / "out", replace) as part:
        (part / "file").write_text("new")
        raise error
    assert names(tmp_path) == ["out"] * replace
    assert not replace or (tmp_path / "out" / "file").read_text() == "earlier"


def test_replaced(tmp_path):
    """The earlier folder goes with all of its files, once the new one is whole."""
    (write(tmp_path / "out", "earlier") / "other").write_text("earlier")
    with new_folder(tmp_path / "out", replace=True) as part:
        (part / "file").write_text("new")
        assert names(tmp_path / "out") == ["file", "other"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"] and (tmp_path / "out" / "file").read_text() == "new"


def test_replacing_fails(tmp_path, monkeypatch):
    """The earlier folder has its name again where the new one cannot take it."""
    write(tmp_path / "out", "earlier")
    replace = Path.replace

    def refuse(path, target):
        if path.name == "out.partial":
            raise PermissionError("not this one")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match="not this one"), new_folder(tmp_path / "out", replace=True) as part:
        (part / "file").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "earlier"


def test_what_appears_meanwhile_stays(tmp_path):
    """A folder that somebody has made under the final name is not replaced unless that was asked for."""
    with pytest.raises(OSError), new_folder(tmp_path / "out"):
        write(tmp_path / "out", "theirs")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "theirs"


@pytest.mark.parametrize("replace", [False, True])
def test_a_part_that_is_there(tmp_path, replace):
    """It may be of a run that goes on, or somebody's own: it stays."""
    write(tmp_path / "out.partial", "theirs")
    with pytest.raises(FileExistsError, match="out.partial exists, .*; remove it if none runs"):
        check_no_part(tmp_path / "out")
    with pytest.raises(FileExistsError, match="remove it if none runs"), new_folder(tmp_path / "out", replace):
        raise AssertionError("the folder was opened")
    assert names(tmp_path) == ["out.partial"] and (tmp_path / "out.partial" / "file").read_text() == "theirs"


def test_new(tmp_path):
    """Neither the output nor a part of it may be there."""
    check_new(tmp_path / "out")
    write(tmp_path / "out", "theirs")
    with pytest.raises(FileExistsError, match="out exists; give a new folder"):
        check_new(tmp_path / "out")


def test_folders_that_are_filled(tmp_path):
    """They are made before the work; what others have in them stays."""
    for _ in range(2):
        with folder_to_fill(tmp_path / "above" / "out"):
            (tmp_path / "above" / "out" / "file").write_text("new")
    assert names(tmp_path / "above" / "out") == ["file"]


@pytest.mark.parametrize("there", [[], ["above"], ["above", "above/out"], ["above", "above/out", "above/out/notes"]])
def test_work_that_fails(tmp_path, there):
    """Only what was made for it goes again."""
    for name in there:
        (tmp_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt), folder_to_fill(tmp_path / "above" / "out"):
        raise KeyboardInterrupt
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == there


def test_work_that_leaves_something(tmp_path):
    """A folder with files stays."""
    with pytest.raises(KeyboardInterrupt), folder_to_fill(tmp_path / "out"):
        (tmp_path / "out" / "file").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path / "out") == ["file"]


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    """It is said before the work, with the folder's name; a file is no folder."""
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(ValueError, match="file is a file; give a folder"), folder_to_fill(tmp_path / "file"):
        raise AssertionError("the work has begun")

    def refuse(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(new_folder_module, "TemporaryFile", refuse)
    with pytest.raises(OSError) as caught, folder_to_fill(tmp_path / "out"):
        raise AssertionError("the work has begun")
    assert caught.value.filename == str(tmp_path / "out") and names(tmp_path) == ["file"]
