"""A Hub that fails in the middle of a download: what the error says, and that the same command then gets it all."""

import hashlib
import json

import pytest
from hub import BROKEN, CUT, GARBLED, LoopbackHub
from hub.process import content, run
from hub.repository import Commit
from hub_download import compress
from tiny import make_model, tiny_tokenizer


SHARD = "model-00003-of-00005.safetensors"
AGAIN = "the same command again"
FAULTS = {  # name -> stage, status and file; what the message must say
    **{f"HTTP {status}": (("resolve", status, SHARD), (f"HTTP {status}", AGAIN)) for status in (409, 412, 429, 500)},
    **{f"HTTP {status}": (("resolve", status, SHARD), (f"HTTP {status}", "hf auth login")) for status in (401, 403)},
    "HTTP 404": (("resolve", 404, SHARD), ("HTTP 404", AGAIN)),
    "no answer": (("resolve", BROKEN, SHARD), ("check the connection", AGAIN)),
    "cut": (("resolve", CUT, SHARD), ("check the connection", AGAIN)),
    "garbled": (("resolve", GARBLED, SHARD), (f"{SHARD} has arrived damaged", AGAIN)),
    "garbled index": (("resolve", GARBLED, "model.safetensors.index.json"), ("index.json has arrived damaged", AGAIN)),
    "garbled config": (("resolve", GARBLED, "config.json"), ("config.json has arrived damaged", AGAIN)),
    "garbled list of files": (("info", GARBLED), ("check the connection", AGAIN)),
}


QUICK = ("HTTP 429", "cut", "garbled", "garbled config")
SLOW = tuple(name for name in FAULTS if name not in QUICK)


@pytest.fixture(scope="module")
def downloaded(request, tmp_path_factory):
    """The folder of results, and what came of each download of this session while the Hub failed and after it."""
    folder = tmp_path_factory.mktemp("faults")
    items = [item for item in request.session.items if item.module is request.module]
    names = [item.callspec.params["name"] for item in items if hasattr(item, "callspec")] or QUICK
    make_model("qwen3_moe").save_pretrained(folder / "model", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder / "model")
    ids = {name: f"me/{name.replace(' ', '-')}" for name in names}
    jobs = "".join(json.dumps([name, ids[name], {}]) + "\n" for name in names)
    with LoopbackHub() as hub:
        for name in names:
            repository = hub.add(ids[name])
            repository.branches["main"].append(Commit("files", content(folder / "model"), []))
        hub.failures = {ids[name]: FAULTS[name][0] for name in names}
        failed = json.loads(run(hub, folder, "hub_download.py", folder / "failed", stdin=jobs))
        cached = {file: file.read_bytes() for file in (folder / "home" / "hub").glob("*/blobs/*")}
        hub.failures.clear()
        then = json.loads(run(hub, folder, "hub_download.py", folder / "then", stdin=jobs))
    compress(folder / "model", folder / "local")
    return folder, failed, cached, then


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_download_that_fails(downloaded, name):
    """One error that says what to do, and nothing written; afterwards the result of the model as it was published."""
    folder, failed, _, then = downloaded
    assert [part for part in FAULTS[name][1] if part not in failed[name]["error"]] == [], failed[name]["error"]
    assert not failed[name]["written"]
    assert "error" not in then[name]
    found, expected = (content(path) for path in (folder / "then" / name, folder / "local"))
    assert found.keys() == expected.keys() and sum(file.endswith(".safetensors") for file in found) > 1
    for file in found:
        if file.endswith((".safetensors", "tokenizer.json", "dern_manifest.json")):
            assert found[file] == expected[file]


def test_what_is_in_the_cache_is_whole(downloaded):
    """What has arrived damaged or in part has no final name."""
    _, failed, cached, _ = downloaded
    whole = {file: data for file, data in cached.items() if file.suffix != ".incomplete"}
    assert len(whole) > len(failed)
    assert [file for file, data in whole.items() if hashlib.sha256(data).hexdigest() != file.name] == []
