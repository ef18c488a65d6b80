"""A push that is refused or breaks off: what the error says, and that no finished checkpoint is lost."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub import BROKEN, CUT, GARBLED, READER, WRITER, LoopbackHub
from hub.process import content, run

from optimum_dern.checkpoint.hub.errors import explained
from optimum_dern.checkpoint.hub.push import HubPushError, push_checkpoint


STAGES = {  # where a push can be refused -> whether the checkpoint is there by then
    "create": False,
    "auth": False,
    "info": False,
    "preupload": True,
    "batch": True,
    "put": True,
    "verify": True,
    "commit": True,
}
REFUSALS = [(stage, status) for stage in STAGES for status in (401, 403, 404, 409, 500, BROKEN)]
REFUSALS += [(stage, status) for stage in ("put", "commit") for status in (412, 429)]
REFUSALS += [(stage, CUT) for stage in ("info", "preupload", "commit")] + [("batch", GARBLED), ("commit", GARBLED)]
REFUSALS.remove(("create", 409))  # it says that the repository is there, which is welcome
UNANSWERED = {BROKEN: "broken", CUT: "cut", GARBLED: "garbled"}
MENDS = {
    401: "hf auth login",
    403: "write access",
    404: "check the names",
    409: "push again",
    412: "push again",
    429: "wait some minutes",
    500: "try again later",
    **dict.fromkeys(UNANSWERED, "check the connection"),
}
SOURCE = {"model.safetensors": b"w" * 10_000, "config.json": b"{}", "README.md": b"---\ntags: [moe]\n---\nnew\n"}


def name_of(stage, status):
    """The repository that fails like that."""
    return f"me/{stage}-{UNANSWERED.get(status, status)}"


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A Hub that refuses at every stage, and what a process that pushed a finished checkpoint got."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "source").mkdir()
    for name, data in SOURCE.items():
        (folder / "source" / name).write_bytes(data)
    cases = [[name_of(stage, status), {}] for stage, status in REFUSALS]
    with LoopbackHub() as hub:
        hub.failures = {name_of(*case): case for case in REFUSALS}
        hub.failures["me/there"] = ("create", 403)  # a token that may write but not create
        hub.add("me/there")
        (folder / "mine").mkdir()
        (folder / "mine" / "secret.txt").write_bytes(b"not to be published")
        hub.add("me/public", README__md=b"x")
        hub.add("them/theirs")
        hub.add("me/suggested")
        old = hub.add("me/weights", README__md=b"by hand", notes__txt=b"mine").find("main").files
        old["model-00001-of-00001.safetensors"] = old["model.safetensors.index.json"] = b"old"
        hub.failures["me/weights"] = ("commit", 500)
        cases += [
            ["me/there", {}],
            ["me/mine", {"folder": str(folder / "mine")}],
            ["me/public", {"private": True}],
            ["them/theirs", {}],
            ["them/new", {}],
            ["me/reader", {"token": READER}],
            ["me/wrong", {"token": "hf_wrong"}],
            ["me/norevision", {"revision": "nowhere"}],
            ["me/weights", {}],
            ["me/unsaved", {"broken_save": True}],
            ["me/suggested", {"token": READER, "create_pr": True}],
            ["short", {}],
        ]
        lines = "".join(json.dumps(case) + "\n" for case in cases)
        results = json.loads(run(hub, folder, "hub_client.py", "refusals", folder, stdin=lines))
        yield hub, folder, results


@pytest.mark.parametrize(("stage", "status"), REFUSALS)
def test_refusals(refused, stage, status):
    """Each says what happened and what to do, and never costs a finished checkpoint."""
    hub, _, results = refused
    result, name = results[name_of(stage, status)], name_of(stage, status)
    assert result["status"] == (None if status in UNANSWERED else status)
    assert f"could not push to {name}" in result["message"] and MENDS[status] in result["message"]
    if status not in UNANSWERED:
        assert f"HTTP {status}: {stage} fails on demand" in result["message"]
    if STAGES[stage]:
        assert content(Path(result["folder"])) == SOURCE
        assert shlex.join(["hf", "upload", name, result["folder"], "."]) in result["message"]
    else:
        assert result["folder"] is None and "nothing was saved or uploaded" in result["message"]
    made = [] if name not in hub.repositories else hub.repositories[name].commits()
    if stage == "commit" and status in (CUT, GARBLED):  # made before the answer was lost; once more does no harm
        assert [commit.files for commit in made] == [SOURCE | {".gitattributes": b""}]
    else:
        assert made == []


def test_only_what_is_whole_is_left(refused):
    """Temporary folders stay where a finished checkpoint was refused, and nowhere else."""
    _, _, results = refused
    left = results["left"]
    named = [result["folder"] for name, result in results.items() if name != "left" and result.get("folder")]
    assert sorted(name for name in named if "/optimum-dern-" in name) == left
    assert len(left) == sum(STAGES[stage] for stage, _ in REFUSALS) + 1


def test_what_a_token_may_not_do(refused):
    """Another's repository, a token that only reads, a wrong token: refused before anything is saved."""
    _, _, results = refused
    expected = {"them/theirs": 403, "them/new": 403, "me/reader": 403, "me/wrong": 401, "me/norevision": 404}
    for name, status in expected.items():
        assert (results[name]["status"], results[name]["folder"]) == (status, None), results[name]
        assert MENDS[status] in results[name]["message"]


