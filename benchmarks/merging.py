"""Losses of two fine-tuned models and of their merges, on the domains that they were fine-tuned on.

    python benchmarks/merging.py --data DATA --seeds 3 --threads 1

`scratch` of examples/tiny_moe is fine-tuned on DATA/text/*code*/train.txt and on DATA/text/*math*/train.txt, a new
order per seed.  The strength of each rule is the best of a small grid on the text that coefficients are learned on.
Seeds that the result file has are not measured again, nor are models fine-tuned again that `--models` has.
"""

import argparse
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from results_file import check_settings, read_results, standard_error, write_results
from splits import split_files
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import evaluate_loss
from optimum_dern.model_merging import LearnedSettings, merge_checkpoints


ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "tiny_moe" / "scratch"
GRIDS = {"task_arithmetic": (0.3, 0.5, 0.8), "ties": (0.5, 1.0, 1.5), "dare": (0.3, 0.5, 0.8)}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    settings = {"steps": args.steps, "rate": args.rate}
    check_settings(args.output, BASE.name, settings)
    rows = read_results(args.output).get(BASE.name, {"rows": []})["rows"]
    for seed in range(args.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        with TemporaryDirectory() as folder:
            rows += measure(seed, Path(folder), args)
        write_results(args.output, {BASE.name: {"settings": settings, "rows": rows}}, indent=1)
    print(markdown(rows))


def measure(seed: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tune two models, merge them by every method, and return the losses on both domains."""
    tokenizer, files = AutoTokenizer.from_pretrained(BASE), {}
    for domain in ("code", "math"):
        files[domain] = {
            s: next(f for n, f in split_files(args.data, s).items() if domain in n) for s in ("train", "test")
        }
    tuned = {domain: (args.models or folder) / f"{seed}-{domain}" for domain in files}

    def batches(domain: str, split: str, count: int, size: int, draw: int) -> list[dict]:
        options = {"num_samples": count, "sequence_length": 256, "batch_size": size, "seed": draw}
        return load_batches(str(files[domain][split]), tokenizer, **options)

    held_out = {domain: batches(domain, "test", 48, 8, 0) for domain in files}
    for domain, path in tuned.items():
        if not path.exists():
            fine_tune(part := path.with_suffix(".part"), batches(domain, "train", 8 * args.steps, 8, seed), args.rate)
            tokenizer.save_pretrained(part)
            part.rename(path)
    learning = [batches(domain, "train", 16, 1, 1000 + seed) for domain in files]

    def losses(path: Path) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return {domain: evaluate_loss(model, own).loss for domain, own in held_out.items()}

    def known(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return fmean(evaluate_loss(model, own).loss for own in learning)

    def merged(name: str, **options: Any) -> Path:
        merge_checkpoints(BASE, [*tuned.values()], folder / name, seed=seed, dtype="float32", **options)
        return folder / name

    found = {"base": losses(BASE), **{f"fine-tuned on {domain}": losses(path) for domain, path in tuned.items()}}
    found["learned"] = losses(merged("learned", texts=learning))
    found["learned, 4 chunks"] = losses(merged("chunks", texts=learning, settings=LearnedSettings(chunks=4)))
    found["learned layer by layer"] = losses(merged("layers", texts=learning, layerwise=True))
    for method, grid in GRIDS.items():
        tried = [merged(f"{method}-{strength}", method=method, strength=strength) for strength in grid]
        best = min(tried, key=known)
        found[method] = losses(best) | {"strength": float(best.name.rpartition("-")[2])}
    for name, values in found.items():
        print(seed, f"{name:22}", values, flush=True)
    return [{"seed": seed, "model": name, **values} for name, values in found.items()]


def fine_tune(output: Path, batches: list[dict], rate: float) -> None:
    """Train the base for one pass over the batches."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(batches))
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | code | maths | mean |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        columns = [[r["code"] for r in own], [r["math"] for r in own], [(r["code"] + r["math"]) / 2 for r in own]]
        lines.append(f"| {name} | " + " | ".join(f"{fmean(c):.4f} ± {standard_error(c):.4f}" for c in columns) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of the fine-tuned models (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, 2,048 tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "merging.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
