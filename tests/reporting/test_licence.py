"""The licence that a card inherits."""

import pytest
from huggingface_hub import constants

from optimum_dern.reporting.licence import source_licence


def write_card(folder, metadata):
    """A source's card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n", "utf-8")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: https://a.b/c",
            {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"},
        ),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", {"license": "other", "license_name": "mine"}),
        ("license: 5", {}),
        ("tags: [moe]", {}),
        ("license: [", {}),
        ("just words", {}),
    ],
)
def test_of_a_folder(tmp_path, metadata, expected):
    """What its card says, without a link to a file that will not be there; an odd card says nothing."""
    write_card(tmp_path, metadata)
    assert source_licence(str(tmp_path), None, is_hub_id=False) == expected


def test_of_a_hub_model(tmp_path, monkeypatch):
    """The card comes from the cache, of the same revision; the file that it names stays where it is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write_card(tmp_path / "models--you--moe" / "snapshots" / "abc", "license: other\nlicense_link: LICENSE")
    link = "https://huggingface.co/you/moe/blob/abc/LICENSE"
    assert source_licence("you/moe", "abc", is_hub_id=True) == {"license": "other", "license_link": link}
    assert source_licence("you/moe", "def", is_hub_id=True) == {}


def test_of_nothing(tmp_path):
    """No source, and a source without a card."""
    assert source_licence(None, None, is_hub_id=False) == {}
    assert source_licence(str(tmp_path), None, is_hub_id=False) == {}
