"""Comparison of all compression methods: loss increase, KL, top-token agreement and tasks against the full model.

    python benchmarks/quality.py                                    # both models of examples/tiny_moe, half dropped
    python benchmarks/quality.py MODEL --calibration TEXT --evaluation TEXT
    python benchmarks/quality.py --sparsity 0.25 0.5 0.75 --seeds 5 --tasks-folder BENCH --tasks blimp lambada_openai
    python benchmarks/quality.py --data DATA --num-samples 2048     # more text: DATA/text/DOMAIN/train.txt
    python benchmarks/quality.py MODEL --data DATA --evaluation DATA --at-once 8     # DATA/text/DOMAIN/test.txt

Every method gets the same calibration sequences (a new draw per seed) and the same evaluation windows; methods with
oneshot calibration share one pass. Variants: `published`, the method as in its paper; `refit`, with the ridge refit
of the retained experts' down projections; `guard`, in every layer the candidate with the lowest error on held-out
tokens: the method's own result or plain pruning, unfitted, scaled, or refitted with one of three ridges; `router`,
the same with the router's refit. `recommended` is this package's default without text of the model's own. "same
keep-set" prunes exactly the experts that `recommended` of that seed dropped. `camera_p`, `heapr` and `slim` make all
experts narrower by the same fraction of their bytes; `cd_moe` is measured only at the sparsity that keeps as many
experts as a token uses, `mone` only on models whose experts have output biases. Results are merged into the output
file: a later run with the same settings adds draws, sparsities or variants. `benchmarks/quality_table.py` makes tables
and the plot from it.

All results of a draw are in memory together, beside the full model and a copy of it.  `--at-once` makes several passes
with fewer results each: on a CPU the figures are bitwise equal.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from layers_aside import LayersAside
from quality_table import markdown_tables
from results_file import add_rows, check_settings
from splits import load_held_out, split_files
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernConfig, __version__
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.run.checks import check_request
from optimum_dern.engine.walk.decoder import compress_layers_
from optimum_dern.engine.walk.recipe import Recipe
from optimum_dern.evaluation.agreement.logits_cache import LogitsCache, cache_logits
from optimum_dern.evaluation.agreement.measure import agreement
from optimum_dern.evaluation.loss.perplexity import evaluate_texts
from optimum_dern.evaluation.tasks.accuracy import TaskResult, evaluate_tasks
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.models.moe.structure import MoELayer, find_moe_layers
from optimum_dern.models.size import measure_model


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
CRITERIA = (
    "random",
    "router",
    "frequency",
    "ean",
    "reap",
    "man",
    "msan",
    "mone",
    "hope",
    "easy_ep",
    "aimer",
    "greedy",
)
NARROWING = ("camera_p", "heapr", "slim")
MERGING = ("ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe", "uncurl")
METHODS = {
    **{f"prune, {name}": {"method": "prune", "selection": name} for name in CRITERIA},
    "dern": {"method": "dern"},
    **{name: {"method": name} for name in (*MERGING, *NARROWING, "cd_moe", "mone")},
}
VARIANTS = {
    "published": {"preset": "paper"},
    "refit": {"preset": "paper", "refit": True},
    "guard": {"preset": "paper", "refit": True, "guard": True},
    "router": {"preset": "paper", "refit": True, "router_refit": True, "guard": True},
}
RECOMMENDED, SAME_KEEP_SET = "recommended", "prune, same keep-set"
# Settings that result files leave out where they have these values.
USUAL = {"device": "cpu", "dtype": "float32", "evaluation": "evaluation"}
Name = tuple[str, str, float]  # method, variant and sparsity of a result


@dataclass(frozen=True)
class Subject:
    """A full model, and the tasks and predictions that its compressed versions are compared on."""

    model: Any
    tokenizer: Any
    tasks: list  # those on which the model is above chance
    cache: LogitsCache  # its predictions on the evaluation windows


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    paths = [Path(args.model)] if args.model else [TINY / "scratch", TINY / "upcycled"]
    for path in paths:
        check_settings(args.output, path.name, settings(args))
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            subject, result = prepare(path, args, folder)
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                started = time.perf_counter()
                result["rows"] = measure(subject, args, seed)
                result["seconds"] = round(time.perf_counter() - started)
                result = add_rows(args.output, path.name, result)  # after every draw: a long run may be cut
        print(markdown_tables(path.name, result), flush=True)
    print(json.dumps({"output": str(args.output)}))


def prepare(path: Path, args: argparse.Namespace, folder: str) -> tuple[Subject, dict[str, Any]]:
    """Load a full model with what it is compared on; returns it and the full model's own figures."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    texts = load_held_out(args.evaluation, tokenizer, args.sequence_length, args.windows)
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
    """Whether a model's accuracy is two standard errors above guessing, and above 5 % where guessing gives 0."""
    return result.main.value - 2 * result.main.standard_error > max(result.chance, 0.05)


