"""What the importance of neurons is worth: one width or different ones, and the weights of neurons that DERN averages.

    python benchmarks/neurons.py --seeds 3                   # as published, both models of examples/tiny_moe
    python benchmarks/neurons.py --preset recommended        # refitted and guarded, without text of the model's own
    python benchmarks/neurons.py --table                     # of the results so far

Experts keep a share of their neurons: all of them as many (`uniform`), or each another number of as many in all
(`global`), which a checkpoint holds only with zeros in the place of the others.  Or DERN keeps a share of the experts,
and averages neurons that weigh by their expert's saliency, all the same (`none`), or by an importance of their own;
`prune` keeps the same experts and averages nothing.
All plans of a draw get the same calibration sequences, in one pass.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from equal_bytes import NARROWING, PUBLISHED, RECOMMENDED, SHARES, TINY, loss_of, markdown
from layers_aside import LayersAside
from results_file import read_results, write_results
from splits import load_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernConfig
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.run.checks import check_request
from optimum_dern.engine.walk.decoder import compress_layers_
from optimum_dern.engine.walk.recipe import Recipe
from optimum_dern.models.moe.structure import find_moe_layers


PRESETS = {"published": PUBLISHED, "recommended": RECOMMENDED}
WEIGHTS = {"saliency": {}, "none": {"importance_weighting": False}}
WEIGHTS |= {name: {"importance": name} for name in NARROWING}
THRESHOLDS = (0.5, 0.1)  # the paper's alpha, at which no neuron of `scratch` moves, and one at which some do


def plans(share: float, preset: str) -> dict[str, dict[str, Any]]:
    """Return the options of every plan that keeps a share of the neurons or of the experts, by name."""
    options = PRESETS[preset]
    found = {
        f"{name}, {budget}, {preset}": {"method": name, "width_sparsity": 1 - share, "width_budget": budget} | options
        for name in NARROWING
        for budget in ("uniform", "global")
    }
    found[f"prune, {preset}"] = {"method": "prune", "sparsity": 1 - share} | options
    for alpha in THRESHOLDS:
        moving = {"sparsity": 1 - share, "recombine": True, "similarity_threshold": alpha} | options
        found |= {f"dern {alpha}, weights {name}, {preset}": moving | weight for name, weight in WEIGHTS.items()}
    return found


def main() -> None:
    args = parse_arguments()
    if not args.table:
        torch.set_num_threads(args.threads)
        logging.disable_progress_bar()
        for path in [Path(args.model)] if args.model else [TINY / "scratch", TINY / "upcycled"]:
            measure(path, args)
    print(markdown(read_results(args.output)))


def measure(path: Path, args: argparse.Namespace) -> None:
    """Measure what is not in the results yet, and write them after every share of a draw."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_held_out(args.evaluation, tokenizer, args.sequence_length, args.windows)
    results = read_results(args.output)
    result = results.setdefault(path.name, {"loss": loss_of(full, texts), "rows": []})
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        data = {"num_samples": args.num_samples, "sequence_length": args.sequence_length, "seed": seed}
        batches = load_batches(str(args.calibration), tokenizer, **data)
        for share in args.shares:
            known = {row["plan"] for row in result["rows"] if (row["share"], row["seed"]) == (share, seed)}
            chosen = {
                plan: DernConfig(dataset=str(args.calibration), **data, **options)
                for plan, options in plans(share, args.preset).items()
                if plan not in known and any(part in plan for part in args.only)
            }
            for plan, sink in compress(full, batches, chosen).items():
                reports = [report for report in sink.finished.values() if report]
                model = copy.deepcopy(full)
                sink.write_(model, find_moe_layers(model))
                row = {"plan": plan, "share": share, "seed": seed, "kept": share, "loss": loss_of(model, texts)}
                row["widths"] = [report.widths for report in reports]
                row["winners"] = [report.winner for report in reports]
                result["rows"].append(row)
                print(f"{path.name} {seed} {share} {plan:35s} {row['loss'] - result['loss']:+.4f}", flush=True)
            write_results(args.output, results)


def compress(full: Any, batches: list[dict], configs: dict[str, DernConfig]) -> dict[str, LayersAside]:
    """Compress with every config in one pass, without changing the model; returns the compressed layers by plan."""
    if not configs:
        return {}
    layers = find_moe_layers(full)
    sinks = {name: LayersAside(full, layers) for name in configs}
    recipes = [Recipe(config, check_request(config, full, layers), sinks[name]) for name, config in configs.items()]
    compress_layers_(full, layers, batches, recipes)
    return sinks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: both models of examples/tiny_moe)")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--preset", choices=PRESETS, default="published")
    parser.add_argument("--only", nargs="+", default=[""], help="plans whose names have one of these parts")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first of them")
    parser.add_argument("--num-samples", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=TINY.parents[1] / "benchmarks" / "results" / "neurons.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
