"""Comparison of ways to make the N router rows of a merged layer from the E original rows, on the same groups.

    python benchmarks/router_rows.py                           # both models of examples/tiny_moe, half of the experts

Methods run as published (`preset="paper"`, oneshot); only the router differs (`router_fits.py` has the ways).
Figures are increases of the loss over the full model in nats per token, mean over the domains of the evaluation text,
and for every layer KL(t | softmax) and the relative error of the output, on the calibration tokens.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layers_aside import LayersAside
from quality import MERGING, ROOT, TINY, run
from results_file import check_settings, read_results, write_results
from router_fits import ROWS, Merging
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import DernConfig, __version__
from optimum_dern.core.layer.segments import Segments
from optimum_dern.core.merging.grouping import Grouping
from optimum_dern.core.router.rule import recognise_rule
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.layer.steps import RIDGE
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts
from optimum_dern.methods import LayerProblem, get_method
from optimum_dern.models.moe.structure import find_moe_layers


METHODS = tuple(name for name in MERGING if name != "ream")  # REAM is published with the representative's row


@contextmanager
def noted_mergings(method: str) -> Iterator[list[Merging]]:
    """Collect the merged layers that a method makes while the context is open."""
    module, noted = sys.modules[type(get_method(method)).__module__], []
    merged_candidates = module.merged_candidates  # every merging method calls it with its groups

    def note(problem: LayerProblem, grouping: Grouping, merged: Segments) -> Any:
        layer = problem.layer
        logits = layer.routing.hidden @ layer.router_rows.to(layer.routing.hidden).T
        rule = recognise_rule(logits, layer.routing)
        if rule is None or rule.phi != "exp":
            sys.exit("a router is no softmax of W x; give another model")
        noted.append(Merging(layer, grouping, merged, rule))
        return merged_candidates(problem, grouping, merged)

    with patch.object(module, "merged_candidates", note):
        yield noted


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    for path in args.models:
        check_settings(args.output, path.name, settings(args))
    results = {}
    for path in args.models:
        started = time.perf_counter()
        rows = measure(path, args)
        seconds = round(time.perf_counter() - started)
        results[path.name] = {"settings": settings(args), "rows": rows, "seconds": seconds}
        write_results(args.output, read_results(args.output) | results)
    print(markdown_table(results))
    print(json.dumps({"output": str(args.output)}))


def measure(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every calibration draw, method and way of making router rows; returns one row each."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_texts(args.evaluation, tokenizer, args.sequence_length, limit=args.windows)
    baseline, found = mean_loss(full, texts), []
    for seed in range(args.seeds):
        data = {"dataset": str(args.calibration), "batch_size": 8, "seed": seed}
        data |= {name: getattr(args, name) for name in ("num_samples", "sequence_length")}
        options = {"preset": "paper", "sparsity": args.sparsity, **data}
        configs = {(method, "published", args.sparsity): DernConfig(method=method, **options) for method in METHODS}
        with ExitStack() as stack:
            mergings = {method: stack.enter_context(noted_mergings(method)) for method in METHODS}
            compressed = run(full, load_batches(tokenizer=tokenizer, **data), configs)
        for (method, *_), layers in compressed.items():
            for name, make in ROWS.items():
                rows = [make(merging).to(merging.layer.router_rows) for merging in mergings[method]]
                model = with_routers(full, layers, mergings[method], rows)
                row = {"method": method, "rows": name, "seed": seed, "loss": mean_loss(model, texts) - baseline}
                pairs = list(zip(mergings[method], rows, strict=True))
                row["kl"] = [round(merging.kl(own, merging.mass), 5) for merging, own in pairs]
                row["error"] = [round(merging.error(own), 5) for merging, own in pairs]
                found.append(row)
                print(f"  {path.name:10s} {seed} {method:10s} {name:20s} {row['loss']:+.4f}", flush=True)
    return found


def with_routers(full: Any, compressed: LayersAside, mergings: Sequence[Merging], rows: Sequence[Tensor]) -> Any:
    """Copy a model with merged experts and a router of N or E rows in each layer."""
    model = copy.deepcopy(full)
    layers = find_moe_layers(model)
    compressed.write_(model, layers)
    for layer, merging, own in zip(layers, mergings, rows, strict=True):
        setattr(layer.router_weight.module, layer.router_weight.name, nn.Parameter(own))
        layer.experts.register_forward_pre_hook(partial(to_groups, merging.groups(own)))
    return model


def to_groups(groups: Tensor, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pre-forward hook that maps expert indices to groups; weights of the same group add up in the output."""
    hidden, index, weight = args
    return hidden, groups[index], weight


def mean_loss(model: nn.Module, texts: Mapping[str, list[dict]]) -> float:
    """Measure a model's loss in nats per token, mean over the domains."""
    return statistics.mean(result.loss for result in evaluate_texts(model, texts).values())


def markdown_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a row per method and model: mean loss increase over the draws, and its standard deviation."""
    lines = [f"| | {' | '.join(ROWS)} |", f"|---|{'---:|' * len(ROWS)}"]
    for model, result in results.items():
        for method in METHODS:
            cells = []
            for name in ROWS:
                losses = [row["loss"] for row in result["rows"] if (row["method"], row["rows"]) == (method, name)]
                spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                cells.append(f"{statistics.mean(losses):+.3f}{spread}")
            lines.append(f"| `{method}`, {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the figures depend on."""
    names = ("sparsity", "num_samples", "sequence_length", "windows", "seeds", "threads")
    texts = {name: getattr(args, name).name for name in ("calibration", "evaluation")}
    versions = {"version": __version__, "torch": torch.__version__}
    return {name: getattr(args, name) for name in names} | {"ridge": RIDGE} | texts | versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [TINY / "scratch", TINY / "upcycled"]
    parser.add_argument("models", nargs="*", type=Path, default=models, help="checkpoint folders")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration", help="file or folder")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation", help="file or folder")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=100, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="evaluation windows a text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "router_rows.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
