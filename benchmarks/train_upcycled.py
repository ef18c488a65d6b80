"""Make a capable Mixture-of-Experts model to measure on: a dense Llama, upcycled into a Mixtral and trained on text.

    python benchmarks/train_upcycled.py --base SmolLM2-135M --data TEXT --held-out OTHER_TEXT --output runs/upcycled

Sparse upcycling (arXiv 2212.05055) copies a dense model's feed-forward block into every expert; each expert then draws
a share of its neurons anew, so that experts come apart (drop-upcycling, arXiv 2502.19261).  The router starts random,
with the load-balancing loss of `examples/train_tiny_moe.py`.

`--base` is a folder of any Llama without biases, or a .gguf file (`pip install gguf`); `--data` files or folders of
text, in equal shares.  On a GPU a few thousand steps take minutes; on a CPU a few steps show that it works.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

from optimum_dern.calibration.data import load_samples
from optimum_dern.evaluation.perplexity import evaluate_texts, load_texts


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_tiny_moe import learning_rate, router_balance, upcycle  # noqa: E402


SHARED = (  # what both configs call by one name
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
ALL = 1 << 40  # samples: every one


def load_base(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A dense model in float32, and its tokenizer."""
    is_gguf = path.suffix == ".gguf"
    folder, options = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    dense = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    biases = [name for name, _ in dense.named_parameters() if name.endswith(".bias")]
    if biases:
        raise SystemExit(f"{path} has biases ({biases[0]}, ...), for which Mixtral has no place; choose another base")
    return dense, AutoTokenizer.from_pretrained(folder, **options)


def build_model(dense: LlamaForCausalLM, experts: int, top_k: int, reset: float, seed: int) -> MixtralForCausalLM:
    """The upcycled model, before training."""
    shape = {name: getattr(dense.config, name) for name in SHARED}
    torch.manual_seed(seed)
    sparse = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=top_k))
    upcycle(dense, sparse)
    reset_neurons_(sparse, reset, seed)
    return sparse


@torch.no_grad()
def reset_neurons_(model: MixtralForCausalLM, share: float, seed: int) -> None:
    """Draw a share of every expert's neurons anew, with the mean and spread of the projection's weights."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)  # (E, f, d) each, views
        neurons = (gate, up, layer.mlp.experts.down_proj.transpose(1, 2))
        scales = [(projection[0].mean().item(), projection[0].std().item()) for projection in neurons]
        experts, width, _ = gate.shape
        for expert in range(experts):
            chosen = torch.randperm(width, generator=generator)[: round(share * width)]
            for projection, (mean, spread) in zip(neurons, scales, strict=True):
                new = torch.randn(len(chosen), projection.shape[2], generator=generator)
                projection[expert, chosen] = mean + spread * new


def train(model: MixtralForCausalLM, rows: list[torch.Tensor], args: argparse.Namespace) -> None:
    """AdamW on random rows; the model's own auxiliary loss is replaced by one for each layer."""
    device = torch.device(args.device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    started, seen = time.time(), []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate, warmup=min(100, args.steps // 10 + 1))
        chosen = torch.randint(len(rows), (args.batch_size,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([rows[i] for i in chosen.tolist()]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        text_loss = out.loss - model.router_aux_loss_coef * out.aux_loss
        balance = router_balance(out.router_logits, model.config.num_experts_per_tok)
        (text_loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(text_loss.item())
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            mean = sum(seen) / len(seen)
            line = {"step": step + 1, "loss": mean, "balance": balance.item(), "seconds": time.time() - started}
            print(json.dumps({name: round(value, 4) for name, value in line.items()}), flush=True)
            seen.clear()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="dense Llama: folder or .gguf file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text to train on: files or folders")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on: file or folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--reset", type=float, default=0.25, help="share of neurons drawn anew (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--balance", type=float, default=4e-3, help="weight of the balancing loss")
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--windows", type=int, default=48, help="held-out sequences a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Upcycle, train, measure, save."""
    args = parse_arguments()
    dense, tokenizer = load_base(args.base)
    samples = load_samples(dict.fromkeys(map(str, args.data), 1), tokenizer, ALL, args.sequence_length, args.seed)
    rows = [ids for ids, _ in samples if len(ids) == args.sequence_length]
    if not rows:
        raise SystemExit(
            f"--data holds no {args.sequence_length} tokens in a row; give more text or shorter sequences"
        )
    texts = load_texts(args.held_out, tokenizer, args.sequence_length, args.batch_size)
    texts = {name: batches[: -(-args.windows // args.batch_size)] for name, batches in texts.items()}
    print(f"{len(rows):,} sequences of {args.sequence_length} tokens to train on")

    model = build_model(dense, args.experts, args.top_k, args.reset, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}", flush=True)
    losses = {"dense": evaluate_texts(dense.to(args.device), texts)}
    losses["upcycled"] = evaluate_texts(model.to(args.device), texts)
    train(model, rows, args)
    losses["trained"] = evaluate_texts(model, texts)
    for stage, found in losses.items():
        print(json.dumps({"model": stage} | {name: round(result.loss, 4) for name, result in found.items()}))

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    data = " ".join(map(str, args.data[:1]))
    print(f"\npython benchmarks/quality.py {args.output} --calibration {data} --evaluation {args.held_out}")


if __name__ == "__main__":
    main()