def measure(subject: Subject, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Compress and measure every method, variant and sparsity with one calibration draw; returns one row each."""
    names = ("num_samples", "sequence_length")
    data = {"dataset": calibration_source(args), "batch_size": 8, "seed": seed}
    data |= {name: getattr(args, name) for name in names}
    subject = subject if seed < args.task_seeds else replace(subject, tasks=[])
    batches = load_batches(tokenizer=subject.tokenizer, **data)
    rows, retained = measure_configs(subject, batches, configs_of(args, data, subject.model), args.at_once)
    prune = {"method": "prune", "preset": "paper", **data}
    configs = {
        (SAME_KEEP_SET, "", s): DernConfig(sparsity=s, protect_experts=retained[m, v, s], **prune)
        for m, v, s in retained
        if m == RECOMMENDED
    }
    return rows + measure_configs(subject, batches, configs, args.at_once)[0]


def configs_of(args: argparse.Namespace, data: Mapping[str, Any], full: Any) -> dict[Name, DernConfig]:
    """Make the configs of all methods, variants and sparsities for one calibration draw, except the same keep-set."""
    layer = find_moe_layers(full)[0]
    names = [
        (method, variant, sparsity)
        for sparsity in args.sparsity
        for method in args.methods
        if method != RECOMMENDED and fits(method, sparsity, layer)
        for variant in args.variants
        if variant == "published" or (data["seed"] < args.refit_seeds and sparsity in args.refit_sparsity)
    ]
    configs = {(m, v, s): DernConfig(**amount(m, s), **METHODS[m], **VARIANTS[v], **data) for m, v, s in names}
    if RECOMMENDED in args.methods:
        configs |= {(RECOMMENDED, "", s): DernConfig(sparsity=s, self_share=0.0, **data) for s in args.sparsity}
    return configs


def fits(method: str, sparsity: float, layer: MoELayer) -> bool:
    """Whether a method works on layers like this one at a sparsity."""
    condensed = sparsity == 1 - layer.top_k / layer.num_experts
    return {"cd_moe": condensed, "mone": layer.layout.biased}.get(method, True)


def amount(method: str, sparsity: float) -> dict[str, float]:
    """Return the option by which a method drops a fraction of the routed experts' bytes: of experts, or of neurons."""
    return {"width_sparsity" if method in NARROWING else "sparsity": sparsity}


def measure_configs(
    subject: Subject, batches: list[dict], configs: Mapping[Name, DernConfig], at_once: int | None
) -> tuple[list[dict[str, Any]], dict[Name, dict[int, list[int]]]]:
    """Compress with every config, `at_once` per pass; returns a row and the retained experts by layer for each."""
    rows, retained, names = [], {}, list(configs)
    size = at_once or max(1, len(names))
    for start in range(0, len(names), size):
        chunk = names[start : start + size]
        results = run(subject.model, batches, {name: configs[name] for name in chunk})
        for name in chunk:
            retained[name] = {r.layer: r.retained for r in results[name].finished.values() if r}
            rows.append(
                measure_one(subject, name, configs[name].seed, results.pop(name))
            )  # popped, so that its memory is freed
    return rows, retained


def run(full: Any, batches: list[dict], configs: Mapping[Name, DernConfig]) -> dict[Name, LayersAside]:
    """Compress with all configs in one pass, without changing the model."""
    layers = find_moe_layers(full)
    sinks = {name: LayersAside(full, layers) for name in configs}
    recipes = [Recipe(config, check_request(config, full, layers), sinks[name]) for name, config in configs.items()]
    compress_layers_(full, layers, batches, recipes)
    return sinks


def measure_one(subject: Subject, name: Name, seed: int, compressed: LayersAside) -> dict[str, Any]:
    """Measure one result, and return its row."""
    reports = [report for report in compressed.finished.values() if report]
    row = dict(zip(("method", "variant", "sparsity"), name, strict=True)) | {"seed": seed}
    row |= {"winners": [r.winner for r in reports], "seconds": round(sum(r.seconds for r in reports), 3)}
    model = copy.deepcopy(subject.model)
    compressed.write_(model, find_moe_layers(model))
    row["parameters"] = measure_model(model, find_moe_layers(model)).parameters
    found = agreement(model, subject.cache)
    for key, figure in (("loss", "loss_increase"), ("kl", "kl"), ("top1", "top1")):
        row[key] = {text: getattr(value, figure).value for text, value in found.items()}
    if subject.tasks:
        results = evaluate_tasks(model, subject.tokenizer, subject.tasks)
        row["tasks"] = {task: result.main.value for task, result in results.items()}
    title = " ".join(str(row[part]) for part in ("seed", "sparsity", "method", "variant"))
    print(f"{title:45s} {statistics.fmean(row['loss'].values()):+.4f}", flush=True)
    return row


def calibration_source(args: argparse.Namespace) -> str | dict[str, float]:
    """Return the path of the calibration text, or a weight for each of several paths."""
    if not args.data:
        paths = [str(path) for path in args.calibration]
        return paths[0] if len(paths) == 1 else dict.fromkeys(paths, 1.0)
    source = {str(file): 1.0 for file in split_files(args.data, "train").values()}
    if not source:
        sys.exit(f"{args.data} has no text/DOMAIN/train.txt; give a folder that has, or --calibration")
    return source


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the figures depend on, without those of `USUAL`, which older result files lack."""
    names = ("num_samples", "sequence_length", "windows", "threads", "limit")
    text = "DATA/text/*/train.txt" if args.data else " ".join(path.name for path in args.calibration)
    split = split_files(args.evaluation, "test")
    unusual = {
        "device": torch.device(args.device).type,
        "dtype": args.dtype,
        "evaluation": "DATA/text/*/test.txt" if split else args.evaluation.name,
    }
    versions = {"version": __version__, "torch": torch.__version__}
    return (
        {name: getattr(args, name) for name in names}
        | {"calibration": text}
        | {name: value for name, value in unusual.items() if value != USUAL[name]}
        | versions
        | {"recommended": DernConfig(self_share=0.0).to_dict()}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    calibration = [TINY / "text" / "calibration"]
    parser.add_argument("--calibration", type=Path, nargs="+", default=calibration, help="files or folders")
    parser.add_argument("--data", type=Path, help="folder with text/DOMAIN/train.txt to calibrate on instead")
    evaluation = TINY / "text" / "evaluation"
    parser.add_argument("--evaluation", type=Path, default=evaluation, help="file, or folder like those of the above")
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
    parser.add_argument("--at-once", type=int, help="results in memory at once (default: all of a draw)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    args = parser.parse_args()
    if args.at_once is not None and args.at_once < 1:
        parser.error(f"--at-once is {args.at_once}; give at least 1")
    return args


if __name__ == "__main__":
    main()
