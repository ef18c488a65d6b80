"""Publishing on a Hub, over real HTTP: what arrives there, and what plain transformers pulls."""

import json

import pytest
import torch
from hub import LoopbackHub
from hub.card import card_problems
from hub.process import content, run


PACKAGE = {"config.json", "generation_config.json", "README.md"}
PACKAGE |= {"dern_config.json", "dern_report.json", "dern_report.html"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub to which one process has pushed in every way, and that process's folder."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        hub.add("me/card", README__md=b"written by hand", model__safetensors=b"old", notes__txt=b"mine")
        dev = hub.add("me/branch", README__md=b"main's").branches
        dev["dev"] = dev["main"][:1]
        run(hub, folder, "hub_client.py", "push", folder)
        yield hub, folder


def test_what_arrives_is_what_a_local_save_writes(pushed):
    """Byte for byte, in one commit: weights, config, card, report, tokenizer."""
    hub, folder = pushed
    (commit,) = hub.repositories["me/first"].commits()
    files = {name: data for name, data in commit.files.items() if name != ".gitattributes"}
    local = content(folder / "local")
    assert files == local
    assert files.keys() > PACKAGE | TOKENIZER
    assert sum(name.endswith(".safetensors") for name in files) > 3
    assert commit.message == "half the experts"


def test_pull_in_a_fresh_process(pushed, tmp_path):
    """By repository id, with plain transformers and this package out of reach: same logits, same text."""
    hub, folder = pushed
    result = tmp_path / "seen.pt"
    names = ["me/first", "me/instance"]
    run(hub, tmp_path, "load_plainly.py", result, *names)
    seen, expected = torch.load(result), torch.load(folder / "observed.pt")
    for name in ("first", "instance"):
        assert seen[name]["problems"] == {}
        assert seen[name]["observed"].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(seen[name]["observed"][key], value, rtol=0, atol=0)


def test_privacy(pushed):
    """`private=True` reaches the Hub; without it the account's default is left alone."""
    hub, _ = pushed
    asked = {payload["name"]: payload.get("visibility") for payload in hub.payloads}
    assert asked == {"first": "private", "instance": "private"} | dict.fromkeys(("again", "card", "request", "branch"))
    assert hub.repositories["me/first"].private and not hub.repositories["me/again"].private


def test_a_second_push_replaces_the_weights(pushed):
    """Shards and index of the first push are deleted in the commit that brings the one file."""
    hub, folder = pushed
    first, second = hub.repositories["me/again"].commits()
    assert "model.safetensors.index.json" in first.files and "model.safetensors" not in first.files
    assert {n for n in second.files if n.startswith("model")} == {"model.safetensors"}
    assert second.files["model.safetensors"] == (folder / "again" / "model.safetensors").read_bytes()


def test_the_same_again(pushed):
    """A push that changes nothing makes no commit; the URL is that of the last one."""
    hub, folder = pushed
    urls = json.loads((folder / "pushed.json").read_text())["urls"]
    assert urls["same"] == f"{hub.url}/me/again/commit/{hub.repositories['me/again'].find('main').oid}"


def test_a_commit_in_between_is_not_overwritten(pushed):
    """Every commit names the one that it was made for, so that the Hub can refuse it once there is another."""
    hub, _ = pushed
    commits = [commit for repository in hub.repositories.values() for commit in repository.commits()]
    ours = [commit for commit in commits if commit.message != "earlier"]
    assert len(ours) == 5 and all(commit.expected == commit.parent for commit in ours)


def test_a_card_on_the_hub_stays(pushed):
    """Cards are edited there; so are other files, while old weights go and the rest is new."""
    hub, _ = pushed
    (_, commit) = hub.repositories["me/card"].commits()
    assert commit.files["README.md"] == b"written by hand"
    assert commit.files["notes.txt"] == b"mine"
    assert "model.safetensors" not in commit.files
    assert commit.files.keys() > PACKAGE


def test_instance_push(pushed):
    """`model.push_to_hub` publishes config, provenance, report and our card, not transformers' own."""
    hub, folder = pushed
    (commit,) = hub.repositories["me/instance"].commits()
    assert commit.files.keys() == PACKAGE | {"model.safetensors", "calibration.jsonl", ".gitattributes"}
    for name in PACKAGE:
        assert commit.files[name] == (folder / "local" / name).read_bytes(), name


def test_branches_and_pull_requests(pushed):
    """A revision and a pull request leave the main branch alone."""
    hub, folder = pushed
    assert len(hub.repositories["me/branch"].commits("dev")) == 1
    assert hub.repositories["me/branch"].find("dev").files["README.md"] == (folder / "local/README.md").read_bytes()
    assert hub.repositories["me/branch"].find("main").files["README.md"] == b"main's"
    assert hub.repositories["me/request"].commits() == []
    assert hub.repositories["me/request"].find("refs/pr/1").files.keys() > PACKAGE


def test_urls_and_traces(pushed):
    """The commit's or the pull request's URL comes back; no temporary folder stays; the client says who it is."""
    hub, folder = pushed
    done = json.loads((folder / "pushed.json").read_text())
    assert done["left"] == []
    first = hub.repositories["me/first"].find("main")
    assert done["urls"]["first"] == f"{hub.url}/me/first/commit/{first.oid}"
    assert done["urls"]["request"] == f"{hub.url}/me/request/discussions/1"
    commits = [agent for stage, _, agent in hub.requests if stage == "commit"]
    assert any(stage == "validate" for stage, _, _ in hub.requests)  # the card's metadata, refused if invalid
    assert len(commits) == 7 and all("optimum-dern/" in agent for agent in commits)


@pytest.mark.slow
def test_the_example(tmp_path):
    """It runs as it stands: a private repository with the half of the experts, and its URL on the last line."""
    with LoopbackHub() as hub:
        printed = run(hub, tmp_path, "../examples/push_to_hub.py", "me/upcycled-DERN-4").split()
        repository = hub.repositories["me/upcycled-DERN-4"]
        (commit,) = repository.commits()
        assert repository.private
        assert printed[-1] == f"{hub.url}/me/upcycled-DERN-4/commit/{commit.oid}"
        assert commit.files.keys() > PACKAGE | TOKENIZER
        assert json.loads(commit.files["config.json"])["num_local_experts"] == 4
        assert card_problems(commit.files["README.md"].decode()) == []
