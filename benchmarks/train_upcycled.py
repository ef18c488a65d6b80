"""Make a Mixture-of-Experts model for measurements: upcycle a dense Llama into a Mixtral, and train it on text.

    python benchmarks/train_upcycled.py --base SmolLM2-135M --data DATA --output runs/upcycled --max-seconds 420
    python benchmarks/train_upcycled.py --base BASE --data TEXT MORE_TEXT --held-out OTHER_TEXT --output OUTPUT

Sparse upcycling (arXiv 2212.05055) copies a dense model's feed-forward block into every expert; a share of each
expert's neurons is then reinitialised, so that experts differ (drop-upcycling, arXiv 2502.19261).  The router starts
random, and is trained with the load-balancing loss of `examples/train_tiny_moe.py`.

`--base` is a folder of any Llama without biases, or a .gguf file (`pip install gguf`).  `--data` are files or folders
of text, all of which is trained on, `--epochs` times.  Of a folder that is split (`DATA/text/DOMAIN/train.txt`, as
`quality.py` takes it, or less deep) only `train.txt` is: the weights with the lowest loss on its `valid.txt` are kept,
and measured on its `test.txt`.  A text given by `--held-out` is used for both.

The defaults are for 10 MB of text, a base of 135 million parameters and one GPU with 80 GB; on others take a smaller
`--batch-size`.  On a CPU a few `--steps` show that it works.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from splits import load_held_out, split_files
from torch import Tensor
from torch.func import functional_call
from transformers import MixtralForCausalLM
from upcycling import build_model, load_base

from optimum_dern.data.batches import load_samples
from optimum_dern.evaluation.loss.perplexity import evaluate_texts


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_tiny_moe import learning_rate, router_balance  # noqa: E402


ALL = 1 << 40  # as the number of samples: all of them
TASKS = (
    "hellaswag",
    "piqa",
    "arc_easy",
    "blimp",
    "lambada_openai",
)  # `quality.py` scores those that the model is above chance on


def load_rows(sources: list[Path], tokenizer: Any, length: int) -> Tensor:
    """Load all complete sequences of the training text, (rows, length)."""
    files = training_files(sources)
    samples = load_samples(dict.fromkeys(map(str, files), 1), tokenizer, ALL, length, seed=0)
    rows = [ids for ids, _, _ in samples if len(ids) == length]
    if not rows:
        raise SystemExit(f"--data holds no {length} tokens in a row; give more text or shorter sequences")
    return torch.stack(rows)


def training_files(sources: list[Path]) -> list[Path]:
    """List the sources of training text; of those that are split, their `train.txt` files."""
    return [file for source in sources for file in split_files(source, "train").values() or [source]]


def load_held_out_texts(args: argparse.Namespace, tokenizer: Any) -> tuple[dict, dict]:
    """Load two sets of held-out batches by domain: to choose the best weights, and to measure them."""
    source = held_out_source(args)
    splits = [split for split in ("valid", "test") if split_files(source, split)] or ["test"]
    options = source, tokenizer, args.sequence_length, args.windows
    return load_held_out(*options, splits[0]), load_held_out(*options, splits[-1])


def held_out_source(args: argparse.Namespace) -> Path:
    """Return the path of the held-out text."""
    if args.held_out is not None:
        return args.held_out
    if len(args.data) > 1 or not split_files(args.data[0], "test"):
        raise SystemExit("--data is not one folder with text/DOMAIN/test.txt; give --held-out, too")
    return args.data[0]


def train(model: MixtralForCausalLM, rows: Tensor, valid: dict, args: argparse.Namespace, deadline: float) -> None:
    """Train with AdamW, and load the weights with the lowest loss on the texts `valid` at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    steps, started = number_of_steps(len(rows), args), time.monotonic()
    warmup, every = min(100, steps // 10 + 1), args.evaluate_every or max(1, steps // 10)
    best, kept, seen = math.inf, {}, []
    for step, batch in enumerate(batches_of(rows, args.batch_size, steps, args.seed)):
        # the decay ends with the steps or with the time, whichever is sooner
        done = min(1.0, (time.monotonic() - started) / max(deadline - started, 1e-9))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(max(step, int(done * (steps - 1))), steps, args.learning_rate, warmup)
        seen.append(descend(model.train(), batch, optimizer, args))
        late = time.monotonic() > deadline
        if (step + 1) % every == 0 or step + 1 == steps or late:
            held_out = fmean(result.loss for result in evaluate_texts(model, valid).values())
            line = {"step": step + 1, "of": steps, "loss": fmean(seen), "held_out": held_out}
            line |= {"learning_rate": optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
            print(json.dumps({name: round(value, 6) for name, value in line.items()}), flush=True)
            seen.clear()
            if held_out < best:
                best, kept = held_out, {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}
        if late:
            break
    model.load_state_dict(kept, strict=False)  # buffers do not change


def number_of_steps(rows: int, args: argparse.Namespace) -> int:
    """Return the number of steps: `--steps`, or as many as `--epochs` takes."""
    return args.steps or max(1, round(args.epochs * rows / args.batch_size))


def batches_of(rows: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches (size, length) of all rows, reshuffled in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])
    for chosen in order[: steps * size].view(steps, size):
        yield rows[chosen]


def descend(
    model: MixtralForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> float:
    """Take one training step, with a load-balancing loss per layer, not the model's own; returns the text loss."""
    batch = batch.to(args.device)
    out = run(model, getattr(torch, args.dtype), input_ids=batch, labels=batch, output_router_logits=True)
    text_loss = out.loss - model.router_aux_loss_coef * out.aux_loss
    balance = router_balance(out.router_logits, model.config.num_experts_per_tok)
    (text_loss + args.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return text_loss.item()


def run(model: MixtralForCausalLM, dtype: torch.dtype, **inputs: Any) -> Any:
    """Run a forward pass with the weights cast to a dtype; gradients reach the float32 parameters.

    `torch.autocast` would not affect the experts: transformers runs them by `grouped_mm`, which does not support it,
    and casts their input to the dtype of the weights.  And in float32 torch (2.13) has no grouped kernel on CUDA: it
    runs expert by expert, and waits for the GPU in every layer.
    """
    weights = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    return functional_call(model, weights, kwargs=inputs | {"use_cache": False})  # tied weights stay tied


def quality_command(args: argparse.Namespace) -> str:
    """Make the command line of `quality.py` that measures every method on the new model."""
    split = len(args.data) == 1 and split_files(args.data[0], "train")
    text = ["--data", *args.data] if split else ["--calibration", *training_files(args.data)]
    there = [name for name in TASKS if args.tasks_folder and (args.tasks_folder / f"{name}.jsonl").is_file()]
    tasks = ["--tasks", *there, "--tasks-folder", args.tasks_folder] if there else []
    words = ["python", "benchmarks/quality.py", args.output, *text, "--evaluation", held_out_source(args), *tasks]
    words += ["--sparsity", "0.25", "0.5", "0.75", "--at-once", "8"]
    words += ["--output", f"benchmarks/results/quality_{args.output.resolve().name}.json"]
    return shlex.join(map(str, words))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--base", type=Path, required=True, help="dense Llama: folder or .gguf file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text to train on: files or folders")
    parser.add_argument("--held-out", type=Path, help="text to measure on: file or folder (default: that of --data)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--reset", type=float, default=0.25, help="share of neurons drawn anew (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2.5, help="passes over the text (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="from the start to the last step, at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--balance", type=float, default=4e-3, help="weight of the balancing loss")
    parser.add_argument("--evaluate-every", type=int, help="steps between two held-out losses (default: a tenth)")
    parser.add_argument("--windows", type=int, default=48, help="held-out sequences a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of the forward and backward pass")
    parser.add_argument("--tasks-folder", type=Path, help="for the command that is printed at the end")
    return parser.parse_args()


def main() -> None:
    """Upcycle, train, measure and save the model."""
    deadline = time.monotonic()
    args = parse_arguments()
    deadline += args.max_seconds
    dense, tokenizer = load_base(args.base)
    valid, test = load_held_out_texts(args, tokenizer)
    rows = load_rows(args.data, tokenizer, args.sequence_length)
    print(f"{len(rows):,} sequences of {args.sequence_length} tokens, {number_of_steps(len(rows), args):,} steps")

    model = build_model(dense, args.experts, args.top_k, args.reset, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}", flush=True)
    losses = {"dense": evaluate_texts(dense.to(args.device), test)}
    del dense
    losses["upcycled"] = evaluate_texts(model.to(args.device), test)
    train(model, rows, valid, args, deadline)
    losses["trained"] = evaluate_texts(model, test)
    for stage, found in losses.items():
        print(json.dumps({"model": stage} | {name: round(result.loss, 4) for name, result in found.items()}))

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"\n{quality_command(args)}")


if __name__ == "__main__":
    main()
