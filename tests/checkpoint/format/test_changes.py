"""Files of a checkpoint that change while it is read: noticed whatever happens to them, and named."""

import os

import pytest

from optimum_dern.checkpoint.format.changes import FileStamps, unchanged


@pytest.fixture
def folder(tmp_path):
    """A folder with the files whose changes count, and one that is none of them."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "vocab.txt").write_text("a", "utf-8")
    return tmp_path


def rewrite(file):
    """Write other content of the same size, an hour later."""
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 3600))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (rewrite, "changed"),
        (lambda file: file.write_bytes(b"1"), "changed"),
        (lambda file: file.unlink(), "removed"),
    ],
)
def test_changes_are_named(folder, name, change, word):
    says = f"{name} was {word} during the run; put the earlier file back and give the same command again"
    with pytest.raises(ValueError, match=says), unchanged(folder):
        change(folder / name)


def test_what_a_library_says_of_it(folder):
    """The change explains an error that comes of it; other errors stay what they are."""
    with pytest.raises(ValueError, match="was removed") as caught, unchanged(folder):
        (folder / "model.safetensors").unlink()
        raise KeyError("weight")
    assert isinstance(caught.value.__context__, KeyError)
    (folder / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(KeyError, match="weight"), unchanged(folder):
        raise KeyError("weight")


def test_nothing_has_changed(folder):
    """Reading changes nothing, and other files do not count."""
    with unchanged(folder, folder):
        (folder / "model.safetensors").read_bytes()
        (folder / "vocab.txt").write_text("other words", "utf-8")


def test_one_file(folder):
    """Of several files, the one that is asked for."""
    paths = [folder / name for name in ("config.json", "model.safetensors")]
    stamps = FileStamps(paths)
    rewrite(paths[1])
    stamps.check_file(paths[0])
    with pytest.raises(ValueError, match="model.safetensors was changed"):
        stamps.check()
