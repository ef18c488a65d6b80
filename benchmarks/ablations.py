"""Ablations of DERN and of what this package adds to it: loss increase with one part changed at a time.

    python benchmarks/ablations.py                             # both models of examples/tiny_moe, half dropped
    python benchmarks/ablations.py --plots docs/source/images

Most groups change one option of `preset="paper"` (no refits, no guard), as the ablations of the paper do (arXiv
2509.10377).  "hope" is about that criterion (`hope_rules.py`), "recombination" tries other rules than the paper's
(`segment_rules.py`, `learned_clusters.py`), without and with refits, and "recommended" disables steps of
`preset="recommended"`.  Figures are increases of the loss over the full model in nats per token, mean over the domains
of the evaluation text, on the first windows of each file (`quality.py` draws them from the whole file).  Results are
merged into the output file: a later run with the same settings adds groups or variants.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import hope_rules  # noqa: F401 - registers a method of the group "hope"
import learned_clusters  # noqa: F401 - registers one of the group "recombination"
import segment_rules  # noqa: F401 - registers the methods of the group "recombination"
import torch
from results_file import check_settings, read_results, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernCompressor, DernConfig, __version__
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
THRESHOLDS = tuple(step / 10 for step in range(10))
PAPER = {"preset": "paper"}
MOVING = PAPER | {"similarity_threshold": 0.3}  # low enough for segments to move in both models
OWN = MOVING | {"cluster_init": "own"}
RULES = {
    "pruning": PAPER | {"method": "prune"},
    "as published": MOVING | {"cluster_init": "gate"},
    "k-means from own neurons": OWN,
    "the same, canonical": OWN | {"method": "kmeans, canonical"},
    "averaged in function space": OWN | {"method": "function space"},
    "the best of the pool": OWN | {"method": "choose"},
    "the same, function space": OWN | {"method": "choose, function space"},
    "coefficients learned": OWN | {"method": "learned clusters"},
    "the best of those routed together": OWN | {"method": "choose, routed together"},
}
TEXTS = {"calibration": "calibration", "evaluation": "evaluation"}  # defaults for result files that name no texts
EVERY_REFIT = {"preset": "recommended", "guard": False}  # every layer gets the method's own result
GROUPS = {
    "controls": {
        "prune by router": {"preset": "paper", "method": "prune"},
        "prune by greedy": {"preset": "paper", "method": "prune", "selection": "greedy"},
        "prune at random": {"preset": "paper", "method": "prune", "selection": "random"},
    },
    "threshold": {f"alpha {alpha}": PAPER | {"similarity_threshold": alpha} for alpha in THRESHOLDS},
    "threshold, own centroids": {
        f"alpha {alpha}": PAPER | {"similarity_threshold": alpha, "cluster_init": "own"} for alpha in THRESHOLDS
    },
    "initial centroids": {init: MOVING | {"cluster_init": init} for init in ("gate", "own", "random")},
    "importance weights": {name: MOVING | {"importance_weighting": name == "on"} for name in ("on", "off")},
    "similarity of": {
        "up, down": MOVING,
        "gate, up, down": MOVING | {"similarity_weights": (1, 1, 1)},
        "gate": MOVING | {"similarity_weights": (1, 0, 0)},
        "up": MOVING | {"similarity_weights": (0, 1, 0)},
        "down": MOVING | {"similarity_weights": (0, 0, 1)},
    },
    "router update": {update: MOVING | {"router_update": update} for update in ("none", "rows")},
    "hope": {
        "as published": {"preset": "paper", "method": "prune", "selection": "hope"},
        "over all tokens": {"preset": "paper", "method": "hope, over all tokens"},
    },
    "recombination": RULES,
    "recombination+refit": {name: rule | {"refit": True} for name, rule in RULES.items()},
    "recombination+all": {name: rule | EVERY_REFIT for name, rule in RULES.items()},
    "presets": {name: {"preset": name} for name in ("paper", "fast", "recommended")},
    "recommended": {
        "recommended": {},
        "no neuron refit": {"neuron_refit": False},
        "no refit": {"refit": False},
        "experts by router only": {"method": "prune"},
        "experts by greedy only": {"selection": "greedy"},
        "no drift correction": {"drift_correction": 0.0},
        "full drift correction": {"drift_correction": 1.0},
        "one-shot calibration": {"calibration_order": "oneshot"},
        "no guard": {"guard": False},
        "with recombination": {"recombine": True},
        "with the router refit": {"router_refit": True},
    },
}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    for path in args.models:
        check_settings(args.output, path.name, settings(args), TEXTS)
    results = read_results(args.output)
    for path in args.models:
        started = time.perf_counter()
        measured = results.get(path.name, {}).get("increase", {})
        for group, variants in measure(path, args).items():
            measured[group] = measured.get(group, {}) | variants
        seconds = round(time.perf_counter() - started)
        results[path.name] = {"settings": settings(args), "increase": measured, "seconds": seconds}
        write_results(args.output, results, indent=1)
        print(markdown_tables(path.name, measured), flush=True)
    if args.plots:
        plot(results, args.plots)
    print(json.dumps({"output": str(args.output)}))


def measure(path: Path, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure a model's loss increases, one per seed, by group and variant; prints the CPU seconds, too."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_texts(args.evaluation, tokenizer, args.sequence_length)
    texts = {name: batches[: args.windows // 8] for name, batches in texts.items()}  # batches of eight windows
    baseline = mean_loss(full, texts)
    increases: dict[str, dict[str, list[float]]] = {}
    known: dict[
        str, tuple[float, float]
    ] = {}  # increase and CPU seconds by config: the paper's own choice is in several groups
    for group in args.groups:
        for variant, fields in GROUPS[group].items():
            if variant not in (args.variants or GROUPS[group]):
                continue
            for seed in range(args.seeds):
                config = DernConfig(**common_fields(args, seed) | fields)
                key = config.to_json_string()
                if key not in known:
                    model, began = copy.deepcopy(full), time.process_time()
                    DernCompressor(config).compress_model(model, tokenizer)
                    seconds = time.process_time() - began
                    known[key] = mean_loss(model, texts) - baseline, seconds
                increase, seconds = known[key]
                increases.setdefault(group, {}).setdefault(variant, []).append(increase)
                name = f"{path.name}  {group:26s} {variant:36s} seed {seed}"
                print(f"  {name}  {increase:+.4f}  {seconds:5.1f} CPU s", flush=True)
    return increases


def mean_loss(model: torch.nn.Module, texts: dict) -> float:
    """Measure a model's loss in nats per token, mean over the domains."""
    return statistics.mean(result.loss for result in evaluate_texts(model, texts).values())


