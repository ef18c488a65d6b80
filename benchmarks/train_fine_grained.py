"""Train a fine-grained Mixture-of-Experts model for measurements: 24 experts, top-4, and a shared one (Qwen2-MoE).

    python benchmarks/train_fine_grained.py --data DATA --output runs/fine_grained

`DATA` holds texts named `train.txt` and `valid.txt`, one folder a domain, at any depth.  19 million parameters, of
which a token uses 7 million; a vocabulary of 8,192, trained first; from random weights with seed 0, on one CPU thread.
The same command goes on at the last saved step of a run that was stopped.  `--hours` sets the length of the learning
rate's schedule by the speed measured on the first steps, unless `--steps` is given.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_tiny_moe import (  # noqa: E402
    SHAPE,
    evaluate,
    learning_rate,
    load_streams,
    random_windows,
    router_balance,
    router_load,
    train_tokenizer,
    write_config,
)


VOCABULARY, WINDOW, BATCH = 8192, 512, 4
PEAK_RATE, BALANCE = 2e-3, 2e-3  # of the learning rate; weight of the load-balancing loss of each layer
MEASURED_STEPS = 10  # from which the length of the schedule is estimated
CONFIG = SHAPE | {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 6,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "intermediate_size": 512,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "max_position_embeddings": WINDOW,
}


def descend(model: Qwen2MoeForCausalLM, optimizer: torch.optim.Optimizer, batch: Tensor, dtype: torch.dtype) -> float:
    """Take one training step on token ids (BATCH, WINDOW), and return its loss in nats per token."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
    text_loss = out.loss - model.router_aux_loss_coef * out.aux_loss
    (text_loss + BALANCE * router_balance(out.router_logits, model.config.num_experts_per_tok)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return text_loss.item()


def train(args: argparse.Namespace) -> None:
    """Train, saving a state that a later run goes on from, and the bfloat16 checkpoint at the end."""
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**CONFIG)).train()
    if args.experts_implementation:
        model.set_experts_implementation(args.experts_implementation)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    streams, held_out = (load_streams(args.data, split, args.output) for split in ("train", "valid"))
    print(f"{model.num_parameters():,} parameters, {sum(map(len, streams.values())):,} tokens of text", flush=True)
    state_file, dtype = args.output / "state.pt", getattr(torch, args.dtype)
    state = torch.load(state_file) if state_file.exists() else {"step": 0, "steps": args.steps}
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    steps, started, seen = state["steps"], time.monotonic(), []
    step = state["step"]
    while steps is None or step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps or 10**6, PEAK_RATE)  # the warm-up does not depend on the length
        batch = random_windows(streams, torch.Generator().manual_seed(step), BATCH, WINDOW)
        seen.append(descend(model, optimizer, batch, dtype))
        step += 1
        if steps is None and step == MEASURED_STEPS:
            steps = max(200, int(args.hours * 3600 / (time.monotonic() - started) * MEASURED_STEPS))
            print(f"{steps:,} steps of {BATCH * WINDOW:,} tokens", flush=True)
        if step % args.save_every == 0 or step == steps:
            line = {"step": step, "seconds": round(time.monotonic() - started), "loss": sum(seen) / len(seen)}
            print(json.dumps(line | {"valid": evaluate(model, held_out, 16, WINDOW)}), flush=True)
            seen.clear()
            save_state(state_file, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, steps=steps)
    print_load(model, held_out)
    save_checkpoint(model, args.output)


def save_state(path: Path, **state: Any) -> None:
    """Replace the file of the training state in one step."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def print_load(model: Qwen2MoeForCausalLM, held_out: dict[str, Tensor]) -> None:
    """Print every expert's share of the routed tokens by layer, sorted."""
    for layer in router_load(model, held_out, 8, WINDOW):
        print("  load", " ".join(f"{share:.3f}" for share in sorted(layer, reverse=True)), flush=True)


def save_checkpoint(model: Qwen2MoeForCausalLM, output: Path) -> None:
    """Save the model in bfloat16 with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(output)
    write_config(model, output / "config.json")
    PreTrainedTokenizerFast.from_pretrained(output / "tokenizer").save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder a domain")
    parser.add_argument("--output", type=Path, required=True, help="folder for the state and the checkpoint")
    parser.add_argument("--hours", type=float, default=2.5, help="length of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --hours")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two states (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of matrix products")
    parser.add_argument("--experts-implementation", help="of transformers, such as eager or grouped_mm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "tokenizer").exists():
        train_tokenizer(args.data, args.output, VOCABULARY, WINDOW)
    train(args)


if __name__ == "__main__":
    main()
