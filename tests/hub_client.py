"""Script of the Hub tests, run in a process of its own since huggingface_hub reads environment variables on import.

python hub_client.py push FOLDER: compress tiny models, save them under FOLDER and push them to the loopback Hub.
python hub_client.py refusals FOLDER: push FOLDER/source, a finished checkpoint, to one repository per line of stdin.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path


SHARDS = "20KB"


def push(folder):
    """Push a model in every supported way and save it locally; the returned URLs go to FOLDER/pushed.json."""
    import torch
    from load_plainly import observe
    from tiny import compress, make_model, tiny_tokenizer

    torch.set_num_threads(1)
    make_model("qwen3_moe").save_pretrained(folder / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "source")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    compressor, urls = compress(model), {}
    compressor.save(model, folder / "local", tokenizer, max_shard_size=SHARDS)
    urls["first"] = compressor.push_to_hub(
        model, "me/first", tokenizer, private=True, commit_message="half the experts", max_shard_size=SHARDS
    )
    compressor.push_to_hub(model, "me/again", max_shard_size=SHARDS)
    compressor.push_to_hub(model, "me/again", folder=folder / "again")
    urls["same"] = compressor.push_to_hub(model, "me/again")
    compressor.push_to_hub(model, "me/card", max_shard_size=SHARDS)
    urls["request"] = compressor.push_to_hub(model, "me/request", create_pr=True)
    compressor.push_to_hub(model, "me/branch", revision="dev")
    urls["instance"] = model.push_to_hub("me/instance", private=True)
    torch.save(observe(model.eval()), folder / "observed.pt")
    (folder / "pushed.json").write_text(json.dumps({"urls": urls, "left": left_behind()}))


def refusals(folder):
    """Push to repositories that refuse; prints {repository: outcome} as JSON."""
    from optimum_dern.checkpoint.hub.push import HubPushError, push_checkpoint

    def save(target):
        shutil.copytree(folder / "source", target, dirs_exist_ok=True)

    def broken_save(target):
        save(target)
        raise OSError("no space left on device")

    time.sleep = lambda seconds: None  # skips half a minute of waiting between the client's retries
    results = {}
    for line in sys.stdin:
        repo_id, options = json.loads(line)
        result = results[repo_id] = {}
        try:
            result["url"] = push_checkpoint(
                broken_save if options.pop("broken_save", False) else save, repo_id, **options
            )
        except HubPushError as error:
            result |= {"message": str(error), "status": error.status, "folder": error.folder and str(error.folder)}
        except (ValueError, OSError) as error:
            result |= {"other": f"{type(error).__name__}: {error}"}
    print(json.dumps(results | {"left": left_behind()}))


def left_behind():
    """List the temporary folders of this package that are left."""
    return sorted(map(str, Path(tempfile.gettempdir()).glob("optimum-dern-*")))


if __name__ == "__main__":
    {"push": push, "refusals": refusals}[sys.argv[1]](Path(sys.argv[2]))
