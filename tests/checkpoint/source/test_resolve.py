"""Models compressed by their Hub ids, over real HTTP: what is asked for, what comes of it, and what is refused."""

import json
import sys
from pathlib import Path

import forked
import pytest
from hub import BROKEN, WRITER, LoopbackHub
from hub.endpoints import Handler
from hub.process import TESTS, content
from hub.protocol import Refusal
from hub.repository import Commit
from hub_download import compress
from tiny import make_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_dern.checkpoint.source.resolve import resolve_checkpoint


COMPANIONS = {
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"do what you like",
    "modeling_own.py": b"x = 1\n",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
CLUTTER = {  # other copies of the weights, and what has nothing to do with them
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "model.gguf": b"x",
    "model.onnx": b"x",
    "original/consolidated.00.pth": b"x",
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    ".gitattributes": b"",
}
JOBS = {  # name of the job -> model and options
    "model": ("me/model", {}),
    "branch": ("me/single", {"revision": "dev"}),
    "token": ("me/private", {"token": WRITER}),
    "both": ("me/both", {}),
    "no dtype": ("me/untyped", {}),
    "subfolder": ("me/nested", {"subfolder": "inner"}),
    "other subfolder": ("me/empty", {"subfolder": "outer"}),
    "not here": ("me/gguf", {"local_files_only": True, "cache_dir": "no such folder"}),
    "unknown": ("me/nothing", {}),
    "no token": ("me/hidden", {}),
    "wrong token": ("me/refused", {"token": "hf_wrong"}),
    "revision": ("me/model", {"revision": "nowhere"}),
    "gated": ("me/gated", {}),
    "pickled": ("me/pickled", {}),
    "gguf": ("me/gguf", {}),
    "adapter": ("me/adapter", {}),
    "no config": ("me/empty", {}),
    "shard": ("me/lacking", {}),
    "quantised": ("me/gptq", {}),
    "dense": ("me/dense", {}),
    "server": ("me/down", {}),
    "broken": ("me/broken", {}),
}
ERRORS = {  # job -> error, and what its message must say
    "unknown": ("FileNotFoundError", "'me/nothing' is neither a local folder nor a model", "hf auth login"),
    "no token": ("PermissionError", "HTTP 401", "hf auth login"),
    "wrong token": ("PermissionError", "HTTP 403", "hf auth login"),
    "revision": ("FileNotFoundError", "no revision 'nowhere'", "branches, tags or commits"),
    "gated": ("PermissionError", "me/gated is gated", "/me/gated", "hf auth login"),
    "pickled": ("FileNotFoundError", "pickled", "from_pretrained('me/pickled'", ".save_pretrained(NEW_FOLDER)"),
    "gguf": ("FileNotFoundError", "neither model.safetensors nor model.safetensors.index.json"),
    "other subfolder": ("FileNotFoundError", "me/empty, subfolder 'outer', has no config.json"),
    "not here": ("OSError", "could not download me/gguf", "local_files_only"),
    "adapter": ("FileNotFoundError", "me/adapter is an adapter of me/base", "merge_and_unload()"),
    "no config": ("FileNotFoundError", "me/empty has no config.json"),
    "shard": ("FileNotFoundError", "lacks 1 of its"),
    "quantised": ("ValueError", "quantised (gptq)", "unquantised checkpoint"),
    "dense": ("ValueError", "no Mixture-of-Experts layer"),
    "server": ("OSError", "could not download me/down", "HTTP 500", "same command again"),
    "broken": ("OSError", "could not download me/broken", "check the connection"),
}


def add(hub, repo_id, files, private=False):
    """A repository with one commit."""
    repository = hub.add(repo_id, private)
    repository.branches["main"].append(Commit("files", files, [], repository.find("main").oid))
    return repository


def fill(hub, folder):
    """The repositories that `JOBS` are about; those that work lie in FOLDER too."""
    make_model("qwen3_moe").save_pretrained(folder / "model", max_shard_size="60KB")
    make_model("qwen3_moe", seed=1).save_pretrained(folder / "single")
    for name in ("model", "single"):
        tiny_tokenizer().save_pretrained(folder / name)
    for name, data in COMPANIONS.items():
        path = folder / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    make_model("qwen3_moe").bfloat16().save_pretrained(folder / "untyped", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder / "untyped")
    config = json.loads((folder / "untyped" / "config.json").read_text("utf-8"))
    del config["dtype"]
    (folder / "untyped" / "config.json").write_text(json.dumps(config), "utf-8")
    add(hub, "me/untyped", content(folder / "untyped"))
    model, single = content(folder / "model"), content(folder / "single")
    add(hub, "me/model", CLUTTER | model)
    add(hub, "me/nested", single | {f"inner/{name}": data for name, data in (CLUTTER | model).items()})
    branches = add(hub, "me/single", {"config.json": b"{}"}).branches
    branches["dev"] = [*branches["main"], Commit("dev", single, [], branches["main"][-1].oid)]
    add(hub, "me/private", single, private=True)
    add(hub, "me/hidden", single, private=True)
    rest = {name: data for name, data in single.items() if name != "model.safetensors"}
    add(hub, "me/pickled", rest | {"pytorch_model.bin": b"x"})
    add(hub, "me/gguf", rest | {"model.gguf": b"x"})
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "me/base"}', "adapter_model.safetensors": b"x"}
    add(hub, "me/adapter", adapter)
    add(hub, "me/empty", {"model.safetensors": single["model.safetensors"]})
    shard = min(name for name in model if name.endswith(".safetensors"))
    add(hub, "me/lacking", {name: data for name, data in model.items() if name != shard})
    config = json.loads(single["config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    add(hub, "me/gptq", single | {"config.json": json.dumps(config).encode()})
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder / "dense")
    add(hub, "me/dense", content(folder / "dense"))
    shards = {name: data for name, data in model.items() if name.startswith("model-") or name.endswith("index.json")}
    add(hub, "me/both", shards | single)  # the first upload was in shards, and nobody has deleted them
    for name in ("gated", "refused", "down", "broken"):
        add(hub, f"me/{name}", single)
    hub.failures = {"me/refused": ("info", 403), "me/down": ("info", 500), "me/broken": ("info", BROKEN)}


def run(hub, folder, name, jobs, token=None, **variables):
    """Run jobs in a new process, their results in FOLDER/NAME; what came of each comes back."""
    lines = "".join(json.dumps([job, *JOBS[job]]) + "\n" for job in jobs)
    environment = hub.environment(folder / "home", token) | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(TESTS / "hub_download.py"), str(folder / name)]
    done = forked.run(command, env=environment, input=lines, capture_output=True, text=True, imported="torch")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """A Hub, the folder of all files, what came of each job, and which files were asked for."""
    folder, asked, serve = tmp_path_factory.mktemp("resolve"), [], Handler._resolve

    def resolve(self):
        asked.append((self.command, self.id, self.found["path"]))
        if self.id == "me/gated":
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        serve(self)

    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        patch.setattr(Handler, "_resolve", resolve)
        fill(hub, folder)
        results = run(hub, folder, "online", JOBS)
        yield hub, folder, results, asked


