"""Loss of a model some of whose layers are condensed to dense ones, by their number and that of their experts.

    python benchmarks/condensing.py                                  # examples/tiny_moe/scratch
    python benchmarks/condensing.py MODEL --calibration TEXT --evaluation TEXT --layers 4 8 --experts 4

Every line is a run of its own of `condense_layers`, on the same calibration sequences, with and without its refit.
"""

import argparse
import copy
from pathlib import Path
from statistics import fmean

import torch
from results_file import write_results
from splits import load_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern.condensing import condense_layers
from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_texts


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    full = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = load_held_out(args.evaluation, tokenizer, args.sequence_length, args.windows)
    data = {"num_samples": args.num_samples, "sequence_length": args.sequence_length, "seed": args.seed}
    batches = load_batches(str(args.calibration), tokenizer, **data)
    loss, size, rows = loss_of(full, texts), full.num_parameters(), []
    print("| layers | experts | parameters | as searched | + refit | layers chosen |\n|---:|---:|---:|---:|---:|---|")
    for layers in args.layers:
        for experts in args.experts:
            increases = []
            for refit in (False, True):
                model = copy.deepcopy(full)
                found = condense_layers(model, batches, layers, experts, refit)
                increases.append(loss_of(model, texts) - loss)
            chosen, share = [layer.layer for layer in found], model.num_parameters() / size
            rows.append(
                {"layers": layers, "experts": experts, "increases": increases, "chosen": chosen, "size": share}
            )
            figures = " | ".join(f"{increase:+.4f}" for increase in increases)
            print(f"| {layers} | {experts} | {share:.2f} | {figures} | {chosen} |", flush=True)
            write_results(args.output, {"loss": loss, "rows": rows}, indent=1)


def loss_of(model: torch.nn.Module, texts: dict[str, list[dict]]) -> float:
    """Return the mean of the losses on the texts."""
    return fmean(value.loss for value in evaluate_texts(model, texts).values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY / "scratch", help="checkpoint folder (default: scratch)")
    parser.add_argument("--calibration", type=Path, default=TINY / "text" / "calibration")
    parser.add_argument("--evaluation", type=Path, default=TINY / "text" / "evaluation")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48, help="evaluation windows a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "condensing.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
