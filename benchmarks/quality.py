"""What every method costs in quality, side by side: loss, KL, agreement and tasks against the full model.

    python benchmarks/quality.py                                    # both models of examples/tiny_moe, half dropped
    python benchmarks/quality.py MODEL --calibration TEXT --evaluation TEXT
    python benchmarks/quality.py --sparsity 0.25 0.5 0.75 --seeds 5 --tasks-folder BENCH --tasks blimp lambada_openai
    python benchmarks/quality.py --data DATA --num-samples 2048     # more text: DATA/text/DOMAIN/train.txt

Every method gets the same calibration sequences (a new draw per seed), of which the oneshot ones share one pass, and
the same evaluation windows.  Variants: `published`, the method as its paper has it; `refit`, with the ridge refit of
the retained experts' down projections; `router`, with the router's refit too, each step taken only where the guard's
held-out error falls.  `recommended` is this package's default.  "same keep-set" prunes exactly the experts that
`recommended` of that seed dropped.  Results are merged into the output file: a later run of the same settings adds
draws, sparsities or variants.  `benchmarks/quality_table.py` makes tables and the plot from it.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_table import markdown_tables
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernConfig, __version__
from optimum_dern.calibration.data import load_batches
from optimum_dern.engine.layers import compress_layers_
from optimum_dern.engine.requests import check_request
from optimum_dern.engine.targets import LayersAside, Target
from optimum_dern.evaluation.accuracy import TaskResult, evaluate_tasks
from optimum_dern.evaluation.agreement import agreement
from optimum_dern.evaluation.logits_cache import LogitsCache, cache_logits
from optimum_dern.evaluation.perplexity import evaluate_texts, load_texts
from optimum_dern.evaluation.tasks import load_tasks
from optimum_dern.models.size import measure_model
from optimum_dern.models.structure import find_moe_layers


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
CRITERIA = ("random", "router", "frequency", "ean", "reap", "man", "msan", "hope", "easy_ep", "aimer", "greedy")
MERGING = ("ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe")
METHODS = {
    **{f"prune, {name}": {"method": "prune", "selection": name} for name in CRITERIA},
    "dern": {"method": "dern"},
    **{name: {"method": name} for name in MERGING},
}
VARIANTS = {
    "published": {"preset": "paper"},
    "refit": {"preset": "paper", "refit": True},
    "router": {"preset": "paper", "refit": True, "router_refit": True, "guard": True},
}
RECOMMENDED, SAME_KEEP_SET = "recommended", "prune, same keep-set"


@dataclass(frozen=True)
class Subject:
    """A full model and what results are held against."""

    model: Any
    tokenizer: Any
    tasks: list  # those on which the model is above chance
    cache: LogitsCache  # its predictions on the evaluation windows


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    for path in [Path(args.model)] if args.model else [TINY / "scratch", TINY / "upcycled"]:
        check_settings(args, path.name)
        with tempfile.TemporaryDirectory() as folder:
            subject, result = prepare(path, args, folder)
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                started = time.perf_counter()
                result["rows"] = measure(subject, args, seed)
                result["seconds"] = round(time.perf_counter() - started)
                result = save(args.output, path.name, result)  # after every draw: a long run may be cut
        print(markdown_tables(path.name, result), flush=True)
    print(json.dumps({"output": str(args.output)}))


def prepare(path: Path, args: argparse.Namespace, folder: str) -> tuple[Subject, dict[str, Any]]:
    """The subject, and its own figures."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_texts(args.evaluation, tokenizer, args.sequence_length, limit=args.windows)
    tasks = load_tasks(args.tasks, args.tasks_folder, args.limit)
    accuracies = evaluate_tasks(full, tokenizer, tasks) if tasks else {}
    above = [task for task in tasks if is_above_chance(accuracies[task.name])]
    result = {
        "loss": {name: value.loss for name, value in evaluate_texts(full, texts).items()},
        "tasks": {name: value.to_dict() for name, value in accuracies.items()},
        "parameters": measure_model(full, find_moe_layers(full)).parameters,
        "settings": settings(args),
        "rows": [],
    }
    return Subject(full, tokenizer, above, cache_logits(full, texts, folder, top_k=64)), result


def is_above_chance(result: TaskResult) -> bool:
    """By two standard errors; where guessing never succeeds, accuracy has to be worth losing: 5 %."""
    return result.main.value - 2 * result.main.standard_error > max(result.chance, 0.05)