def same_result(first, second):
    """Whether two compressed checkpoints are equal but for where they came from and how long they took."""
    skipped = ("README.md", "dern_report.json", "dern_report.html", "dern_config.json")
    files = [{name: data for name, data in content(f).items() if name not in skipped} for f in (first, second)]
    assert "tokenizer.json" in files[0] and any(name.endswith(".safetensors") for name in files[0])
    return files[0] == files[1]


def test_as_from_the_folder(downloaded, tmp_path):
    """A Hub id gives what the folder with the same files gives; the report names the commit."""
    hub, folder, results, _ = downloaded
    compress(folder / "model", tmp_path / "local")
    assert same_result(folder / "online" / "model", tmp_path / "local")
    assert same_result(folder / "online" / "subfolder", tmp_path / "local")
    assert {"additional_chat_templates/tools.jinja", "LICENSE"} <= content(folder / "online" / "model").keys()
    commit = hub.repositories["me/model"].find("main").oid
    assert results["model"] == {"revision": commit}
    report = json.loads((folder / "online" / "model" / "dern_report.json").read_text("utf-8"))
    assert (report["source"], report["revision"]) == ("me/model", commit)
    assert "license: mit" in (folder / "online" / "model" / "README.md").read_text("utf-8")


def test_only_what_is_needed_is_downloaded(downloaded):
    """The shards that the index names, and the small files beside them, each once."""
    _, folder, _, asked = downloaded
    fetched = [path for verb, repository, path in asked if (verb, repository) == ("GET", "me/model")]
    assert sorted(fetched) == sorted(content(folder / "model"))
    assert not {path for _, repository, path in asked if repository == "me/model"} & CLUTTER.keys()
    fetched = [path for verb, repository, path in asked if (verb, repository) == ("GET", "me/nested")]
    assert sorted(fetched) == sorted(f"inner/{name}" for name in content(folder / "model"))


