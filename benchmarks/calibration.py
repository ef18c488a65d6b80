"""What calibration text does to text unlike it: one domain, a mix, the model's own text and random tokens, by method.

    python benchmarks/calibration.py --data DATA                                  # both models of examples/tiny_moe
    python benchmarks/calibration.py MODEL --data DATA --seeds 1 --calibrations news news+self self
    python benchmarks/calibration.py --data DATA --table [--plot docs/source/images/calibration.svg]

`DATA` holds text/DOMAIN/train.txt to calibrate on and text/DOMAIN/test.txt to measure on, and bench/hellaswag.jsonl
and bench/piqa.jsonl: two domains that neither the models' training nor any calibration has seen.
A calibration is the name of a domain, `mix` of all, or `self`; `+self` and `+random` add those sequences in the shares
of `--self-share` and `--random-share`; `self512` has 512.  Pruning sees the same sequences.  Every result stands in
the output file as soon as it is measured, and the same command goes on where it was stopped.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from calibration_table import ORDER, plot, tables, task_tables
from results_file import check_settings, read_results, write_results
from splits import load_held_out, split_files
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernCompressor, DernConfig, __version__
from optimum_dern.engine.run.model_batches import load_model_batches
from optimum_dern.engine.run.own_text import OwnText
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts
from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.options import PRESETS


ROOT = Path(__file__).resolve().parent.parent
MODELS = [ROOT / "examples" / "tiny_moe" / name for name in ("scratch", "upcycled")]
PRUNED = {
    f"prune, {name}": {"method": "prune", "selection": name, "preset": "paper"}
    for name in ("router", "reap", "greedy")
}
METHODS = {"prune, router": PRUNED["prune, router"], "recommended": {}, **PRUNED, "dern, paper": {"preset": "paper"}}
UNSEEN = ("hellaswag", "piqa")
WORK = ROOT / "build" / "calibration"  # for the models' own text, which several calibrations share
ITEMS = 600  # of each, enough for the windows


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    if args.table:
        print(tables(read_results(args.output)), task_tables(read_results(args.output)), sep="\n")
        return plot(read_results(args.output), args.plot) if args.plot else None
    paths = [Path(args.model)] if args.model else MODELS
    for path in paths:
        check_settings(args.output, path.name, settings(args))
    for seed in range(args.seeds):
        for path in paths:
            measure(path, args, seed)
    print(tables(read_results(args.output)))


def measure(path: Path, args: argparse.Namespace, seed: int) -> None:
    """Measure all calibrations and methods of one draw that the output file does not have yet."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    texts, tasks = evaluation_texts(args, tokenizer), load_tasks(args.tasks, args.tasks_folder, args.limit)
    first = {"settings": settings(args), "loss": (before := losses(full, texts)), "rows": []}
    first |= {"tasks": scores(full, tokenizer, tasks)} if tasks else {}
    for method in args.methods:
        for name in args.calibrations:
            results = read_results(args.output)
            result = results.get(path.name, first)
            row = {"calibration": name, "method": method, "seed": seed}
            if any(row.items() <= known.items() for known in result["rows"]):
                continue
            started = time.perf_counter()
            model = compressed(full, tokenizer, name, method, args, seed, path.name)
            row["increase"] = {text: loss - before[text] for text, loss in losses(model, texts).items()}
            row |= {"tasks": scores(model, tokenizer, tasks)} if tasks else {}
            row["seconds"] = round(time.perf_counter() - started, 1)
            result["rows"].append(row)
            write_results(args.output, {**results, path.name: result})
            print(f"{path.name:10s} {seed} {name:20s} {method:15s} {fmean(row['increase'].values()):+.4f}", flush=True)


def compressed(
    full: Any, tokenizer: Any, name: str, method: str, args: argparse.Namespace, seed: int, model_name: str
) -> Any:
    """Compress a copy of the model with a method, on the text of a calibration."""
    source, *added = name.split("+")
    own, count = source.startswith("self"), 512 if source == "self512" else args.num_samples
    files = {domain: str(file) for domain, file in split_files(args.data, "train").items()}
    chosen = [file for domain, file in files.items() if source == "mix" or domain.startswith(source)]
    config = DernConfig(
        **METHODS[method],
        sparsity=args.sparsity,
        dataset="self" if own else dict.fromkeys(chosen, 1.0),
        **{f"{kind}_share": getattr(args, f"{kind}_share") if kind in added else 0.0 for kind in ("self", "random")},
        num_samples=count,
        sequence_length=args.sequence_length,
        batch_size=16,
        seed=seed,
    )
    kept = WORK / f"{model_name}-{source if own else 'added'}-{seed}.jsonl"
    batches = load_model_batches(config, full, tokenizer, own=OwnText(full, kept=kept, origin=model_name))
    return DernCompressor(config).compress_model(copy.deepcopy(full), batches=batches)


def evaluation_texts(args: argparse.Namespace, tokenizer: Any) -> dict[str, list[dict]]:
    """Load the held-out windows of every domain, the unseen ones last."""
    texts = load_held_out(args.data, tokenizer, args.sequence_length, args.windows)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in UNSEEN:
        lines = (args.data / "bench" / f"{name}.jsonl").read_text("utf-8").splitlines()[:ITEMS]
        items = [json.loads(line) for line in lines]
        file = WORK / f"{name}.txt"
        file.write_text("\n".join(f"{item['context']} {item['choices'][item['label']]}" for item in items), "utf-8")
        texts |= load_texts(file, tokenizer, args.sequence_length, limit=args.windows)
    return texts


def losses(model: Any, texts: dict[str, list[dict]]) -> dict[str, float]:
    """Measure the loss by text, in nats per token."""
    return {name: result.loss for name, result in evaluate_texts(model, texts).items()}


def scores(model: Any, tokenizer: Any, tasks: list) -> dict[str, tuple[float, float]]:
    """Score multiple-choice tasks: accuracy and its standard error by task."""
    found = {name: result.main for name, result in evaluate_tasks(model, tokenizer, tasks).items()}
    return {name: (figure.value, figure.standard_error) for name, figure in found.items()}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the figures depend on."""
    names = ("num_samples", "sequence_length", "windows", "sparsity", "threads")
    shares = {"self": args.self_share, "random": args.random_share}
    versions = {"version": __version__, "torch": torch.__version__, "shares": shares}
    usual = {"device": "cpu", "dtype": "float32"}  # which result files leave out
    unusual = {name: getattr(args, name) for name, value in usual.items() if getattr(args, name) != value}
    return {name: getattr(args, name) for name in names} | versions | unusual


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/DOMAIN and bench")
    parser.add_argument("--calibrations", nargs="+", default=ORDER, metavar="NAME", help="default: all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument(
        "--self-share", type=float, default=PRESETS["recommended"]["self_share"], help="of all sequences, for `+self`"
    )
    parser.add_argument("--random-share", type=float, default=0.25, help="of all sequences, for `+random`")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=[], help="also score these, as in optimum-dern evaluate")
    parser.add_argument("--tasks-folder", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="items a task (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibration.json")
    parser.add_argument("--table", action="store_true", help="only print the tables of the output file")
    parser.add_argument("--plot", type=Path, help="with --table: draw the picture as SVG")
    args = parser.parse_args()
    if unknown := set(args.calibrations) - set(ORDER):
        parser.error(f"no calibration {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}")
    if not args.table and not split_files(args.data, "train"):
        sys.exit(f"{args.data} has no text/DOMAIN/train.txt")
    return args


if __name__ == "__main__":
    main()
