"""Names that may be published."""

import pytest

from optimum_dern.results.public_names import public_paths, public_source


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("you/moe", "you/moe"),
        ("moe", "moe"),
        ("/home/me/models/moe", "moe"),
        ("/home/me/models/moe/", "moe"),
        ("~/models/moe", "moe"),
        ("../moe", "moe"),
        ("./moe", "moe"),
        ("models/moe/final", "final"),
    ],
)
def test_sources_that_are_not_here(given, expected):
    """A Hub id stays; of what can only be a path, the folder's name does."""
    assert public_source(given) == expected


def test_sources_that_are_here(tmp_path, monkeypatch):
    """A folder is called by its name, even where it looks like a Hub id, is the current one, or a link."""
    (tmp_path / "you" / "moe").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "you")
    monkeypatch.chdir(tmp_path)
    assert public_source("you/moe") == "moe"
    assert public_source("link") == "link"
    monkeypatch.chdir(tmp_path / "you" / "moe")
    assert public_source(".") == "moe"
    assert public_source("..") == "you"


def test_paths():
    """What leads out of the working folder is called by its last part, the rest by itself."""
    names = ["c4", "data/notes.txt", "/srv/data/code.jsonl", "../books", "~/news/"]
    assert public_paths(names) == dict(
        zip(names, ["c4", "data/notes.txt", "code.jsonl", "books", "news"], strict=True)
    )


def test_paths_of_one_name():
    """They stay apart, so that no source of a mix is lost, and their common folders stay out."""
    names = ["/srv/me/code/train.txt", "/srv/me/news/train.txt", "/train.txt", "c4"]
    expected = ["code/train.txt", "news/train.txt", "train.txt", "c4"]
    assert public_paths(names) == dict(zip(names, expected, strict=True))
    assert set(public_paths(["/srv/a.txt", "a.txt"]).values()) == {"srv/a.txt", "a.txt"}
