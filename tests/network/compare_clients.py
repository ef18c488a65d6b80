"""Script that runs small checkpoints, original and compressed, in other engines, and compares with transformers.

    python tests/network/compare_clients.py                     # all of them
    python tests/network/compare_clients.py transformers vllm   # only these

The examples of examples/tiny_moe, and models with random weights whose heads are larger, are run as they are, with
half of the experts, with half of the neurons of each, and with odd numbers of both.  Engines get token ids, so that
tokenizers play no part; differences are of the log-probabilities of 127 tokens of text.  The status is 1 if a client
that computes in float32 generates other tokens, or a client cannot be installed or cannot run.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from client_environments import FOLDER, INSTALLERS, LLAMA_CPP, install_sentencepiece
from environments import ROOT, run_quietly
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dern import DernCompressor


SCRIPTS = Path(__file__).parent / "clients"
TINY = ROOT / "examples" / "tiny_moe"
FORMS = {  # options of the compressed forms
    "half of the experts": {"sparsity": 0.5},
    "half of the neurons": {"width_sparsity": 0.5},
    "odd numbers": {"num_experts": 5, "width": 40},
}
RANDOM = {  # models with random weights, whose heads are of a size that every engine has a kernel for
    "mixtral": {"num_local_experts": 8, "intermediate_size": 128},
    "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 128, "intermediate_size": 128, "norm_topk_prob": True},
}
COMMON = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.1,  # large, so that no two tokens are about equally likely
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
STARTS = ["The president of the", "In the year 1914", "She was born in", "Water is a"]
NEW_TOKENS, TEXT_TOKENS = 24, 128


class Client(NamedTuple):
    """An engine."""

    script: str  # that runs it, in the folder `clients`
    options: tuple[str, ...] = ()  # of the script
    exact: bool = True  # it computes in float32, and generates the same tokens
    prepare: Callable[[Path, Path], None] | None = None  # makes its form of a checkpoint
    lacks: str = "nothing"  # words of the refusal of what it cannot run, original or compressed


def convert(checkpoint: Path, output: Path) -> None:
    """Convert a checkpoint for llama.cpp, with this environment's transformers and torch."""
    output.mkdir(parents=True, exist_ok=True)
    python, environment = install_sentencepiece()
    command = [python, SCRIPTS / "convert_to_gguf.py", LLAMA_CPP, checkpoint, output / "model.gguf"]
    run_quietly(command, **environment)


CLIENTS = {
    "transformers": Client("run_transformers.py"),
    "transformers 4": Client("run_transformers.py"),
    "llama.cpp": Client("run_llama_cpp.py", prepare=convert),
    "vllm": Client("run_vllm.py", lacks="head_dim=40"),
    "mlx": Client("run_mlx.py"),
    "llm-compressor": Client("run_fp8.py", exact=False),
    "bitsandbytes": Client("run_transformers.py", ("--8-bit",), exact=False),
}


def main() -> int:
    """Run the clients that the arguments name, or all; print the table, and return the exit status."""
    if unknown := set(sys.argv[1:]) - set(CLIENTS):
        sys.exit(f"unknown clients {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    names = [name for name in CLIENTS if name in sys.argv[1:]] or list(CLIENTS)
    models = make_models()
    tokenizer = Tokenizer.from_file(str(TINY / "upcycled" / "tokenizer.json"))
    text = next((TINY / "text" / "evaluation").glob("*.txt")).read_text("utf-8")
    task = {
        "prompts": [tokenizer.encode(start).ids for start in STARTS],
        "new_tokens": NEW_TOKENS,
        "text": tokenizer.encode(text).ids[:TEXT_TOKENS],
    }
    reference = run_client("transformers", models, task)["models"]
    print(f"| client | model | tokens equal, of {len(STARTS) * NEW_TOKENS} | largest difference | mean difference |")
    print("|---|---|--:|--:|--:|", flush=True)
    failed = False
    for name in names:
        try:
            result = run_client(name, models, task)
        except RuntimeError as error:
            print(f"| {name} | | not run: {' '.join(str(error).split())[-300:]} | | |", flush=True)
            failed = True
            continue
        for model in models:
            cells, same = compare(result["models"][model], reference[model])
            print(f"| {name} {result['version']} | {model} | {cells} |", flush=True)
            failed |= CLIENTS[name].exact and not same and CLIENTS[name].lacks not in cells
    return int(failed)


def make_models() -> dict[str, Path]:
    """Make the models with random weights, compress all, unless that is done, and return the checkpoints by name."""
    sources = {example: TINY / example for example in ("upcycled", "scratch")}
    sources |= {f"random {family}": make_random(family) for family in RANDOM}
    models = {}
    for name, source in sources.items():
        models[f"{name}, original"] = source
        for form, options in FORMS.items():
            folder = FOLDER / "models" / f"{name} {form}".replace(" ", "-")
            if not (folder / "dern_report.json").exists():
                data = {"dataset": str(TINY / "text" / "calibration"), "num_samples": 32, "sequence_length": 128}
                DernCompressor(preset="fast", **data, **options).compress_checkpoint(source, folder, overwrite=True)
            models[f"{name}, {form}"] = folder
    return models


def make_random(family: str) -> Path:
    """Make a model of a family, with the tokenizer of the examples."""
    folder = FOLDER / "models" / f"random-{family}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **COMMON, **RANDOM[family])
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        fields |= {"num_experts": fields["num_local_experts"], "rope_theta": 10000.0}  # where mlx-lm looks for them
        (folder / "config.json").write_text(json.dumps(fields, indent=2), "utf-8")
        for file in TINY.glob("upcycled/tokenizer*.json"):
            shutil.copy(file, folder)
    return folder


def run_client(name: str, models: dict[str, Path], task: dict[str, Any]) -> dict[str, Any]:
    """Run all models in one client, in a process of its own, and return what its script has written."""
    client, place = CLIENTS[name], FOLDER / "results" / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    python, environment = INSTALLERS[name]()
    folders = dict(models)
    if client.prepare:
        folders = {model: place / folder.name for model, folder in models.items()}
        for model, folder in folders.items():
            client.prepare(models[model], folder)
    files = [place / "task.json", place / "result.json"]
    files[0].write_text(json.dumps(task | {"models": {model: str(path) for model, path in folders.items()}}), "utf-8")
    run_quietly([python, SCRIPTS / client.script, *files, *client.options], OMP_NUM_THREADS="1", **environment)
    return json.loads(files[1].read_text("utf-8"))


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, bool]:
    """Compare results with those of transformers; returns three cells of the table, and whether tokens agree."""
    if "error" in found:
        return f"refused: {found['error']} | | ", False
    made, expected = sum(found["tokens"], []), sum(wanted["tokens"], [])
    equal = [one == other for one, other in zip(made, expected, strict=True)]
    differences = [one - other for one, other in zip(found["logs"], wanted["logs"], strict=True)]
    largest, mean = max(map(abs, differences)), fmean(differences)
    return f"{sum(equal)} | {largest:.1e} | {mean:+.1e}", all(equal)


if __name__ == "__main__":
    sys.exit(main())
