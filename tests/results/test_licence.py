"""The licence and the origin that a card inherits."""

import pytest
from huggingface_hub import constants
from sample_reports import sample_report

from optimum_dern.reporting.card import model_card
from optimum_dern.results.licence import source_metadata


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
        ("license: other\nlicense_link: file:///home/me/LICENSE", {"license": "other"}),
        ("license: 5", {}),
        ("tags: [moe]", {}),
        ("license: [", {}),
        ("just words", {}),
    ],
)
def test_of_a_folder(tmp_path, metadata, expected):
    """What its card says, without a link to a file that will not be there; an odd card says nothing."""
    write_card(tmp_path, metadata)
    assert source_metadata(str(tmp_path), None) == expected


def test_of_a_hub_model(tmp_path, monkeypatch):
    """The card comes from the cache, of the same revision; the file that it names stays where it is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write_card(tmp_path / "models--you--moe" / "snapshots" / "abc", "license: other\nlicense_link: LICENSE")
    link = "https://huggingface.co/you/moe/blob/abc/LICENSE"
    hub = {"base_model": ["you/moe"]}
    assert source_metadata("you/moe", "abc") == {"license": "other", "license_link": link} | hub
    assert source_metadata("you/moe", "def") == hub


def test_of_nothing(tmp_path):
    """No source, and a source without a card."""
    assert source_metadata(None, None) == {}
    assert source_metadata(str(tmp_path), None) == {}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("base_model: you/moe", ["you/moe"]),
        ("base_model:\n- you/moe\n- them/moe", ["you/moe", "them/moe"]),
        ("base_model: /home/me/moe", None),
        ("base_model: ./moe", None),
        ("base_model:\n- ../moe\n- you/moe", ["you/moe"]),
        ("base_model: moe", None),
        ("base_model: 5", None),
        ("license: mit", None),
    ],
)
def test_the_origin_of_a_folder(tmp_path, metadata, expected):
    """A folder has no id: its card's base models are the nearest that the Hub knows, and paths are none."""
    write_card(tmp_path, metadata)
    assert source_metadata(str(tmp_path), None).get("base_model") == expected


def test_the_origin_of_a_hub_model(tmp_path, monkeypatch):
    """It is the model itself, whatever it was made from, unless a folder of that name is what was meant."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path / "models--you--moe" / "snapshots" / "abc", "base_model: them/moe")
    assert source_metadata("you/moe", "abc") == {"base_model": ["you/moe"]}
    write_card(tmp_path / "you" / "moe", "base_model: us/moe")
    assert source_metadata("you/moe", None) == {"base_model": ["us/moe"]}


def test_what_was_recorded_is_on_the_card():
    """A card that is written anew, elsewhere, says what the source's card said when the model was compressed."""
    report = sample_report()
    report.source = "moe"
    report.source_card = {"license": "other", "license_name": "mine", "base_model": ["them/moe"]}
    card = model_card(report)
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "mine", ["them/moe"])
    assert "The licence of the original model applies: mine." in card.text
    assert "`moe` was compressed" in card.text and "huggingface.co/moe" not in card.text