def test_a_single_file_beside_older_shards(downloaded, tmp_path):
    """The single file is taken, as transformers does, and no shard is downloaded."""
    _, folder, results, asked = downloaded
    compress(folder / "single", tmp_path / "local")
    assert "error" not in results["both"]
    assert same_result(folder / "online" / "both", tmp_path / "local")
    weights = {path for verb, repository, path in asked if repository == "me/both" and path.endswith(".safetensors")}
    assert weights == {"model.safetensors"}


def test_a_config_without_a_dtype(downloaded, tmp_path):
    """The tensors tell it, before the weights are downloaded."""
    _, folder, results, asked = downloaded
    compress(folder / "untyped", tmp_path / "local")
    assert "error" not in results["no dtype"]
    assert same_result(folder / "online" / "no dtype", tmp_path / "local")
    report = json.loads((folder / "online" / "no dtype" / "dern_report.json").read_text("utf-8"))
    assert report["precision"] == dict.fromkeys(("stored", "computed", "written"), "bfloat16")


def test_revisions_and_tokens(downloaded, tmp_path):
    """A branch is that branch's last commit; a token opens a private repository."""
    hub, folder, results, _ = downloaded
    compress(folder / "single", tmp_path / "local")
    for job, commit in {
        "branch": hub.repositories["me/single"].find("dev"),
        "token": hub.repositories["me/private"].find("main"),
    }.items():
        assert results[job] == {"revision": commit.oid}
        assert same_result(folder / "online" / job, tmp_path / "local")


@pytest.mark.parametrize("job", ERRORS)
def test_refusals(downloaded, job):
    """Each is one error that says what to do, with nothing written and no weights downloaded."""
    _, _, results, asked = downloaded
    kind, *parts = ERRORS[job]
    assert results[job]["error"].startswith(f"{kind}: "), results[job]
    assert [part for part in parts if part not in results[job]["error"]] == []
    assert not results[job]["written"]
    weights = [path for _, repository, path in asked if repository == JOBS[job][0] and "safetensors" in path]
    if job not in ("shard", "revision"):
        assert weights == []


def test_every_job_is_tested():
    """No job is left out of the tests above."""
    assert JOBS.keys() - ERRORS.keys() == {"model", "branch", "token", "both", "no dtype", "subfolder"}


def test_offline(downloaded):
    """With HF_HUB_OFFLINE the cache is enough where it is complete; else the message says what is the matter."""
    hub, folder, online, _ = downloaded
    (shard,) = (folder / "home" / "hub" / "models--me--private" / "snapshots").glob("*/model.safetensors")
    kept = shard.rename(shard.with_suffix(".kept"))
    before = len(hub.requests)
    results = run(hub, folder, "offline", ["model", "branch", "token", "unknown"], HF_HUB_OFFLINE="1")
    kept.rename(shard)
    assert len(hub.requests) == before
    for job in ("model", "branch"):
        assert results[job] == online[job]
        assert same_result(folder / "offline" / job, folder / "online" / job)
    for job in ("token", "unknown"):
        assert results[job]["error"].startswith("FileNotFoundError: ") and not results[job]["written"]
        assert f"{JOBS[job][0]} is not wholly in the local cache, and HF_HUB_OFFLINE" in results[job]["error"]


def test_without_a_connection(downloaded):
    """A Hub that cannot be reached does not stop what is in the cache."""
    hub, folder, online, _ = downloaded
    results = run(hub, folder, "unreachable", ["model", "unknown"], HF_ENDPOINT="http://127.0.0.1:9")
    assert results["model"] == online["model"]
    assert "could not download me/nothing from http://127.0.0.1:9" in results["unknown"]["error"]
    assert "there is no local folder of that name" in results["unknown"]["error"]


@pytest.mark.parametrize("model", ["./none", "~/none", "/none", "a/b/c", "a b", "", Path("me/model")])
def test_what_is_no_hub_id(model):
    """A path that leads nowhere is no question for the Hub."""
    with pytest.raises(FileNotFoundError, match="does not exist; give the folder|has no config.json"):
        resolve_checkpoint(model)


def test_folders_that_are_no_checkpoint(tmp_path):
    """A file, and a folder without a config."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        resolve_checkpoint(str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        resolve_checkpoint(tmp_path)
