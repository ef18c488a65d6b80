"""Models loaded with half of the experts by task: bytes, seconds and memory, and the loss on the task and off it.

    python benchmarks/patterns.py --seeds 3 --threads 1        # both models of examples/tiny_moe

Patterns are made of the calibration text, a new draw per seed, and losses are measured on the evaluation text.
"mixed" keeps the experts that the same scores choose on the text of all domains together.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from results_file import standard_error, write_results
from splits import load_held_out
from transformers import AutoTokenizer
from transformers.utils import logging

from optimum_dern import load_for
from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_texts
from optimum_dern.models.loading import load_model
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.patterns import build_patterns
from optimum_dern.patterns.build import first_layer_scores, open_source


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
LOADING = """
import json, sys, time
import torch
from optimum_dern.machine.progress import peak_memory_bytes
from optimum_dern.models.loading import load_model
from optimum_dern.patterns import load_for
from optimum_dern.checkpoint.format.reader import stored_tensors
from pathlib import Path
model, library, count = sys.argv[1:]
before, started = peak_memory_bytes([torch.device("cpu")]), time.perf_counter()
if count == "0":
    load_model(model, "cpu")
    read = sum(info.size for info in stored_tensors(Path(model)).values())
else:
    read = load_for(model, library, task="books_en", num_experts=int(count), device="cpu").bytes_read
seconds = time.perf_counter() - started
print(json.dumps({"read": read, "seconds": seconds, "memory": peak_memory_bytes([torch.device("cpu")]) - before}))
"""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    results = {path.name: measure(path, args) for path in (TINY / "scratch", TINY / "upcycled")}
    write_results(args.output, results, indent=1)
    print(markdown(results))


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses by seed and task, the share of prompts that find their task, and the cost of loading."""
    tokenizer, full = AutoTokenizer.from_pretrained(path), load_model(path, "cpu", "float32")
    texts = load_held_out(TINY / "text" / "evaluation", tokenizer, 256, args.windows)
    count = find_moe_layers(full)[0].num_experts // 2
    before, rows, right = losses(full, texts), [], []
    for seed in range(args.seeds):
        data = {
            file.stem: load_batches(str(file), tokenizer, num_samples=32, sequence_length=256, seed=seed)
            for file in sorted((TINY / "text" / "calibration").glob("*.txt"))
        }
        library = build_patterns(path, {**data, "mixed": [b for own in data.values() for b in own]})
        mixed = losses(load_for(path, library, task="mixed", num_experts=count, dtype="float32"), texts)
        for task in data:
            own = losses(load_for(path, library, task=task, num_experts=count, dtype="float32"), texts)
            rows.append({"seed": seed, "task": task, "own": rise(own, before), "mixed": rise(mixed, before)})
        with TemporaryDirectory() as folder:
            library.save(folder)
            loading = {n: loaded(path, folder, n) for n in (0, count)}
        del library.scores["mixed"]
        for task, batches in texts.items():
            for batch in batches:
                for row in range(len(batch["input_ids"])):
                    one = {name: value[row : row + 1] for name, value in batch.items()}
                    vector = first_layer_scores(open_source(path), [one], library.settings)
                    right.append(library.nearest(vector)[0][0] == task)
        print(f"{path.name}, seed {seed}: {len(rows)} tasks", flush=True)
    return {"rows": rows, "matched": fmean(right), "prompts": len(right), "loading": loading}


def losses(model: Any, texts: dict[str, list[dict]]) -> dict[str, float]:
    return {name: value.loss for name, value in evaluate_texts(model, texts).items()}


def rise(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before}


def loaded(model: Path, library: str, count: int) -> dict[str, float]:
    """Load in a process of its own, whole (0) or with some experts; returns bytes read, seconds and peak memory."""
    command = [sys.executable, "-c", LOADING, str(model), library, str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def markdown(results: dict[str, Any]) -> str:
    lines = ["| model | experts kept by | loss on the task | on the other domains |", "|---|---|---:|---:|"]
    for name, result in results.items():
        for kind in ("own", "mixed"):
            cells = []
            for of_task in (True, False):
                seeds = sorted({row["seed"] for row in result["rows"]})
                values = [
                    fmean(
                        v
                        for row in result["rows"]
                        if row["seed"] == seed
                        for domain, v in row[kind].items()
                        if (domain == row["task"]) == of_task
                    )
                    for seed in seeds
                ]
                cells.append(f"{fmean(values):+.3f} ± {standard_error(values):.3f}")
            lines.append(f"| {name} | {'the task' if kind == 'own' else 'all text'} | {cells[0]} | {cells[1]} |")
    for name, result in results.items():
        whole, part = result["loading"].values()
        shares = [part[key] / whole[key] for key in ("read", "seconds", "memory")]
        cost = "{:.0%} of the bytes, {:.2f} of the seconds, {:.2f} of the memory".format(*shares)
        lines.append(f"\n{name}: {cost}; {result['matched']:.1%} of {result['prompts']} windows find their task")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="of each text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "patterns.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
