"""Loss by domain when one domain's own experts or neurons are masked, against as many random ones.

    python benchmarks/attribution.py --seeds 3 --threads 1       # both models of examples/tiny_moe

Experts are attributed on the calibration text, a new draw per seed, and losses are measured on the evaluation text.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from results_file import standard_error, write_results
from splits import load_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern.attribution import attribute_experts, masked_experts
from optimum_dern.attribution.masking import masked_neurons_
from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_texts


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_moe"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    results = {path.name: measure(path, args) for path in (TINY / "scratch", TINY / "upcycled")}
    write_results(args.output, results, indent=1)
    print(markdown(results))


def measure(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every seed, domain and kind of mask: the rise of the loss on each domain."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_held_out(TINY / "text" / "evaluation", tokenizer, 256, args.windows)
    before, rows = losses(model, texts), []
    for seed in range(args.seeds):
        data = {
            file.stem: load_batches(str(file), tokenizer, num_samples=32, sequence_length=256, seed=seed)
            for file in sorted((TINY / "text" / "calibration").glob("*.txt"))
        }
        found = attribute_experts(path, data, dtype="float32")
        experts, width = found.neurons.shape[2:]
        draw = torch.Generator().manual_seed(seed)
        random = {p: torch.randperm(experts, generator=draw)[: args.experts].tolist() for p in found.layers}
        places = {p: torch.randperm(experts * width, generator=draw)[: args.neurons].tolist() for p in found.layers}
        for domain in found.domains:
            for kind, masked in (("own", found.most_skewed(domain, args.experts)), ("random", random)):
                with masked_experts(model, masked):
                    rows.append(row("experts", kind, domain, seed, before, losses(model, texts)))
            neurons = {"own": found.most_skewed_neurons(domain, args.neurons)}
            neurons["random"] = {p: [divmod(i, width) for i in own] for p, own in places.items()}
            for kind, masked in neurons.items():
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                masked_neurons_(model, masked)
                rows.append(row("neurons", kind, domain, seed, before, losses(model, texts)))
                model.load_state_dict(kept)
        print(f"{path.name}, seed {seed}: {len(rows)} figures", flush=True)
    return rows


def losses(model: Any, texts: dict[str, list[dict]]) -> dict[str, float]:
    return {name: value.loss for name, value in evaluate_texts(model, texts).items()}


def row(what: str, kind: str, domain: str, seed: int, before: dict, after: dict) -> dict[str, Any]:
    rise = {name: after[name] - before[name] for name in before}
    return {"what": what, "kind": kind, "domain": domain, "seed": seed, "rise": rise}


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """Format per model and kind: the rise on the masked domain, and the mean rise on the others, over the seeds."""
    lines = ["| model | masked | on the domain | on the others |", "|---|---|---:|---:|"]
    for name, rows in results.items():
        for what, kind in dict.fromkeys((r["what"], r["kind"]) for r in rows):
            own, others = [], []
            for seed in sorted({r["seed"] for r in rows}):
                chosen = [r for r in rows if (r["what"], r["kind"], r["seed"]) == (what, kind, seed)]
                own.append(fmean(r["rise"][r["domain"]] for r in chosen))
                others.append(fmean(v for r in chosen for d, v in r["rise"].items() if d != r["domain"]))
            cells = [f"{fmean(v):+.3f} ± {standard_error(v):.3f}" for v in (own, others)]
            lines.append(f"| {name} | {kind} {what} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=1, help="masked in every layer (default: %(default)s)")
    parser.add_argument("--neurons", type=int, default=128, help="masked in every layer (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="of each text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "attribution.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
