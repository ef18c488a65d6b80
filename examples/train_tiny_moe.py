"""Train the two tiny Mixture-of-Experts models of `examples/tiny_moe/` on real text, on one CPU thread each.

    python examples/train_tiny_moe.py tokenizer --data TEXT --output runs
    python examples/train_tiny_moe.py scratch   --data TEXT --output runs
    python examples/train_tiny_moe.py dense     --data TEXT --output runs
    python examples/train_tiny_moe.py upcycled  --data TEXT --output runs

`TEXT` holds one folder a domain with a `train.txt` and a `valid.txt` (documents end with a line `<|endoftext|>`).
`scratch` is a Qwen3-MoE trained from random weights.  `upcycled` copies the feed-forward block of `dense`, a small
Llama, into the eight experts of a Mixtral and trains on (sparse upcycling, arXiv 2212.05055): that is how Mixtral
and Qwen2-57B are believed to have been made, and why neurons of different experts resemble each other there.

Every run is resumable: the same command goes on at the last saved step.  About 0.35 s a step of 2,048 tokens.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


VOCABULARY, WINDOW, BATCH = 2048, 256, 8
STEPS = {"scratch": 4000, "dense": 2500, "upcycled": 3500}
LEARNING_RATE = {"scratch": 3e-3, "dense": 3e-3, "upcycled": 2e-3}
BALANCE = {"scratch": 6e-4, "dense": 0.0, "upcycled": 4e-3}  # weight of the load-balancing loss

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def build_model(kind: str, output: Path) -> torch.nn.Module:
    """Make a new model of the given kind; `upcycled` starts from the trained dense model."""
    torch.manual_seed(0)
    if kind == "scratch":
        experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, intermediate_size=128, **experts))
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=256))
    config = MixtralConfig(**SHAPE, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2)
    return upcycle(LlamaForCausalLM.from_pretrained(output / "dense", dtype=torch.float32), MixtralForCausalLM(config))


@torch.no_grad()
def upcycle(dense: LlamaForCausalLM, sparse: MixtralForCausalLM) -> MixtralForCausalLM:
    """Copy a dense model's weights into a sparse one, and its feed-forward block into every expert."""
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    sparse.load_state_dict(shared, strict=False)
    for source, target in zip(dense.model.layers, sparse.model.layers, strict=True):
        experts = target.mlp.experts
        experts.gate_up_proj[:] = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])  # (2f, d)
        experts.down_proj[:] = source.mlp.down_proj.weight  # (d, f)
    return sparse


def train_tokenizer(data: Path, output: Path, vocabulary: int = VOCABULARY, window: int = WINDOW) -> None:
    """Train and save a byte-level BPE tokenizer, on the same amount of text from every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    samples = (path.read_text("utf-8")[:2_000_000] for path in sorted(data.rglob("train.txt")))
    tokenizer.train_from_iterator(samples, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=window,
    )
    fast.save_pretrained(output / "tokenizer")


def load_streams(data: Path, split: str, output: Path) -> dict[str, torch.Tensor]:
    """Load one long tensor of token ids per domain, cached in the output folder."""
    cache = output / f"{split}.pt"
    if not cache.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "tokenizer")
        streams = {}
        for path in sorted(data.rglob(f"{split}.txt")):
            documents = path.read_text("utf-8").replace("\n<|endoftext|>\n", "<|endoftext|>")
            ids = tokenizer.backend_tokenizer.encode(documents, add_special_tokens=False).ids
            streams[path.parent.name] = torch.tensor(ids, dtype=torch.int32)
        torch.save(streams, cache)
    return torch.load(cache)


def random_windows(
    streams: dict[str, torch.Tensor], generator: torch.Generator, batch: int = BATCH, window: int = WINDOW
) -> torch.Tensor:
    """Draw token ids (batch, window) at random, with every domain equally likely."""
    names = sorted(streams)
    rows = []
    for choice in torch.randint(len(names), (batch,), generator=generator).tolist():
        stream = streams[names[choice]]
        start = torch.randint(len(stream) - window, (1,), generator=generator).item()
        rows.append(stream[start : start + window])
    return torch.stack(rows).long()


def router_balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Compute the Switch load-balancing loss (arXiv 2101.03961 eq. 4), mean over layers; 1 when the load is even."""
    losses = []
    for logits in router_logits:  # (tokens, E)
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, logits.topk(top_k).indices, 1.0 / top_k)
        losses.append(logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, streams: dict[str, torch.Tensor], windows: int = 32, window: int = WINDOW
) -> dict[str, float]:
    """Measure the mean loss in nats per token on the first windows of every domain."""
    model.eval()
    losses = {}
    for name, stream in streams.items():
        batch = stream[: windows * window].view(windows, window).long()
        losses[name] = round(model(input_ids=batch, labels=batch).loss.item(), 4)
    model.train()
    return losses


@torch.no_grad()
def router_load(
    model: torch.nn.Module, streams: dict[str, torch.Tensor], windows: int = 16, window: int = WINDOW
) -> list[list[float]]:
    """Measure each expert's share of the routed tokens by layer, on all domains together."""
    batch = torch.cat([stream[: windows * window].view(windows, window).long() for stream in streams.values()])
    logits = model(input_ids=batch, output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    counts = [torch.bincount(layer.topk(top_k).indices.flatten(), minlength=layer.shape[1]) for layer in logits]
    return [(count / count.sum()).tolist() for count in counts]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to 5 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(kind: str, data: Path, output: Path, steps: int) -> None:
    """Train one model, saving a resumable state every 500 steps and the bf16 checkpoint at the end."""
    model = build_model(kind, output).train()
    sparse = kind != "dense"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    state_file, first = output / f"{kind}.state.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    streams, held_out = load_streams(data, "train", output), load_streams(data, "valid", output)

    started = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LEARNING_RATE[kind])
        batch = random_windows(streams, torch.Generator().manual_seed(step))
        out = model(input_ids=batch, labels=batch, **({"output_router_logits": True} if sparse else {}))
        loss = out.loss
        if sparse:  # the model's own auxiliary loss balances all layers together; this one each layer by itself
            own = model.router_aux_loss_coef * out.aux_loss
            loss = loss - own + BALANCE[kind] * router_balance(out.router_logits, model.config.num_experts_per_tok)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            line = {"step": step + 1, "seconds": round(time.time() - started), "valid": evaluate(model, held_out)}
            print(json.dumps(line), flush=True)
            if sparse:
                for layer in router_load(model, held_out):
                    print("  load", " ".join(f"{share:.3f}" for share in sorted(layer, reverse=True)), flush=True)
            partial = state_file.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(state_file)

    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(output / kind)
    write_config(model, output / kind / "config.json")
    PreTrainedTokenizerFast.from_pretrained(output / "tokenizer").save_pretrained(output / kind)


def write_config(model: torch.nn.Module, path: Path) -> None:
    """Rewrite the saved config with the rotary embedding and expert counts also under the names of older readers."""
    from optimum_dern.checkpoint.output.config_json import compressed_config
    from optimum_dern.text_files import replace_json

    replace_json(path, compressed_config(json.loads(path.read_text("utf-8")), None, model.config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["tokenizer", *STEPS])
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder a domain")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, help="override the number of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.kind == "tokenizer":
        train_tokenizer(arguments.data, arguments.output)
    else:
        train(arguments.kind, arguments.data, arguments.output, arguments.steps or STEPS[arguments.kind])


if __name__ == "__main__":
    main()