def common_fields(args: argparse.Namespace, seed: int) -> dict:
    """Return the fields of DernConfig that all variants share."""
    names = ("sparsity", "num_samples", "sequence_length")
    fields = {name: getattr(args, name) for name in names}
    return fields | {"dataset": str(args.calibration), "self_share": 0.0, "batch_size": 8, "seed": seed}


def markdown_tables(name: str, increases: dict[str, dict[str, list[float]]]) -> str:
    """Format one table per group: mean increase, and standard deviation over the seeds where there are several."""
    lines = []
    for group, variants in increases.items():
        lines += [f"\n{name}: {group}\n", "| variant | mean increase | spread |", "|---|---:|---:|"]
        for variant, runs in variants.items():
            spread = f"{statistics.stdev(runs):.4f}" if len(runs) > 1 else ""
            lines.append(f"| {variant} | {statistics.mean(runs):+.4f} | {spread} |")
    return "\n".join(lines)


def plot(results: dict, folder: Path) -> None:
    """Plot the threshold sweep of every model into one SVG file, unless matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install matplotlib")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "ablations", "svg.fonttype": "none"}  # reproducible and small files
    figure, axes = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        increases = result["increase"]
        for group, label in (("threshold", "initial centroids: gate"), ("threshold, own centroids", "own")):
            values = [statistics.mean(increases[group][f"alpha {alpha}"]) for alpha in THRESHOLDS]
            axis.plot(THRESHOLDS, values, marker="o", markersize=3, label=label)
        pruned = statistics.mean(increases["controls"]["prune by router"])
        axis.axhline(pruned, color="grey", linestyle="--", linewidth=1, label="pruning")
        axis.set(title=name, xlabel="similarity threshold", ylabel="loss increase (nats per token)", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ablation_threshold.svg", metadata={"Date": None})


def settings(args: argparse.Namespace) -> dict:
    """Return the settings that the figures depend on."""
    names = ("sparsity", "num_samples", "sequence_length", "windows", "seeds", "threads")
    texts = {name: getattr(args, name).name for name in TEXTS}
    return {name: getattr(args, name) for name in names} | texts | {"version": __version__, "torch": torch.__version__}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", type=Path, default=[TINY / "scratch", TINY / "upcycled"], help="checkpoint folders"
    )
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="default: all")
    parser.add_argument("--variants", nargs="+", help="of these groups; default: all")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=64, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows a domain (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ablations.json")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args()
    known = [variant for group in args.groups for variant in GROUPS[group]]
    if unknown := [variant for variant in args.variants or [] if variant not in known]:
        parser.error(f"no variant of {', '.join(args.groups)}: {', '.join(unknown)}; there are {', '.join(known)}")
    return args


if __name__ == "__main__":
    main()
