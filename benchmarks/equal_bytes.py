"""Loss at equal bytes: fewer experts, narrower ones, both, and condensed layers, as published and `recommended`.

    python benchmarks/equal_bytes.py --seeds 3 --threads 1          # both models of examples/tiny_moe; resumable
    python benchmarks/equal_bytes.py MODEL --calibration TEXT --evaluation TEXT
    python benchmarks/equal_bytes.py --table --plot docs/source/images/equal_bytes.svg      # of the results so far

Every plan keeps the same share of the routed experts' bytes: 0.75, 0.5, 0.25, or for condensed layers as many experts
as a token uses.  All get the same calibration sequences (a new draw per seed), without text of the model's own.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from results_file import read_results, write_results
from splits import load_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_texts
from optimum_dern.models.moe.structure import find_moe_layers


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"
SHARES = (0.75, 0.5, 0.25)
NARROWING = ("heapr", "camera_p", "slim")
RECOMMENDED, PUBLISHED = {"preset": "recommended", "self_share": 0.0}, {"preset": "paper"}


def plans(share: float, experts: int, top_k: int) -> dict[str, dict[str, Any]]:
    """Return the options of every plan that keeps a share of the routed experts' bytes, by name."""
    both = {"num_experts": round(experts * share**0.5)}  # and the rest by the width
    both["width_sparsity"] = 1 - share * experts / both["num_experts"]
    kept = {"sparsity": 1 - share}
    condensed = {}
    if share == top_k / experts:
        options = {"method": "cd_moe", "num_experts": top_k}
        condensed = {
            "condensed (cd_moe), published": options | PUBLISHED,
            "condensed (cd_moe), recommended": options | RECOMMENDED,
        }
        if share not in SHARES:
            return condensed | {"fewer (dern), recommended": kept | RECOMMENDED}
    narrow = {
        f"narrower ({name}), {title}": {"method": name, "width_sparsity": 1 - share} | options
        for name in NARROWING
        for title, options in (("published", PUBLISHED), ("recommended", RECOMMENDED))
    }
    return condensed | {
        "fewer (reap), published": {"method": "prune", "selection": "reap"} | kept | PUBLISHED,
        "fewer (dern), recommended": kept | RECOMMENDED,
        "merged (uncurl), published": {"method": "uncurl"} | kept | PUBLISHED,
        "merged (uncurl), recommended": {"method": "uncurl"} | kept | RECOMMENDED,
        **narrow,
        "fewer and narrower (camera_p), recommended": both | RECOMMENDED,
    }


def main() -> None:
    args = parse_arguments()
    if not args.table:
        torch.set_num_threads(args.threads)
        logging.disable_progress_bar()
        for path in [Path(args.model)] if args.model else [TINY / "scratch", TINY / "upcycled"]:
            measure(path, args)
    results = read_results(args.output)
    print(markdown(results))
    if args.plot:
        plot(results, args.plot)


def measure(path: Path, args: argparse.Namespace) -> None:
    """Measure what is not in the results yet, and write them after every figure."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    layer = find_moe_layers(full)[0]
    texts = load_held_out(args.evaluation, tokenizer, args.sequence_length, args.windows)
    results = read_results(args.output)
    rows = results.setdefault(path.name, {"loss": loss_of(full, texts), "rows": []})["rows"]
    known = {(row["plan"], row["share"], row["seed"]) for row in rows}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        data = {"num_samples": args.num_samples, "sequence_length": args.sequence_length, "seed": seed}
        batches = load_batches(str(args.calibration), tokenizer, **data)
        for share in dict.fromkeys((*args.shares, layer.top_k / layer.num_experts)):
            for plan, options in plans(share, layer.num_experts, layer.top_k).items():
                if (plan, share, seed) in known:
                    continue
                model, started = copy.deepcopy(full), time.perf_counter()
                compressor = DernCompressor(dataset=str(args.calibration), **data, **options)
                compressor.compress_model(model, tokenizer, batches)
                report, seconds = compressor.report, time.perf_counter() - started
                experts = [size.experts * size.width for size in (report.before, report.after)]
                rows.append(
                    {
                        "plan": plan,
                        "share": share,
                        "seed": seed,
                        "kept": experts[1] / experts[0],
                        "loss": loss_of(model, texts),
                        "seconds": round(seconds, 1),
                    }
                )
                write_results(args.output, results, indent=1)
                increase = rows[-1]["loss"] - results[path.name]["loss"]
                print(f"{path.name} {seed} {share} {plan:45s} {increase:+.4f} {seconds:.0f} s", flush=True)


def loss_of(model: Any, texts: dict[str, list[dict]]) -> float:
    """Return the mean of the losses on the texts."""
    return fmean(value.loss for value in evaluate_texts(model, texts).values())


def figures(result: dict[str, Any]) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Return by plan and share: bytes kept, mean loss increase, and its standard deviation over the draws."""
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    for plan, share in dict.fromkeys((row["plan"], row["share"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["plan"], row["share"]) == (plan, share)]
        increases = [row["loss"] - result["loss"] for row in rows]
        spread = stdev(increases) if len(increases) > 1 else 0.0
        found.setdefault(plan, {})[share] = (fmean(row["kept"] for row in rows), fmean(increases), spread)
    return found


def markdown(results: dict[str, Any]) -> str:
    """Format a table per model: a row per plan, a column per share, mean and standard deviation over the draws."""
    parts = []
    for name, result in results.items():
        found = figures(result)
        shares = sorted({share for row in found.values() for share in row}, reverse=True)
        parts += [f"\n{name}\n", "| | " + " | ".join(f"{share:.3g}" for share in shares) + " |"]
        parts.append("|---|" + "---:|" * len(shares))
        for plan in sorted(found, key=lambda plan: found[plan].get(0.5, (0, 9, 0))[1]):
            cells = [f"{found[plan][s][1]:+.4f} ± {found[plan][s][2]:.4f}" if s in found[plan] else "" for s in shares]
            parts.append(f"| {plan} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss increase against the bytes kept, one panel per model, with the frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "equal bytes", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, len(results), figsize=(4.6 * len(results) + 2.8, 4.6), squeeze=False)
    names = [plan.rpartition(", ")[0] for result in results.values() for plan in figures(result)]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(sorted(names)))}
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        found = {plan: sorted(row.values()) for plan, row in figures(result).items()}
        for plan, points in sorted(found.items()):
            colour = colours[plan.rpartition(", ")[0]]
            style = "-" if plan.endswith("recommended") else ":"
            kept, increase, _ = zip(*points, strict=True)
            axis.plot(kept, increase, style, color=colour, marker="o", markersize=3, linewidth=1, label=plan)
        axis.plot(*frontier(found), color="black", linewidth=3, alpha=0.25, label="frontier")
        axis.set(yscale="log", xlabel="bytes of the routed experts kept", title=name)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[0][0].set_ylabel("loss increase, nats per token")
    width = 1 - 2.8 / figure.get_figwidth()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        fontsize=7,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(width, 0.55),
    )
    figure.tight_layout(rect=(0, 0, width, 1))
    figure.savefig(path, metadata={"Date": None})


def frontier(found: dict[str, list[tuple[float, float, float]]]) -> tuple[list[float], list[float]]:
    """Return the points that no other beats in both bytes and loss."""
    points = sorted((kept, increase) for row in found.values() for kept, increase, _ in row)
    best = [p for p in points if not any(q[0] <= p[0] + 1e-6 and q[1] < p[1] for q in points)]
    return [kept for kept, _ in best], [increase for _, increase in best]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first of them")
    parser.add_argument("--num-samples", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="an .svg or .png file")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "equal_bytes.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
