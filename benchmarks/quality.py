"""Loss before and after compression, method by method, on held-out text of several domains.

    python benchmarks/quality.py                                     # both models of examples/tiny_moe
    python benchmarks/quality.py MODEL --calibration TEXT --evaluation TEXT

Every method gets the same calibration sequences (a new draw per seed) and the same evaluation windows.  Figures are
loss increases over the full model in nats per token, mean over domains; `spread` is the standard deviation over the
calibration seeds.  "same keep-set" prunes exactly the experts that `recommended` of that seed dropped.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor, DernConfig, __version__
from optimum_dern.evaluation.perplexity import evaluate_texts, load_texts


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
MODELS = {"scratch": TINY / "scratch", "upcycled": TINY / "upcycled"}
PRUNE = {"method": "prune", "preset": "paper"}
SAME_KEEP_SET = "prune, same keep-set"
METHODS = {
    "random keep-set": PRUNE | {"selection": "random"},
    "prune by router": PRUNE | {"selection": "router"},
    "prune by frequency": PRUNE | {"selection": "frequency"},
    "prune by ean": PRUNE | {"selection": "ean"},
    "prune by reap": PRUNE | {"selection": "reap"},
    "DERN, preset paper": {"preset": "paper"},
    "DERN, preset recommended": {"preset": "recommended"},
}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    models = {Path(args.model).name: Path(args.model)} if args.model else MODELS
    results = {"version": __version__, "torch": torch.__version__, "settings": settings(args), "models": {}}
    for name, path in models.items():
        started = time.perf_counter()
        results["models"][name] = measure_model(path, args)
        results["models"][name]["seconds"] = round(time.perf_counter() - started, 1)
        print(markdown_table(name, results["models"][name]), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps({"output": str(args.output), "seconds": {n: m["seconds"] for n, m in results["models"].items()}}))


def measure_model(path: Path, args: argparse.Namespace) -> dict:
    """Losses of the full model and of every method, seed and domain."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_texts(args.evaluation, tokenizer, args.sequence_length)
    texts = {name: batches[: args.windows // 8] for name, batches in texts.items()}  # eight windows a batch
    baseline = {name: result.loss for name, result in evaluate_texts(full, texts).items()}
    increases: dict[str, list[dict[str, float]]] = {}
    winners: list[list[str]] = []
    keep_set: dict[int, list[int]] = {}
    for seed in range(args.seeds):
        for method, fields in fields_of_methods(args, seed):
            model = copy.deepcopy(full)
            if method == SAME_KEEP_SET:
                fields["protect_experts"] = keep_set
            compressor = DernCompressor(**fields)
            compressor.compress_model(model, tokenizer)
            if method == "DERN, preset recommended":
                keep_set = {layer.layer: layer.retained for layer in compressor.report.layers}
                winners.append([layer.winner for layer in compressor.report.layers])
            losses = {name: result.loss - baseline[name] for name, result in evaluate_texts(model, texts).items()}
            increases.setdefault(method, []).append(losses)
            print(f"  seed {seed}  {method:28s} {statistics.mean(losses.values()):+.4f}", flush=True)
    return {"full": baseline, "increase": increases, "winners": winners}


def fields_of_methods(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict]]:
    """Fields of DernConfig for every method of one seed; the keep-set control comes last."""
    common = {
        "sparsity": args.sparsity,
        "dataset": str(args.calibration),
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "batch_size": 8,
        "seed": seed,
    }
    for method, fields in METHODS.items():
        yield method, common | fields
    yield SAME_KEEP_SET, common | PRUNE


def markdown_table(name: str, result: dict) -> str:
    """One row a method: mean over domains and seeds, spread over seeds, then the domains."""
    domains = list(result["full"])
    lines = [
        f"\n{name}: full model {statistics.mean(result['full'].values()):.4f} nats per token\n",
        f"| method | mean increase | spread | {' | '.join(domains)} |",
        f"|---|---:|---:|{'---:|' * len(domains)}",
    ]
    for method, runs in result["increase"].items():
        means = [statistics.mean(run.values()) for run in runs]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        columns = " | ".join(f"{statistics.mean(run[d] for run in runs):+.4f}" for d in domains)
        lines.append(f"| {method} | {statistics.mean(means):+.4f} | {spread:.4f} | {columns} |")
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> dict:
    """What the figures depend on, for the result file."""
    names = ("sparsity", "num_samples", "sequence_length", "windows", "seeds", "threads")
    preset = DernConfig().to_dict()
    return {name: getattr(args, name) for name in names} | {"recommended": preset}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=400, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="evaluation windows a domain (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