def test_a_repository_that_cannot_be_made_but_is_there(refused):
    """A token that may write, but not create, can push to what exists."""
    hub, _, results = refused
    (commit,) = hub.repositories["me/there"].commits()
    assert results["me/there"]["url"].endswith(commit.oid)
    assert commit.files == SOURCE | {".gitattributes": b""}


def test_private_is_never_published(refused):
    """`private=True` for a repository that is public already is refused, with nothing sent."""
    hub, _, results = refused
    assert "is public" in results["me/public"]["message"]
    assert "nothing was saved or uploaded" in results["me/public"]["message"]
    assert [stage for stage, name, _ in hub.requests if name == "me/public"] == ["create", "auth", "info"]


def test_a_name_without_a_namespace(refused):
    """It becomes the token owner's."""
    hub, _, results = refused
    assert results["short"]["url"].startswith(f"{hub.url}/me/short/commit/")
    assert hub.repositories["me/short"].commits()[0].files.items() >= SOURCE.items()


def test_only_what_was_saved_is_sent(refused):
    """What else lies in a folder that the user gave is not published, and stays."""
    hub, folder, results = refused
    (commit,) = hub.repositories["me/mine"].commits()
    assert results["me/mine"]["url"].endswith(commit.oid)
    assert commit.files == SOURCE | {".gitattributes": b""}
    assert content(folder / "mine") == SOURCE | {"secret.txt": b"not to be published"}


def test_a_save_that_fails(refused):
    """Its own error comes through, and nothing is sent; that no folder is left is tested above."""
    hub, _, results = refused
    assert results["me/unsaved"]["other"] == "OSError: no space left on device"
    assert hub.repositories["me/unsaved"].commits() == []


def test_a_pull_request_needs_no_write_permission(refused):
    """A token that only reads can suggest a change."""
    hub, _, results = refused
    assert results["me/suggested"]["url"] == f"{hub.url}/me/suggested/discussions/1"
    assert hub.repositories["me/suggested"].commits() == []


@pytest.mark.parametrize("name", ["me/commit-500", "me/commit-cut", "me/weights"])
def test_the_command_of_the_message(refused, name, tmp_path):
    """Run as it stands once the Hub is well again, it does what the push would have done."""
    hub, _, results = refused
    command = re.search(r"upload it with: hf (.*)$", results[name]["message"])[1]
    hub.failures.pop(name)
    run(hub, tmp_path, "hf", *shlex.split(command))
    files = hub.repositories[name].find("main").files
    if name == "me/weights":  # what stood there: a card, which stays, and weights, which go
        assert files == SOURCE | {"README.md": b"by hand", "notes.txt": b"mine"}
    else:
        assert files == SOURCE | {".gitattributes": b""}
        assert len(hub.repositories[name].commits()) == 1  # also where only the answer had been lost


def test_an_interrupt(tmp_path, caplog):
    """Whoever interrupts an upload is told where the checkpoint is."""
    with pytest.raises(KeyboardInterrupt), explained(SimpleNamespace(endpoint=""), "me/a", tmp_path, []):
        raise KeyboardInterrupt
    assert f"hf upload me/a {tmp_path} ." in caplog.text


def never(folder):
    """A save that must not be called."""
    raise AssertionError("saved before the check")


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "me/", "my model", "me/a--b", "me/a.git", None, Path("me/a")])
def test_no_repository_id(repo_id):
    """Refused before anything, with what is allowed."""
    with pytest.raises(ValueError, match="namespace/name"):
        push_checkpoint(never, repo_id)


def test_arguments_that_cannot_work(tmp_path):
    """A pull request against another branch, and a file in the folder's place."""
    with pytest.raises(ValueError, match="create_pr"):
        push_checkpoint(never, "me/a", create_pr=True, revision="dev")
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ValueError, match="is a file"):
        push_checkpoint(never, "me/a", folder=tmp_path / "file")


def test_offline(tmp_path):
    """With the Hub switched off, as in these tests, the push ends before the save, and says so."""
    with pytest.raises(HubPushError, match="offline mode") as caught:
        push_checkpoint(never, "me/a", token=WRITER)
    assert (caught.value.status, caught.value.folder) == (None, None)