def measure(subject: Subject, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A row for every method, variant and sparsity of one calibration draw."""
    rows = []
    for row, compressed in compress_all(subject, args, seed):
        model = copy.deepcopy(subject.model)
        compressed.write_(model, find_moe_layers(model))
        found = agreement(model, subject.cache)
        row["parameters"] = measure_model(model, find_moe_layers(model)).parameters
        for name, figure in (("loss", "loss_increase"), ("kl", "kl"), ("top1", "top1")):
            row[name] = {text: getattr(value, figure).value for text, value in found.items()}
        if subject.tasks and seed < args.task_seeds:
            results = evaluate_tasks(model, subject.tokenizer, subject.tasks)
            row["tasks"] = {name: result.main.value for name, result in results.items()}
        rows.append(row)
        name = " ".join(str(row[part]) for part in ("seed", "sparsity", "method", "variant"))
        print(f"{name:45s} {statistics.fmean(row['loss'].values()):+.4f}", flush=True)
    return rows


def check_settings(args: argparse.Namespace, name: str) -> None:
    """Figures of other settings are not mixed with new ones."""
    known = json.loads(args.output.read_text("utf-8")).get(name) if args.output.exists() else None
    if known and known["settings"] != settings(args):
        differing = [key for key, value in settings(args).items() if known["settings"].get(key) != value]
        sys.exit(f"{args.output} has figures of {name} with other {', '.join(differing)}; give another --output")


def save(path: Path, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put one model's new rows beside what the file has; returns all of the model's."""
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known = results.get(name, {"rows": [], "seconds": 0, "tasks": {}})

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[part] for part in ("method", "variant", "sparsity", "seed"))

    new = {key(row) for row in result["rows"]}
    rows = [row for row in known["rows"] if key(row) not in new] + result["rows"]
    seconds, tasks = known["seconds"] + result["seconds"], known["tasks"] | result["tasks"]
    merged = result | {"rows": rows, "seconds": seconds, "tasks": tasks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, name: merged}) + "\n", "utf-8")
    return merged


def compress_all(subject: Subject, args: argparse.Namespace, seed: int) -> Iterator[tuple[dict, LayersAside]]:
    """Every result of one calibration draw, out of as few passes as may be."""
    full, layers = subject.model, find_moe_layers(subject.model)
    options = {"num_samples": args.num_samples, "sequence_length": args.sequence_length, "batch_size": 8, "seed": seed}
    source = str(args.calibration)
    if args.data:
        source = {str(file): 1.0 for file in sorted(args.data.glob("text/*/train.txt"))}
        if not source:
            sys.exit(f"{args.data} has no text/DOMAIN/train.txt; give a folder that has, or --calibration")
    data = {"dataset": source, **options}
    batches = load_batches(source, subject.tokenizer, **options)
    names = [
        (method, variant, sparsity)
        for sparsity in args.sparsity
        for method in args.methods
        if method != RECOMMENDED
        for variant in args.variants
        if variant == "published" or (seed < args.refit_seeds and sparsity in args.refit_sparsity)
    ]
    configs = {(m, v, s): DernConfig(sparsity=s, **METHODS[m], **VARIANTS[v], **data) for m, v, s in names}
    if RECOMMENDED in args.methods:
        configs |= {(RECOMMENDED, "", s): DernConfig(sparsity=s, **data) for s in args.sparsity}
    done = run(full, layers, batches, configs)
    yield from ((row_of(name, seed, sink), sink) for name, sink in done.items())
    keep = {
        s: {r.layer: r.retained for r in sink.finished.values() if r}
        for (m, _, s), sink in done.items()
        if m == RECOMMENDED
    }
    prune = {"method": "prune", "preset": "paper", **data}
    configs = {
        (SAME_KEEP_SET, "", s): DernConfig(sparsity=s, protect_experts=experts, **prune) for s, experts in keep.items()
    }
    if keep:
        yield from ((row_of(name, seed, sink), sink) for name, sink in run(full, layers, batches, configs).items())


def run(full: Any, layers: list, batches: list[dict], configs: dict[tuple, DernConfig]) -> dict[tuple, LayersAside]:
    """One pass for all configs; the model stays as it is."""
    sinks = {name: LayersAside(full, layers) for name in configs}
    targets = [Target(config, check_request(config, full, layers), sinks[name]) for name, config in configs.items()]
    compress_layers_(full, layers, batches, targets)
    return sinks


def row_of(name: tuple[str, str, float], seed: int, sink: LayersAside) -> dict[str, Any]:
    """What a result is, before it is measured."""
    reports = [report for report in sink.finished.values() if report]
    return {
        **dict(zip(("method", "variant", "sparsity"), name, strict=True)),
        "seed": seed,
        "winners": [report.winner for report in reports],
        "seconds": round(sum(report.seconds for report in reports), 3),
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, for the result file."""
    names = ("num_samples", "sequence_length", "windows", "threads", "limit")
    text = "DATA/text/*/train.txt" if args.data else args.calibration.name
    versions = {"version": __version__, "torch": torch.__version__}
    return (
        {name: getattr(args, name) for name in names}
        | {"calibration": text}
        | versions
        | {"recommended": DernConfig().to_dict()}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--data", type=Path, help="folder with text/DOMAIN/train.txt to calibrate on instead")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, RECOMMENDED], choices=[*METHODS, RECOMMENDED])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--num-samples", type=int, default=400, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first of them")
    parser.add_argument("--refit-seeds", type=int, default=1, help="of these, for the refitted variants")
    parser.add_argument("--refit-sparsity", type=float, nargs="*", default=[0.5], help="sparsities for them")
    parser.add_argument("--tasks", nargs="+", default=[], help="as in optimum-dern evaluate")
    parser.add_argument("--tasks-folder", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="items a task (default: %(default)s)")
    parser.add_argument("--task-seeds", type=int, default=1, help="calibration draws that tasks are scored for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
